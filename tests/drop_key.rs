//! DropKey: what is kept of a row sums to 1, what is dropped reaches nothing, and the mask is that of the law; in the
//! op that returns weights, in attention and in its layer.
//!
//! One text, since the three are held to the same facts.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{
    AttentionConfig, AttentionMask, attention, dropout, softmax_drop_key, softmax_dropout,
};
use candle_dropout::{
    DropMask, MaskGenerator, MaskKey, MaskState, MultiHeadAttention, MultiHeadAttentionConfig,
    compose, seeded_var_builder,
};
use candle_nn::VarMap;
use cases::attention::{Sizes, sizes};
use cases::runner::{gradient, same_bits};
use cases::softmax_dropout::SCALE;
use cases::{DTYPES, bits, epsilon, error, largest, mask, random};

const NONE: AttentionMask = AttentionMask::None;

fn drop_key() -> AttentionConfig {
    AttentionConfig { drop_key: true, ..Default::default() }
}

/// A fact of the passes and of what takes their place on devices without them.
fn as_passes_and_composed(fact: impl Fn() -> Result<()>) -> Result<()> {
    fact()?;
    let _composed = compose();
    fact()
}

/// Whether each row of a mask keeps a key.
fn keeps_a_key(keep: &Tensor) -> Result<Vec<bool>> {
    let cols = keep.dim(D::Minus1)?;
    Ok(bits(keep)?.chunks(cols).map(|row| row.contains(&1)).collect())
}

// ---- statistics ----

#[test]
fn the_weights_of_a_row_that_keeps_a_key_sum_to_1() -> Result<()> {
    as_passes_and_composed(|| {
        for dtype in DTYPES {
            let (drop, dims) = (mask(0.7), [500, 5]);
            let scores = random(&dims, dtype, 1)?;
            let y = softmax_drop_key(&scores, SCALE, &NONE, &drop)?.to_dtype(DType::F64)?;
            let sums = y.sum(D::Minus1)?.to_vec1::<f64>()?;
            let keeps = keeps_a_key(&drop.to_tensor(&dims, &Device::Cpu)?)?;
            for (sum, keeps) in sums.iter().zip(&keeps) {
                let expected = if *keeps { 1. } else { 0. };
                assert!((sum - expected).abs() <= 5. * epsilon(dtype), "{dtype:?}: {sum}");
            }
            // 0.7^5 of the rows keep none.
            let blind = keeps.iter().filter(|keeps| !**keeps).count();
            assert!((40..=130).contains(&blind), "{blind} of 500");
        }
        Ok(())
    })
}

/// Of n equal scores, each kept with probability q, the kept ones are 1 / K for the K that are kept. So by symmetry
/// E[y] = (1 - (1 - q)^n) / n and E[y²] = E[1 / K; K > 0] / n.
#[test]
fn the_expectation_of_equal_weights_is_that_of_the_binomial() -> Result<()> {
    const ROWS: usize = 20_000;
    for (keys, drop_p) in [(2usize, 0.5f32), (3, 0.7), (8, 0.1), (13, 0.3)] {
        let drop = mask(drop_p);
        let q = 1. / f64::from(drop.rate().scale());
        let scores = Tensor::zeros((ROWS, keys), DType::F64, &Device::Cpu)?;
        let y = softmax_drop_key(&scores, 1., &NONE, &drop)?;
        let means = y.mean(0)?.to_vec1::<f64>()?;
        let choose = |k: usize| (0..k).map(|i| (keys - i) as f64 / (k - i) as f64).product::<f64>();
        let probability =
            |k: usize| choose(k) * q.powi(k as i32) * (1. - q).powi((keys - k) as i32);
        let expected = (1. - probability(0)) / keys as f64;
        let square: f64 = (1..=keys).map(|k| probability(k) / (k * keys) as f64).sum();
        let deviation = ((square - expected * expected) / ROWS as f64).sqrt();
        for mean in means {
            let z = (mean - expected) / deviation;
            assert!(z.abs() < 5., "{keys} keys at {drop_p}: z = {z}");
        }
    }
    Ok(())
}

