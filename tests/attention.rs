//! Attention against its naive formula, and the promises of its docs.

mod common;
#[path = "common/attention.rs"]
mod runner;

use std::cell::Cell;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::{
    AttentionConfig, AttentionMask, DropMask, MaskKey, attention, attention_qkv, dropout,
    softmax_dropout,
};
use common::{bits, random};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use runner::{Sizes, VIEWS, View, configs, disagreements, error, largest, sizes};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

fn mask(drop_p: f32) -> DropMask {
    DropMask::new(drop_p, MaskKey::derive(42, 7)).unwrap()
}

/// The CPU, and a GPU if there is one that this build can use.
fn devices() -> Vec<Device> {
    [Ok(Device::Cpu), Device::new_cuda(0)].into_iter().flatten().collect()
}

/// Asserts that the output and each gradient agree with the formula on every device.
fn agrees(
    sizes: Sizes,
    config: &AttentionConfig,
    view: View,
    drop: &DropMask,
    dtype: DType,
) -> Result<()> {
    assert_eq!(disagreements(sizes, config, view, drop, dtype, &devices())?, [""; 0]);
    Ok(())
}

/// Every head size that the kernels have, odd ones and 1; single queries and keys, tails of tiles of
/// queries and keys, and several of both; more queries than keys and fewer.
const SIZES: [[usize; 6]; 13] = [
    [1, 1, 1, 1, 1, 1],
    [2, 3, 3, 5, 7, 3],
    [1, 2, 2, 64, 256, 32],
    [1, 2, 2, 65, 257, 64],
    [1, 2, 1, 63, 255, 96],
    [1, 1, 1, 130, 70, 128],
    [1, 1, 1, 37, 300, 256],
    [2, 4, 2, 33, 41, 16],
    [2, 6, 1, 17, 19, 40],
    [1, 1, 1, 1, 515, 64],
    [1, 1, 1, 515, 1, 64],
    [1, 1, 1, 7, 9, 300],
    [1, 1, 1, 600, 530, 33],
];

