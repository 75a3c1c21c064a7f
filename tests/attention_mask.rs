//! The mask of attention: what it draws, whole and in windows, and what it hides.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::DropMask;
use candle_dropout::functional::{
    AttentionConfig, AttentionMask, attention, dropout, softmax_dropout,
};
use cases::attention::{Sizes, sizes};
use cases::{DTYPES, bits, error, largest, mask, random};

/// Values whose columns pick one key each, so that the result is the weights themselves.
fn unit_values(sizes: Sizes, dtype: DType) -> Result<Tensor> {
    Tensor::eye(sizes.sk, dtype, &Device::Cpu)?
        .broadcast_as((sizes.b, sizes.kv, sizes.sk, sizes.sk))?
        .contiguous()
}

#[test]
fn the_mask_is_that_of_dropout_on_the_scores() -> Result<()> {
    for (dtype, dims) in [
        (DType::F32, [2, 3, 3, 70, 37, 37]),
        (DType::F64, [1, 2, 1, 65, 130, 130]),
        (DType::BF16, [2, 2, 2, 9, 256, 256]),
        (DType::F16, [1, 2, 2, 129, 300, 300]),
    ] {
        let sizes = sizes(dims);
        // Small scores, so that every weight is far from 0.
        let (q, k) =
            ((random(&sizes.q(), dtype, 1)? * 0.1)?, (random(&sizes.k(), dtype, 2)? * 0.1)?);
        let drop = mask(0.4);
        let y = attention(&q, &k, &unit_values(sizes, dtype)?, &AttentionConfig::default(), &drop)?;
        let ones = Tensor::ones(&sizes.scores(), dtype, &Device::Cpu)?;
        assert_eq!(
            bits(&y.eq(0.)?)?,
            bits(&dropout(&ones, &drop)?.eq(0.)?)?,
            "{sizes:?} {dtype:?}"
        );
    }
    Ok(())
}

#[test]
fn the_weights_are_those_of_softmax_dropout() -> Result<()> {
    let sizes = sizes([2, 3, 3, 65, 131, 131]);
    let (q, k) = (random(&sizes.q(), DType::F64, 1)?, random(&sizes.k(), DType::F64, 2)?);
    let config = AttentionConfig { causal: true, scale: Some(0.1), ..Default::default() };
    let y = attention(&q, &k, &unit_values(sizes, DType::F64)?, &config, &mask(0.4))?;
    let scores = q.matmul(&k.t()?.contiguous()?)?;
    let expected = softmax_dropout(&scores, 0.1, &AttentionMask::Causal, &mask(0.4))?;
    assert_eq!(bits(&y.eq(0.)?)?, bits(&expected.eq(0.)?)?);
    assert!(error(&y, &expected)? < 1e-13);
    Ok(())
}

#[test]
fn a_part_with_its_window_equals_that_part_of_the_whole() -> Result<()> {
    let (sizes, drop) = (sizes([3, 6, 3, 130, 70, 32]), mask(0.4));
    let (q, k) = (random(&sizes.q(), DType::F32, 1)?, random(&sizes.k(), DType::F32, 2)?);
    let (v, dout) = (random(&sizes.k(), DType::F32, 3)?, random(&sizes.q(), DType::F32, 4)?);
    let config = AttentionConfig { softcap: Some(5.), ..Default::default() };
    let part = |q: &Tensor, k: &Tensor, v: &Tensor, drop: &DropMask, dout: &Tensor| {
        let q = Var::from_tensor(q)?;
        let o = attention(&q, k, v, &config, drop)?;
        let dq = (&o * dout)?.backward()?.get(&q).unwrap().clone();
        Ok::<_, candle_core::Error>([o, dq])
    };
    let whole = part(&q, &k, &v, &drop, &dout)?;
    // Samples, heads (two queries a key head) and queries; the last two at once in the fourth.
    for (dim, kv_dim, from, len, kv_from, kv_len) in
        [(0, 0, 1, 2, 1, 2), (1, 1, 2, 4, 1, 2), (2, 3, 67, 40, 0, sizes.d)]
    {
        let mut start = [0; 4];
        start[dim] = from;
        let window = drop.window(&sizes.scores(), &start);
        let cut = |x: &Tensor| x.narrow(dim, from, len);
        let kv_cut = |x: &Tensor| x.narrow(kv_dim, kv_from, kv_len);
        let ours = part(&cut(&q)?, &kv_cut(&k)?, &kv_cut(&v)?, &window, &cut(&dout)?)?;
        for (ours, whole) in ours.iter().zip(&whole) {
            assert_eq!(bits(ours)?, bits(&cut(whole)?.contiguous()?)?, "dimension {dim}");
        }
    }
    Ok(())
}