/// Two keys with the weights 1/4 and 3/4: E[y] = q² p + q (1 - q), not p as with the dropout of weights.
#[test]
fn the_expectation_of_two_weights_is_that_of_the_four_masks() -> Result<()> {
    const ROWS: usize = 40_000;
    let drop = mask(0.3);
    let q = 1. / f64::from(drop.rate().scale());
    let scores = Tensor::new(&[[0f64, 3f64.ln()]], &Device::Cpu)?.broadcast_as((ROWS, 2))?;
    let means = softmax_drop_key(&scores, 1., &NONE, &drop)?.mean(0)?.to_vec1::<f64>()?;
    for (mean, p) in means.into_iter().zip([0.25, 0.75]) {
        let (expected, square) = (q * q * p + q * (1. - q), q * q * p * p + q * (1. - q));
        let z = (mean - expected) / ((square - expected * expected) / ROWS as f64).sqrt();
        assert!(z.abs() < 5., "weight {p}: z = {z}");
    }
    Ok(())
}

/// Attention to values that are all 1 is the sum of its weights.
#[test]
fn attention_to_ones_is_1_wherever_a_key_is_kept() -> Result<()> {
    as_passes_and_composed(|| {
        let sizes = sizes([2, 4, 2, 70, 3, 8]);
        for dtype in DTYPES {
            let (q, k) = (random(&sizes.q(), dtype, 1)?, random(&sizes.k(), dtype, 2)?);
            let (v, drop) = (k.ones_like()?, mask(0.6));
            let o = attention(&q, &k, &v, &drop_key(), &drop)?.to_dtype(DType::F64)?;
            let rows = o.flatten_to(2)?.to_vec2::<f64>()?;
            let keeps = keeps_a_key(&drop.to_tensor(&sizes.scores(), &Device::Cpu)?)?;
            assert!(keeps.contains(&false));
            for (row, keeps) in rows.iter().zip(keeps) {
                let expected = if keeps { 1. } else { 0. };
                assert!(row.iter().all(|o| (o - expected).abs() <= 4. * epsilon(dtype)));
            }
        }
        Ok(())
    })
}

// ---- the mask ----

#[test]
fn the_mask_is_that_of_dropout() -> Result<()> {
    as_passes_and_composed(|| {
        for dtype in DTYPES {
            let scores = random(&[2, 3, 37, 41], dtype, 1)?;
            let drop = mask(0.4);
            let dropped = dropout(&scores.ones_like()?, &drop)?.eq(0.)?;
            let y = softmax_drop_key(&scores, SCALE, &NONE, &drop)?;
            same_bits(&y.eq(0.)?, &dropped, "mask")?;
        }
        Ok(())
    })
}

/// Algorithm 1 of the paper adds -1e12 to the logits of dropped keys.
#[test]
fn it_is_the_algorithm_of_the_paper() -> Result<()> {
    let (scores, drop) = (random(&[3, 2, 17, 29], DType::F64, 1)?, mask(0.3));
    let keep = drop.to_tensor(scores.shape(), &Device::Cpu)?.to_dtype(DType::F64)?;
    let logits = ((&scores * SCALE)? + keep.affine(1e12, -1e12)?)?;
    let expected = candle_nn::ops::softmax(&logits, D::Minus1)?;
    let y = softmax_drop_key(&scores, SCALE, &NONE, &drop)?;
    assert!(error(&y, &expected)? < 1e-14);
    Ok(())
}

#[test]
fn attention_drops_the_keys_that_the_op_drops() -> Result<()> {
    let sizes = sizes([2, 3, 3, 65, 131, 131]);
    let (q, k) = (random(&sizes.q(), DType::F64, 1)?, random(&sizes.k(), DType::F64, 2)?);
    let config = AttentionConfig { causal: true, scale: Some(0.1), ..drop_key() };
    let one_hot = Tensor::eye(sizes.sk, DType::F64, &Device::Cpu)?
        .broadcast_as((sizes.b, sizes.kv, sizes.sk, sizes.sk))?;
    let y = attention(&q, &k, &one_hot.contiguous()?, &config, &mask(0.4))?;
    let scores = q.matmul(&k.t()?.contiguous()?)?;
    let expected = softmax_drop_key(&scores, 0.1, &AttentionMask::Causal, &mask(0.4))?;
    same_bits(&y.eq(0.)?, &expected.eq(0.)?, "mask")?;
    assert!(error(&y, &expected)? < 1e-13);
    Ok(())
}