#[test]
fn attention_agrees_with_its_formula() -> Result<()> {
    for dims in SIZES {
        for drop_p in [0., 0.1, 1.] {
            for dtype in DTYPES {
                for causal in [false, true] {
                    let config = AttentionConfig { causal, ..Default::default() };
                    agrees(sizes(dims), &config, View::Contiguous, &mask(drop_p), dtype)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn every_field_of_the_config_agrees_with_the_formula() -> Result<()> {
    for dims in [
        [3, 4, 2, 70, 70, 32],
        [3, 2, 2, 5, 300, 64],
        [3, 2, 1, 300, 65, 8],
        [1, 3, 3, 270, 290, 33],
    ] {
        for config in configs(sizes(dims))? {
            for (dtype, drop_p) in [
                (DType::F32, 0.),
                (DType::F32, 0.3),
                (DType::F64, 0.3),
                (DType::F16, 0.3),
                (DType::BF16, 0.),
            ] {
                agrees(sizes(dims), &config, View::Contiguous, &mask(drop_p), dtype)?;
            }
        }
    }
    Ok(())
}

#[test]
fn strided_arguments_agree_with_the_formula() -> Result<()> {
    for view in VIEWS {
        for (dims, dtype) in [
            ([2, 4, 2, 33, 70, 64], DType::F32),
            ([2, 4, 2, 33, 70, 64], DType::BF16),
            ([2, 3, 3, 70, 33, 17], DType::F16),
            ([2, 3, 1, 70, 33, 1], DType::F64),
        ] {
            let config = AttentionConfig { causal: true, ..Default::default() };
            agrees(sizes(dims), &config, view, &mask(0.2), dtype)?;
        }
    }
    Ok(())
}

#[test]
fn the_result_lies_in_memory_as_the_queries_do() -> Result<()> {
    let (config, drop) = (AttentionConfig::default(), DropMask::none());
    let x = random(&[2, 7, 3, 8], DType::F32, 1)?;
    let (heads_first, rows_first) = (x.clone(), x.transpose(1, 2)?);
    assert!(attention(&heads_first, &heads_first, &heads_first, &config, &drop)?.is_contiguous());
    let o = attention(&rows_first, &rows_first, &rows_first, &config, &drop)?;
    assert_eq!(o.dims(), [2, 3, 7, 8]);
    assert!(o.transpose(1, 2)?.is_contiguous());
    let copied = rows_first.contiguous()?;
    let expected = attention(&copied, &copied, &copied, &config, &drop)?;
    assert_eq!(bits(&o.contiguous()?)?, bits(&expected)?);
    Ok(())
}

#[test]
fn queries_keys_and_values_in_one_tensor_give_the_same_bits() -> Result<()> {
    for (dtype, [b, s, heads, kv_heads, d]) in [
        (DType::F32, [2, 70, 4, 4, 64]),
        (DType::F32, [2, 33, 6, 2, 17]),
        (DType::BF16, [1, 300, 2, 1, 32]),
        (DType::F16, [2, 9, 3, 3, 8]),
        (DType::F64, [2, 9, 3, 1, 8]),
    ] {
        let dims = [b, s, heads + 2 * kv_heads, d];
        let config = AttentionConfig { causal: true, ..Default::default() };
        let (drop, dout) = (mask(0.3), random(&[b, s, heads, d], dtype, 5)?);
        let wide = Var::from_tensor(&random(&[b, s + 2, dims[2], d], dtype, 1)?)?;
        for offset in [0, 2] {
            let qkv = wide.narrow(1, offset, s)?;
            let part = |from, len| qkv.narrow(2, from, len)?.transpose(1, 2);
            let (q, k) = (part(0, heads)?, part(heads, kv_heads)?);
            let v = part(heads + kv_heads, kv_heads)?;
            let apart = attention(&q, &k, &v, &config, &drop)?.transpose(1, 2)?;
            let together = attention_qkv(&qkv, heads, &config, &drop)?;
            assert_eq!(together.dims(), [b, s, heads, d]);
            assert!(bits(&together)? == bits(&apart.contiguous()?)?);
            let grad = |o: &Tensor| Ok((o * &dout)?.backward()?.get(&wide).unwrap().clone());
            let (together, apart): (Result<Tensor>, Result<Tensor>) =
                (grad(&together), grad(&apart));
            assert_eq!(together?.dims(), wide.dims());
            // Candle adds zeros, which turn -0 into 0, to each part.
            let difference = (grad(&attention_qkv(&qkv, heads, &config, &drop)?)? - apart?)?;
            assert_eq!(largest(&difference.to_dtype(DType::F64)?)?, 0.);
        }
    }
    Ok(())
}

// ---- the mask ----

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

// ---- the host's manners ----

#[test]
fn empty_tensors_give_empty_or_zero_outputs_and_gradients() -> Result<()> {
    for dims in [
        [0, 2, 2, 3, 3, 4],
        [2, 0, 0, 3, 3, 4],
        [2, 2, 1, 0, 3, 4],
        [2, 2, 1, 3, 0, 4],
        [2, 2, 1, 3, 3, 0],
    ] {
        for drop_p in [0., 0.3, 1.] {
            let sizes = sizes(dims);
            let vars = [sizes.q(), sizes.k(), sizes.k()]
                .map(|dims| Var::ones(&dims, DType::F32, &Device::Cpu).unwrap());
            let config = AttentionConfig::default();
            let o = attention(&vars[0], &vars[1], &vars[2], &config, &mask(drop_p))?;
            assert_eq!(o.dims(), sizes.q());
            assert_eq!(largest(&o.to_dtype(DType::F64)?)?, 0.);
            let grads = o.backward()?;
            for var in &vars {
                assert_eq!(grads.get(var).unwrap().dims(), var.dims(), "{sizes:?}");
                assert_eq!(largest(&grads.get(var).unwrap().to_dtype(DType::F64)?)?, 0.);
            }
        }
    }
    Ok(())
}

#[test]
fn only_tracked_arguments_get_a_gradient_and_a_second_backward_the_same() -> Result<()> {
    let sizes = sizes([2, 4, 2, 33, 40, 16]);
    let x = [sizes.q(), sizes.k(), sizes.k()];
    let x: Vec<_> = (0..3).map(|i| random(&x[i], DType::F32, i as u64).unwrap()).collect();
    let vars: Vec<_> = x.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let (config, drop) = (AttentionConfig::default(), mask(0.3));
    let o = attention(&vars[0], &vars[1], &vars[2], &config, &drop)?.sqr()?;
    let (first, second) = (o.backward()?, o.backward()?);
    for (i, var) in vars.iter().enumerate() {
        assert_eq!(bits(first.get(var).unwrap())?, bits(second.get(var).unwrap())?);
        let mut some = x.clone();
        some[i] = var.as_tensor().clone();
        let grads = attention(&some[0], &some[1], &some[2], &config, &drop)?.sqr()?.backward()?;
        assert_eq!(bits(grads.get(var).unwrap())?, bits(first.get(var).unwrap())?);
        assert!((0..3).filter(|j| *j != i).all(|j| grads.get(&some[j]).is_none()));
    }
    Ok(())
}

#[test]
fn no_result_depends_on_the_number_of_threads() -> Result<()> {
    for dims in [[1, 1, 1, 700, 700, 32], [2, 4, 2, 130, 300, 64]] {
        let sizes = sizes(dims);
        let results = || {
            let vars = [sizes.q(), sizes.k(), sizes.k()].into_iter().enumerate();
            let vars =
                vars.map(|(i, dims)| Var::from_tensor(&random(&dims, DType::F32, i as u64)?));
            let vars = vars.collect::<Result<Vec<_>>>()?;
            let config = AttentionConfig { causal: true, ..Default::default() };
            let o = attention(&vars[0], &vars[1], &vars[2], &config, &mask(0.3))?;
            let grads = o.sqr()?.backward()?;
            let mut all = bits(&o)?;
            for var in &vars {
                all.extend(bits(grads.get(var).unwrap())?);
            }
            Ok::<_, candle_core::Error>(all)
        };
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(results)
        };
        let one = with(1)?;
        assert!(one == with(2)?);
        assert!(one == with(5)?);
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let (q, k) = (random(&[2, 4, 5, 8], DType::F32, 1)?, random(&[2, 2, 7, 8], DType::F32, 2)?);
    let drop = DropMask::none();
    let none = AttentionConfig::default();
    let error = |q: &Tensor, k: &Tensor, v: &Tensor, config: &AttentionConfig| {
        attention(q, k, v, config, &drop).unwrap_err().to_string()
    };
    let vector = |x: &[u32]| Some(Tensor::new(x, &Device::Cpu).unwrap());
    let slopes = |x: &[f32]| Some(Tensor::new(x, &Device::Cpu).unwrap());
    let odd = random(&[2, 3, 7, 8], DType::F32, 3)?;
    let tracked = Var::new(&[1f32; 4], &Device::Cpu)?;
    for (message, expected) in [
        (error(&q.to_dtype(DType::U32)?, &k, &k, &none), "attention: q: expected dtype"),
        (error(&q, &k.to_dtype(DType::F16)?, &k, &none), "attention: k: expected dtype F32"),
        (error(&q.flatten(0, 1)?, &k, &k, &none), "attention: q: expected [B, H, S, D]"),
        (
            error(&q, &k, &k.squeeze(0)?.flatten(0, 1)?, &none),
            "attention: v: expected [B, H, S, D]",
        ),
        (error(&q, &k.narrow(3, 0, 4)?, &k, &none), "attention: k: expected [2, Hkv, Sk, 8]"),
        (error(&q, &k.narrow(0, 0, 1)?, &k, &none), "attention: k: expected [2, Hkv, Sk, 8]"),
        (error(&q, &k, &k.narrow(2, 0, 4)?, &none), "attention: v: expected shape [2, 2, 7, 8]"),
        (
            error(&q, &odd, &odd, &none),
            "attention: k: expected a number of heads that divides the 4",
        ),
        (
            error(&q, &k, &k, &AttentionConfig { scale: Some(f64::NAN), ..none.clone() }),
            "attention: scale: expected a finite f32, got NaN",
        ),
        (
            error(&q, &k, &k, &AttentionConfig { softcap: Some(0.), ..none.clone() }),
            "attention: softcap: expected a finite number above 0, got 0",
        ),
        (
            error(&q, &k, &k, &AttentionConfig { key_lengths: vector(&[1; 3]), ..none.clone() }),
            "attention: key_lengths: expected U32 of shape [2], got U32 of shape [3]",
        ),
        (
            error(&q, &k, &k, &AttentionConfig { key_lengths: slopes(&[1.; 2]), ..none.clone() }),
            "attention: key_lengths: expected U32 of shape [2], got F32",
        ),
        (
            error(&q, &k, &k, &AttentionConfig { alibi_slopes: slopes(&[1.; 2]), ..none.clone() }),
            "attention: alibi_slopes: expected F32 of shape [4], got F32 of shape [2]",
        ),
        (
            error(
                &q,
                &k,
                &k,
                &AttentionConfig {
                    alibi_slopes: Some(tracked.as_tensor().clone()),
                    ..none.clone()
                },
            ),
            "attention: alibi_slopes: expected a constant",
        ),
        (
            attention(&q, &k, &k, &none, &mask(0.1).window(&[2, 4, 5, 6], &[0; 4]))
                .unwrap_err()
                .to_string(),
            "attention: drop.window: expected start + shape <= full_shape",
        ),
        (
            attention_qkv(&q.transpose(1, 2)?, 1, &none, &drop).unwrap_err().to_string(),
            "attention: qkv: expected 1 heads of queries",
        ),
        (
            attention_qkv(&q.flatten(0, 1)?, 1, &none, &drop).unwrap_err().to_string(),
            "attention: qkv: expected [B, S, H + 2 Hkv, D]",
        ),
    ] {
        assert!(message.starts_with(expected), "{message}");
    }
    Ok(())
}

/// A call on small tensors that mostly go together, with a config and a window that may be anything.
#[derive(Clone, Debug)]
struct Call {
    dims: [Vec<usize>; 3],
    /// Of q and k, and of v.
    dtypes: [DType; 2],
    /// One tensor with so many heads of queries, rather than three.
    packed: Option<usize>,
    config: AttentionConfig,
    drop: DropMask,
}

fn call() -> impl Strategy<Value = Call> {
    let sizes = (0usize..3, 0usize..3, 0usize..3, 0usize..5, 0usize..5, 0usize..4);
    let other = prop::option::weighted(0.1, prop::collection::vec(0usize..4, 0..6));
    let dtype = || prop::sample::select(vec![DType::F32, DType::F64, DType::BF16, DType::U32]);
    let number = || {
        let numbers = [f64::NAN, f64::INFINITY, -1., 0., 1e-30, 0.7, 1e30];
        prop::option::weighted(0.3, prop::sample::select(numbers.to_vec()))
    };
    let side = || prop::sample::select(vec![0, 1, 2, usize::MAX - 1, usize::MAX]);
    let vector = |dtype: DType| {
        let of = move |(len, value): (usize, f32)| {
            Tensor::full(value, len, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        prop::option::weighted(
            0.3,
            (0usize..4, prop::sample::select(vec![0., 1., 3., 9.])).prop_map(of),
        )
    };
    let config = (
        (number(), any::<bool>(), prop::option::weighted(0.3, (side(), side())), number()),
        vector(DType::U32),
        vector(DType::F32),
    )
        .prop_map(|((scale, causal, window, softcap), key_lengths, alibi_slopes)| {
            AttentionConfig { scale, causal, window, softcap, key_lengths, alibi_slopes }
        });
    let full = || prop::collection::vec(0usize..6, 3..6);
    let window = prop::option::weighted(0.3, (full(), full()));
    let drop = (0u8..5, window).prop_map(|(quarters, window)| {
        let drop = mask(f32::from(quarters) / 4.);
        window.map_or(drop.clone(), |(full, start)| drop.window(&full, &start))
    });
    let dtypes = (dtype(), prop::option::weighted(0.1, dtype()))
        .prop_map(|(dtype, other)| [dtype, other.unwrap_or(dtype)]);
    (sizes, other, dtypes, prop::option::weighted(0.3, 0usize..4), config, drop).prop_map(
        |((b, group, kv, sq, sk, d), other, dtypes, packed, config, drop)| {
            let k = vec![b, kv, sk, d];
            let v = other.unwrap_or_else(|| k.clone());
            Call { dims: [vec![b, group * kv, sq, d], k, v], dtypes, packed, config, drop }
        },
    )
}

#[test]
fn a_call_succeeds_or_fails_but_never_panics() {
    let config = ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() };
    let successes = Cell::new(0);
    let outcome = TestRunner::new(config).run(&call(), |call| {
        let Call { dims, dtypes, packed, config, drop } = call;
        let ones = |dims: &[usize], dtype| Var::ones(dims, dtype, &Device::Cpu).unwrap();
        let [q, k, v] = [0, 1, 2].map(|i| ones(&dims[i], dtypes[usize::from(i == 2)]));
        let (o, vars, shape) = match packed {
            None => (attention(&q, &k, &v, &config, &drop), vec![&q, &k, &v], dims[0].clone()),
            Some(heads) => {
                let mut shape = dims[0].clone();
                shape[2] = heads;
                (attention_qkv(&q, heads, &config, &drop), vec![&q], shape)
            }
        };
        if let Ok(o) = o {
            prop_assert_eq!(o.dims(), shape);
            let grads = o.backward().unwrap();
            for var in vars {
                prop_assert_eq!(grads.get(var).unwrap().dims(), var.dims());
            }
            successes.set(successes.get() + 1);
        }
        Ok(())
    });
    outcome.unwrap();
    assert!(successes.get() > 100, "only {} calls succeeded", successes.get());
}