#[test]
fn the_last_queries_of_a_causal_whole_are_a_part_of_it() -> Result<()> {
    let (sizes, drop) = (sizes([1, 2, 2, 150, 150, 16]), mask(0.4));
    let (q, k) = (random(&sizes.q(), DType::F32, 1)?, random(&sizes.k(), DType::F32, 2)?);
    let config = AttentionConfig { causal: true, ..Default::default() };
    let whole = attention(&q, &k, &k, &config, &drop)?;
    let window = drop.window(&sizes.scores(), &[0, 0, 100, 0]);
    let last = attention(&q.narrow(2, 100, 50)?, &k, &k, &config, &window)?;
    assert_eq!(bits(&last)?, bits(&whole.narrow(2, 100, 50)?.contiguous()?)?);
    Ok(())
}

#[test]
fn a_window_of_keys_draws_their_part_of_the_mask_wherever_it_begins() -> Result<()> {
    let (sizes, full) = (sizes([2, 2, 2, 9, 100, 100]), [2, 4, 50, 300]);
    let (q, k) = ((random(&sizes.q(), DType::F32, 1)? * 0.1)?, random(&sizes.k(), DType::F32, 2)?);
    for col in [0, 8, 3, 61, 200] {
        let drop = mask(0.4).window(&full, &[0, 2, 11, col]);
        let v = unit_values(sizes, DType::F32)?;
        let y = attention(&q, &k, &v, &AttentionConfig::default(), &drop)?;
        let keep = drop.to_tensor(&sizes.scores(), &Device::Cpu)?;
        assert_eq!(bits(&y.eq(0.)?)?, bits(&keep.eq(0u8)?)?, "from key {col}");
        // Backward draws the same: gradients of the values, with one-hot gradients for the output.
        let v = Var::from_tensor(&v)?;
        let o = attention(&q, &k, &v, &AttentionConfig::default(), &drop)?;
        let dv = o.narrow(2, 4, 1)?.backward()?.get(&v).unwrap().sum_keepdim(3)?;
        let kept = keep.narrow(2, 4, 1)?.transpose(2, 3)?;
        assert_eq!(bits(&dv.eq(0.)?)?, bits(&kept.eq(0u8)?)?, "from key {col}");
    }
    Ok(())
}

// ---- what is hidden or dropped vanishes ----

#[test]
fn queries_that_see_no_key_give_zeros_and_zero_gradients() -> Result<()> {
    for dtype in DTYPES {
        // Causal with more queries than keys: the first 30 come before every key. And a sample of no key.
        let sizes = sizes([2, 2, 1, 70, 40, 16]);
        let vars = [sizes.q(), sizes.k(), sizes.k()].into_iter().enumerate();
        let vars = vars.map(|(i, dims)| Var::from_tensor(&random(&dims, dtype, i as u64)?));
        let vars = vars.collect::<Result<Vec<_>>>()?;
        let key_lengths = Some(Tensor::new(&[40u32, 0], &Device::Cpu)?);
        let config = AttentionConfig { causal: true, key_lengths, ..Default::default() };
        for drop_p in [0., 0.3] {
            let o = attention(&vars[0], &vars[1], &vars[2], &config, &mask(drop_p))?;
            let grads = (&o * random(&sizes.q(), dtype, 7)?)?.backward()?;
            let zero = |x: &Tensor| Ok(largest(&x.to_dtype(DType::F64)?)? == 0.);
            let check = |x: Result<bool>| assert!(x.unwrap(), "{dtype:?} {drop_p}");
            for x in [&o, grads.get(&vars[0]).unwrap()] {
                check(zero(&x.narrow(2, 0, 30)?));
                check(zero(&x.narrow(0, 1, 1)?));
                check(zero(&x.narrow(0, 0, 1)?.narrow(2, 30, 40)?).map(|zero| !zero));
            }
            for var in &vars[1..] {
                check(zero(&grads.get(var).unwrap().narrow(0, 1, 1)?));
                check(zero(grads.get(var).unwrap()).map(|zero| !zero));
            }
        }
    }
    Ok(())
}