#[test]
fn parts_of_scores_with_their_windows_make_up_the_whole() -> Result<()> {
    let (dims, drop) = ([3, 4, 10, 23], mask(0.4));
    let (scores, dy) = (random(&dims, DType::F32, 1)?, random(&dims, DType::F32, 2)?);
    let results = |scores: &Tensor, dy: &Tensor, drop: &DropMask| -> Result<[Tensor; 2]> {
        let scores = Var::from_tensor(scores)?;
        let y = softmax_drop_key(&scores, SCALE, &NONE, drop)?;
        Ok([y.clone(), gradient(&y, dy, &scores)?])
    };
    let whole = results(&scores, &dy, &drop)?;
    for (dim, from, len) in [(0, 1, 2), (1, 2, 2), (2, 3, 5)] {
        let mut start = [0; 4];
        start[dim] = from;
        let cut = |x: &Tensor| x.narrow(dim, from, len)?.contiguous();
        let part = results(&cut(&scores)?, &cut(&dy)?, &drop.window(&dims, &start))?;
        for (part, whole) in part.iter().zip(&whole) {
            same_bits(part, &cut(whole)?, &format!("dimension {dim}"))?;
        }
    }
    // From a key on that begins no call.
    let drop = mask(0.4).window(&[3, 4, 10, 26], &[0, 0, 0, 3]);
    let y = softmax_drop_key(&scores, SCALE, &NONE, &drop)?;
    let whole = mask(0.4).to_tensor((3, 4, 10, 26), &Device::Cpu)?;
    same_bits(&y.ne(0.)?, &whole.narrow(3, 3, 23)?, "mask")
}

#[test]
fn parts_of_attention_with_their_windows_make_up_the_whole() -> Result<()> {
    let (sizes, drop) = (sizes([3, 6, 3, 130, 70, 32]), mask(0.4));
    let (q, k) = (random(&sizes.q(), DType::F32, 1)?, random(&sizes.k(), DType::F32, 2)?);
    let (v, dout) = (random(&sizes.k(), DType::F32, 3)?, random(&sizes.q(), DType::F32, 4)?);
    let results = |[q, k, v, dout]: [&Tensor; 4], drop: &DropMask| -> Result<[Tensor; 2]> {
        let q = Var::from_tensor(q)?;
        let o = attention(&q, k, v, &drop_key(), drop)?;
        Ok([o.clone(), gradient(&o, dout, &q)?])
    };
    let whole = results([&q, &k, &v, &dout], &drop)?;
    // Heads, two queries a key head.
    let (q, dout) = (q.narrow(1, 2, 4)?, dout.narrow(1, 2, 4)?);
    let (k, v) = (k.narrow(1, 1, 2)?, v.narrow(1, 1, 2)?);
    let part = results([&q, &k, &v, &dout], &drop.window(&sizes.scores(), &[0, 2, 0, 0]))?;
    for (part, whole) in part.iter().zip(&whole) {
        same_bits(part, &whole.narrow(1, 2, 4)?.contiguous()?, "heads")?;
    }
    Ok(())
}

// ---- what is dropped vanishes ----

/// NaN and both infinities where `keep` is 0, and the elements of `x` elsewhere.
fn poisoned(x: &Tensor, keep: &Tensor) -> Result<Tensor> {
    let poison = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let poison: Vec<_> = (0..x.elem_count()).map(|i| poison[i % 3]).collect();
    let poison = Tensor::from_vec(poison, x.dims(), x.device())?.to_dtype(x.dtype())?;
    keep.where_cond(x, &poison)
}

#[test]
fn dropped_infinities_and_nans_reach_nothing() -> Result<()> {
    as_passes_and_composed(|| {
        for dtype in DTYPES {
            let (drop, dims) = (mask(0.4), [13, 41]);
            let keep = drop.to_tensor(&dims, &Device::Cpu)?;
            let clean = Var::from_tensor(&random(&dims, dtype, 1)?)?;
            let bad = Var::from_tensor(&poisoned(&clean, &keep)?)?;
            let dy = random(&dims, dtype, 2)?;
            let zeros = keep.where_cond(&dy, &dy.zeros_like()?)?;
            let y = softmax_drop_key(&clean, SCALE, &NONE, &drop)?;
            let from_bad = softmax_drop_key(&bad, SCALE, &NONE, &drop)?;
            same_bits(&from_bad, &y, "output")?;
            let grad = gradient(&from_bad, &poisoned(&dy, &keep)?, &bad)?;
            same_bits(&grad, &gradient(&y, &zeros, &clean)?, "gradient")?;
            let dropped = bits(&grad)?.into_iter().zip(bits(&keep)?).filter(|(_, keep)| *keep == 0);
            let magnitude = |bits: u64| bits << (64 - 8 * dtype.size_in_bytes()) << 1;
            assert!(dropped.map(|(dx, _)| magnitude(dx)).all(|dx| dx == 0), "an exact 0");
        }
        Ok(())
    })
}

/// On the CPU a weight of 0 passes nothing on, whatever it meets: keys and values that every query drops may be no
/// numbers, through a soft cap and slopes, too.
#[test]
fn keys_and_values_that_every_query_drops_reach_nothing() -> Result<()> {
    let (sizes, drop) = (sizes([1, 1, 1, 3, 40, 8]), mask(0.5));
    let keep = bits(&drop.to_tensor(&sizes.scores(), &Device::Cpu)?)?;
    let dropped = |key: usize| (0..3).all(|query| keep[query * 40 + key] == 0);
    let dropped: Vec<usize> = (0..40).filter(|key| dropped(*key)).collect();
    assert!(dropped.len() > 1);
    let alibi_slopes = Some(Tensor::new(&[0.1f32], &Device::Cpu)?);
    let bent = AttentionConfig { softcap: Some(2.), alibi_slopes, ..drop_key() };
    for (dtype, config) in DTYPES.into_iter().flat_map(|d| [(d, drop_key()), (d, bent.clone())]) {
        let spoiled = |x: Tensor| -> Result<Tensor> {
            let rows = (0..40).map(|row| match dropped.iter().position(|key| *key == row) {
                Some(at) => x.narrow(2, row, 1)? * [f64::NAN, f64::INFINITY][at % 2],
                None => x.narrow(2, row, 1),
            });
            Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 2)
        };
        let results = |k: Tensor, v: Tensor| -> Result<Vec<Tensor>> {
            let q = random(&sizes.q(), dtype, 1)?;
            let [q, k, v] = [q, k, v].map(|x| Var::from_tensor(&x).unwrap());
            let o = attention(&q, &k, &v, &config, &drop)?;
            let grads = (&o * random(&sizes.q(), dtype, 4)?)?.backward()?;
            Ok([vec![o], [&q, &k, &v].map(|x| grads.get(x).unwrap().clone()).to_vec()].concat())
        };
        let (k, v) = (random(&sizes.k(), dtype, 2)?, random(&sizes.k(), dtype, 3)?);
        let clean = results(k.clone(), v.clone())?;
        for (i, (bad, clean)) in results(spoiled(k)?, spoiled(v)?)?.iter().zip(&clean).enumerate() {
            same_bits(bad, clean, &format!("{i} of {config:?}"))?;
        }
        for grad in &clean[2..] {
            for key in &dropped {
                assert_eq!(largest(&grad.narrow(2, *key, 1)?.to_dtype(DType::F64)?)?, 0.);
            }
        }
    }
    Ok(())
}