/// `x` with NaN and infinities in some rows of dimension 2.
fn spoiled(x: &Tensor, rows: impl Fn(usize) -> bool) -> Result<Tensor> {
    let parts = (0..x.dim(2)?).map(|row| match rows(row) {
        true => x.narrow(2, row, 1)? * if row % 2 == 0 { f64::NAN } else { f64::INFINITY },
        false => x.narrow(2, row, 1),
    });
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 2)
}

#[test]
fn hidden_keys_and_values_reach_nothing_even_if_they_are_no_numbers() -> Result<()> {
    for (dtype, drop_p) in
        [(DType::F32, 0.), (DType::F32, 0.3), (DType::BF16, 0.3), (DType::F64, 0.)]
    {
        let sizes = sizes([1, 2, 2, 70, 70, 16]);
        let (q, k) = (random(&sizes.q(), dtype, 1)?, random(&sizes.k(), dtype, 2)?);
        let (v, dout) = (random(&sizes.k(), dtype, 3)?, random(&sizes.q(), dtype, 4)?);
        // Causal: what the first 50 queries do not see. Lengths: what nobody sees.
        let key_lengths = Some(Tensor::new(&[50u32], &Device::Cpu)?);
        let limits = [
            AttentionConfig { causal: true, ..Default::default() },
            AttentionConfig { key_lengths, ..Default::default() },
            AttentionConfig { window: Some((100, 0)), ..Default::default() },
        ];
        for config in limits {
            let visible = if config.key_lengths.is_some() { 70 } else { 50 };
            let results = |k: &Tensor, v: &Tensor, dout: &Tensor| {
                let [q, k, v] = [&q, k, v].map(|x| Var::from_tensor(x).unwrap());
                let o = attention(&q, &k, &v, &config, &mask(drop_p))?;
                let grads = (o.narrow(2, 0, visible)? * dout.narrow(2, 0, visible)?)?.backward()?;
                let of = |x: &Var, rows| grads.get(x).unwrap().narrow(2, 0, rows)?.contiguous();
                let o = o.narrow(2, 0, visible)?.contiguous()?;
                Ok::<_, candle_core::Error>([o, of(&q, visible)?, of(&k, 50)?, of(&v, 50)?])
            };
            let (bad_k, bad_v) = (spoiled(&k, |row| row >= 50)?, spoiled(&v, |row| row >= 50)?);
            let (clean, bad) = (results(&k, &v, &dout)?, results(&bad_k, &bad_v, &dout)?);
            // What the later queries see reaches the keys before it, too, through their softmax.
            let unharmed = if config.key_lengths.is_some() { 4 } else { 2 };
            for (i, (clean, bad)) in clean.iter().zip(&bad).take(unharmed).enumerate() {
                assert!(bits(clean)? == bits(bad)?, "{i} {config:?} {dtype:?} {drop_p}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_dropped_value_vanishes_even_if_it_is_no_number() -> Result<()> {
    let sizes = sizes([1, 1, 1, 40, 30, 8]);
    let (q, k) = (random(&sizes.q(), DType::F32, 1)?, random(&sizes.k(), DType::F32, 2)?);
    let (v, drop) = (random(&sizes.k(), DType::F32, 3)?, mask(0.5));
    let keep = bits(&drop.to_tensor(&sizes.scores(), &Device::Cpu)?)?;
    let config = AttentionConfig::default();
    let clean = attention(&q, &k, &v, &config, &drop)?;
    for key in [0, 13, 29] {
        let bad = attention(&q, &k, &spoiled(&v, |row| row == key)?, &config, &drop)?;
        for query in 0..40 {
            let row = |x: &Tensor| bits(&x.narrow(2, query, 1)?.contiguous()?);
            let same = row(&clean)? == row(&bad)?;
            assert_eq!(same, keep[query * 30 + key] == 0, "query {query} and key {key}");
        }
    }
    Ok(())
}