#[test]
fn queries_whose_keys_are_all_dropped_give_zeros_and_zero_gradients() -> Result<()> {
    as_passes_and_composed(|| {
        let sizes = sizes([2, 2, 1, 40, 2, 8]);
        for dtype in DTYPES {
            let drop = mask(0.6);
            let keeps = keeps_a_key(&drop.to_tensor(&sizes.scores(), &Device::Cpu)?)?;
            assert!(keeps.contains(&true) && keeps.contains(&false));
            let vars = [sizes.q(), sizes.k(), sizes.k()].into_iter().enumerate();
            let vars = vars.map(|(i, dims)| Var::from_tensor(&random(&dims, dtype, i as u64)?));
            let vars = vars.collect::<Result<Vec<_>>>()?;
            let o = attention(&vars[0], &vars[1], &vars[2], &drop_key(), &drop)?;
            let dq = gradient(&o, &random(&sizes.q(), dtype, 7)?, &vars[0])?;
            let scores = Var::from_tensor(&random(&sizes.scores(), dtype, 8)?)?;
            let y = softmax_drop_key(&scores, SCALE, &NONE, &drop)?;
            let dscores = gradient(&y, &random(&sizes.scores(), dtype, 9)?, &scores)?;
            for x in [&o, &dq, &y, &dscores] {
                let rows = x.flatten_to(2)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
                for (row, keeps) in rows.iter().zip(&keeps) {
                    assert!(row.iter().all(|x| x.is_finite()), "{dtype:?}");
                    assert!(*keeps || row.iter().all(|x| *x == 0.), "{dtype:?}");
                }
                assert!(rows.iter().flatten().any(|x| *x != 0.));
            }
        }
        Ok(())
    })
}

// ---- both ends of the rate ----

#[test]
fn at_p_1_all_is_0_even_from_nan() -> Result<()> {
    as_passes_and_composed(|| {
        let scores = Var::new(&[[f32::NAN, 1., 2.], [f32::INFINITY, 0., 1.]], &Device::Cpu)?;
        let y = softmax_drop_key(&scores, 1., &NONE, &mask(1.))?;
        assert_eq!(y.to_vec2::<f32>()?, [[0.; 3]; 2]);
        let grad = gradient(&y, &y.ones_like()?, &scores)?;
        assert_eq!(grad.to_vec2::<f32>()?, [[0.; 3]; 2]);
        let q = scores.reshape((1, 1, 2, 3))?;
        let o = attention(&q, &q, &q, &drop_key(), &mask(1.))?;
        assert_eq!(o.flatten_all()?.to_vec1::<f32>()?, [0.; 6]);
        let grad = gradient(&o, &o.ones_like()?, &scores)?;
        assert_eq!(grad.to_vec2::<f32>()?, [[0.; 3]; 2]);
        Ok(())
    })
}

#[test]
fn without_dropping_keys_and_weights_are_one() -> Result<()> {
    as_passes_and_composed(|| {
        for (dtype, drop) in DTYPES.into_iter().flat_map(|d| [(d, DropMask::none()), (d, mask(0.))])
        {
            let scores = Var::from_tensor(&random(&[5, 37], dtype, 1)?)?;
            let dy = random(&[5, 37], dtype, 2)?;
            let [keys, weights] = [softmax_drop_key, softmax_dropout].map(|op| {
                let y = op(&scores, SCALE, &AttentionMask::Causal, &drop)?;
                Ok::<_, candle_core::Error>([y.clone(), gradient(&y, &dy, &scores)?])
            });
            for (keys, weights) in keys?.iter().zip(&weights?) {
                same_bits(keys, weights, "softmax")?;
            }
            let q = Var::from_tensor(&random(&[1, 2, 9, 8], dtype, 3)?)?;
            let [keys, weights] = [true, false].map(|drop_key| {
                let config = AttentionConfig { drop_key, ..Default::default() };
                let o = attention(&q, &q, &q, &config, &drop)?;
                Ok::<_, candle_core::Error>([o.clone(), gradient(&o, &o.detach(), &q)?])
            });
            for (keys, weights) in keys?.iter().zip(&weights?) {
                same_bits(keys, weights, "attention")?;
            }
        }
        Ok(())
    })
}

#[test]
fn errors_name_the_op() -> Result<()> {
    let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
    let additive = AttentionMask::Additive(Tensor::zeros((2, 4), DType::F32, &Device::Cpu)?);
    let rank = mask(0.5).window(&[2], &[0]);
    for (result, expected) in [
        (softmax_drop_key(&x.to_dtype(DType::U32)?, 1., &NONE, &mask(0.5)), "scores: expected"),
        (softmax_drop_key(&x, f64::NAN, &NONE, &mask(0.5)), "scale: expected a finite f32"),
        (softmax_drop_key(&x, 1., &additive, &mask(0.5)), "mask: expected a shape"),
        (softmax_drop_key(&x, 1., &NONE, &rank), "drop.window: expected"),
    ] {
        let message = result.unwrap_err().to_string();
        assert!(message.starts_with(&format!("softmax_drop_key: {expected}")), "{message}");
    }
    Ok(())
}

// ---- the layer ----

/// The layer in f64, with keys or weights dropped, and what made it.
fn layer(drop_key: bool) -> Result<(MultiHeadAttention, std::sync::Arc<MaskGenerator>, VarMap)> {
    let config = MultiHeadAttentionConfig {
        hidden_size: 12,
        num_heads: 4,
        num_kv_heads: Some(2),
        head_dim: Some(5),
        drop_p: 0.3,
        attention: AttentionConfig { causal: true, drop_key, ..Default::default() },
        ..Default::default()
    };
    let (vars, keys) = (VarMap::new(), std::sync::Arc::new(MaskGenerator::new(7)));
    let vb = seeded_var_builder(&vars, 1, DType::F64, &Device::Cpu);
    Ok((MultiHeadAttention::new(&config, keys.clone(), vb)?, keys, vars))
}

#[test]
fn the_layer_drops_keys_in_training_alone() -> Result<()> {
    let (layer, keys, vars) = layer(true)?;
    let Sizes { b, h, kv, sq: s, d, .. } = sizes([2, 4, 2, 9, 9, 5]);
    let xs = random(&[b, s, 12], DType::F64, 1)?;
    let (trained, evaluated) = (layer.forward(&xs, true)?, layer.forward(&xs, false)?);
    assert_eq!(keys.state(), MaskState { seed: 7, counter: 1 }, "one key a call in training");

    let of = |name: &str| vars.data().lock().unwrap()[name].as_tensor().clone();
    let linear = |x: &Tensor, name: &str| {
        let weight = of(&format!("{name}.weight"));
        x.broadcast_matmul(&weight.t()?)?.broadcast_add(&of(&format!("{name}.bias")))
    };
    let qkv = linear(&xs, "qkv_proj")?.reshape((b, s, h + 2 * kv, d))?.transpose(1, 2)?;
    let part = |from, heads| qkv.narrow(1, from, heads)?.contiguous();
    let (q, k, v) = (part(0, h)?, part(h, kv)?, part(h + kv, kv)?);
    let config = AttentionConfig { causal: true, ..drop_key() };
    for (ours, drop) in
        [(trained, DropMask::new(0.3, MaskKey::derive(7, 0))?), (evaluated, DropMask::none())]
    {
        let keep = drop.to_tensor((b, h, s, s), &Device::Cpu)?;
        let o = cases::attention::formula(&q, &k, &v, &config, &keep, 1.)?;
        let expected = linear(&o.transpose(1, 2)?.reshape((b, s, h * d))?, "o_proj")?;
        assert!(error(&ours, &expected)? < 1e-12);
    }
    Ok(())
}

#[test]
fn the_layer_is_that_of_weights_in_evaluation() -> Result<()> {
    let xs = random(&[2, 9, 12], DType::F64, 1)?;
    let (keys, weights) = (layer(true)?.0, layer(false)?.0);
    same_bits(&keys.forward(&xs, false)?, &weights.forward(&xs, false)?, "evaluation")?;
    assert!(error(&keys.forward(&xs, true)?, &weights.forward(&xs, true)?)? > 1e-3);
    Ok(())
}
