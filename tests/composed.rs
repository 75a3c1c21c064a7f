//! Ops where there are no kernels, as on Metal: composed of candle's ops, with the mask of the law. `tests/ops.rs` has
//! each case of each op against its formula; here is what a composition is asked for beside that.

use std::sync::Arc;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_dropout::functional::{
    Activation, AttentionConfig, AttentionMask, CrossEntropyConfig, Norm, Reduction,
    StochasticDepth, activation_dropout, attention, attention_qkv, cross_entropy, drop_path,
    drop_path_add, drop_path_kept, dropout, dropout_add, dropout_add_norm, softmax_dropout,
};
use candle_dropout::training::{
    AdamW, LossScale, NamedVars, Optimizer, ParamGroup, ParamsAdamW, check_gradients,
    clip_grad_norm, named_vars,
};
use candle_dropout::{
    DropMask, GenerationConfig, MaskGenerator, Transformer, TransformerConfig, compose,
    seeded_var_builder,
};
use candle_nn::VarMap;
use cases::{DTYPES, bits, error, largest, mask, random};

/// What `f` gives by the passes of this crate, and composed.
fn both<T>(f: impl Fn() -> Result<T>) -> Result<[T; 2]> {
    let fused = f()?;
    let _composed = compose();
    Ok([fused, f()?])
}

/// The gradients of `Σ y * dy`, in f64.
fn gradients(y: &Tensor, dy: &Tensor, vars: &[&Var]) -> Result<Vec<Tensor>> {
    let grads = (y * dy)?.backward()?;
    let grad = |var: &&Var| grads.get(var).expect("a gradient").to_dtype(DType::F64);
    vars.iter().map(grad).collect()
}

#[test]
fn what_is_dropped_is_what_the_law_drops_in_a_window_too() -> Result<()> {
    let _composed = compose();
    let dims = [2, 3, 5, 11];
    let window = mask(0.4).window(&[4, 3, 9, 30], &[1, 0, 4, 13]);
    for (drop, dtype) in
        [mask(0.4), window].iter().flat_map(|drop| DTYPES.map(|dtype| (drop, dtype)))
    {
        let kept = bits(&drop.to_tensor(&dims, &Device::Cpu)?)?;
        let (ones, zeros) =
            (Tensor::ones(&dims, dtype, &Device::Cpu)?, Tensor::zeros(&dims, dtype, &Device::Cpu)?);
        let norm = Norm::rms_norm(Tensor::ones(11, dtype, &Device::Cpu)?, 1e-5);
        let glu = Tensor::cat(&[&ones, &ones], 3)?;
        let keys = Tensor::zeros((2, 3, 11, 11), dtype, &Device::Cpu)?;
        // Values whose columns pick one key each: the result is the weights themselves.
        let values = Tensor::eye(11, dtype, &Device::Cpu)?.broadcast_as((2, 3, 11, 11))?;
        let config = AttentionConfig::default();
        for (op, y) in [
            ("dropout", dropout(&ones, drop)?),
            ("dropout_add", dropout_add(&ones, &zeros, None, drop)?),
            ("dropout_add_norm", dropout_add_norm(&ones, Some(&zeros), None, &norm, drop)?.0),
            ("activation", activation_dropout(&ones, None, Activation::Sigmoid, drop)?),
            ("gated", activation_dropout(&glu, None, Activation::Glu, drop)?),
            ("softmax", softmax_dropout(&zeros, 1., &AttentionMask::None, drop)?),
            ("attention", attention(&zeros, &keys, &values, &config, drop)?),
        ] {
            assert_eq!(bits(&y.ne(0.)?)?, kept, "{op} in {dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn samples_are_dropped_as_the_law_drops_them_and_their_branch_is_not_computed() -> Result<()> {
    let _composed = compose();
    let x = Var::ones((9, 4), DType::F32, &Device::Cpu)?;
    let residual = Var::from_tensor(&Tensor::full(-0f32, (9, 4), &Device::Cpu)?)?;
    for drop in [mask(0.4), mask(0.4).window(&[1, 30], &[0, 7]), mask(1.)] {
        let keep = drop.to_tensor((1, 9), &Device::Cpu)?.reshape((9, 1))?;
        let expected = bits(&keep.broadcast_as((9, 4))?)?;
        let row = StochasticDepth::Row;
        let branch = |kept: &Tensor| {
            assert_eq!(kept.dim(0)? as u64, bits(&keep)?.iter().sum::<u64>());
            Ok(kept.clone())
        };
        for y in [
            drop_path(&x, row, &drop)?,
            drop_path_add(&x, &residual, row, &drop)?,
            drop_path_kept(&x, &residual, row, &drop, branch)?,
        ] {
            assert_eq!(bits(&y.ne(0.)?)?, expected);
            let [dx] = &gradients(&y, &y.ones_like()?, &[&x])?[..] else { panic!("one") };
            assert_eq!(bits(&dx.ne(0.)?)?, expected, "dx");
        }
        // The bare residual: a -0 stays one.
        let y = drop_path_kept(&x, &residual, row, &drop, branch)?;
        for (y, kept) in y.flatten_all()?.to_vec1::<f32>()?.iter().zip(&expected) {
            assert!(*kept == 1 || y.to_bits() == (-0f32).to_bits(), "{y}");
        }
    }
    Ok(())
}

#[test]
fn every_activation_and_its_gradients_are_those_of_the_pass() -> Result<()> {
    use Activation::*;
    let plain = [GeluTanh, GeluErf, Silu, Relu, QuickGelu, Relu2, Tanh, Sigmoid];
    let gated = [SwiGlu, GeGlu, GeGluErf, ReGlu, QuickGeGlu, Relu2Glu, TanhGlu, Glu];
    for activation in plain.into_iter().chain(gated) {
        let x = random(&[7, 26], DType::F32, 1)?;
        // Where sigmoids are flat, squares infinite and slopes those of a kink.
        let ends = Tensor::new(&[-1e30f32, -300., -20., 0., -0., 20., 300., 1e30], &Device::Cpu)?;
        let x = Var::from_tensor(&x.slice_assign(&[0..1, 0..8], &ends.reshape((1, 8))?)?)?;
        let bias = Var::from_tensor(&Tensor::zeros(26, DType::F32, &Device::Cpu)?)?;
        let [fused, composed] = both(|| {
            let y = activation_dropout(&x, Some(&bias), activation, &mask(0.3))?;
            let dy = random(y.dims(), DType::F32, 2)?;
            let grads = gradients(&y, &dy, &[&x, &bias])?;
            Ok([vec![y.to_dtype(DType::F64)?], grads].concat())
        })?;
        for (i, (fused, composed)) in fused.iter().zip(&composed).enumerate() {
            let pairs = fused.flatten_all()?.to_vec1::<f64>()?;
            let pairs = pairs.into_iter().zip(composed.flatten_all()?.to_vec1::<f64>()?);
            for (a, b) in pairs {
                // Factors of up to 16 in each of some ten roundings.
                let is_close =
                    a == b || (a - b).abs() <= 256. * f64::from(f32::EPSILON) * a.abs().max(1.);
                assert!(is_close, "{activation:?}, result {i}: {a} and composed {b}");
            }
        }
    }
    Ok(())
}

#[test]
fn packed_heads_and_every_limit_of_attention_are_those_of_the_pass() -> Result<()> {
    let (b, s, h, kv, d) = (2, 9, 4, 2, 6);
    let config = AttentionConfig {
        causal: true,
        window: Some((5, 2)),
        softcap: Some(3.),
        // Of the first sample no query sees a key.
        key_lengths: Some(Tensor::new(&[0u32, 7], &Device::Cpu)?),
        alibi_slopes: Some(Tensor::new(&[0.5f32, 0.25, 0.125, 0.0625], &Device::Cpu)?),
        scale: Some(0.4),
        drop_key: true,
    };
    let qkv = Var::from_tensor(&random(&[b, s, h + 2 * kv, d], DType::F32, 1)?)?;
    let dout = random(&[b, s, h, d], DType::F32, 2)?;
    let [fused, composed] = both(|| {
        let o = attention_qkv(&qkv, h, &config, &mask(0.2))?;
        Ok([o.to_dtype(DType::F64)?, gradients(&o, &dout, &[&qkv])?.remove(0)])
    })?;
    for (fused, composed) in fused.iter().zip(&composed) {
        assert!(error(fused, composed)? <= 64. * f64::from(f32::EPSILON) * largest(fused)?);
        assert_eq!(largest(&composed.get(0)?)?, 0., "a sample without keys");
    }
    Ok(())
}

#[test]
fn what_lies_beyond_the_length_of_a_sample_reaches_nothing() -> Result<()> {
    let _composed = compose();
    let config = AttentionConfig {
        key_lengths: Some(Tensor::new(&[3u32, 5], &Device::Cpu)?),
        ..Default::default()
    };
    let q = Var::from_tensor(&random(&[2, 2, 4, 3], DType::F32, 1)?)?;
    let clean = [random(&[2, 2, 5, 3], DType::F32, 2)?, random(&[2, 2, 5, 3], DType::F32, 3)?];
    let padding = Tensor::full(f32::NAN, (1, 2, 2, 3), &Device::Cpu)?;
    let spoil = |x: &Tensor| x.slice_assign(&[0..1, 0..2, 3..5, 0..3], &padding);
    let results = |[k, v]: [Tensor; 2]| -> Result<Vec<Tensor>> {
        let (k, v) = (Var::from_tensor(&k)?, Var::from_tensor(&v)?);
        let o = attention(&q, &k, &v, &config, &DropMask::none())?;
        let grads = gradients(&o, &random(&[2, 2, 4, 3], DType::F32, 4)?, &[&q, &k, &v])?;
        Ok([vec![o], grads].concat())
    };
    let spoiled = results([spoil(&clean[0])?, spoil(&clean[1])?])?;
    for (i, (spoiled, clean)) in spoiled.iter().zip(results(clean)?).enumerate() {
        assert_eq!(bits(spoiled)?, bits(&clean)?, "result {i}");
    }
    Ok(())
}

#[test]
fn rows_that_see_nothing_and_all_that_is_dropped_give_zeros_and_zero_gradients() -> Result<()> {
    let _composed = compose();
    let scores = Var::from_tensor(&random(&[3, 4], DType::F32, 1)?)?;
    let nothing = Tensor::full(f32::NEG_INFINITY, (3, 4), &Device::Cpu)?;
    let nan = Var::from_tensor(&Tensor::full(f32::NAN, (3, 4), &Device::Cpu)?)?;
    let all = DropMask::none();
    for (scores, y) in [
        (&scores, softmax_dropout(&scores, 1., &AttentionMask::Additive(nothing), &all)?),
        (&nan, softmax_dropout(&nan, 1., &AttentionMask::Causal, &mask(1.))?),
    ] {
        let dscores = &gradients(&y, &y.ones_like()?, &[scores])?[0];
        assert_eq!([largest(&y.to_dtype(DType::F64)?)?, largest(dscores)?], [0.; 2]);
    }
    // More queries than keys: the first see none.
    let y = softmax_dropout(&scores.t()?, 0.5, &AttentionMask::Causal, &all)?;
    assert_eq!(y.get(0)?.to_vec1::<f32>()?, [0.; 3]);
    // A probability of 0 passes nothing on, whatever arrives there.
    let far = Var::new(&[0f32, -200.], &Device::Cpu)?;
    let y = softmax_dropout(&far, 1., &AttentionMask::None, &all)?;
    assert_eq!(y.to_vec1::<f32>()?, [1., 0.]);
    let dy = Tensor::new(&[1f32, f32::INFINITY], &Device::Cpu)?;
    assert_eq!(gradients(&y, &dy, &[&far])?[0].to_vec1::<f64>()?, [0.; 2]);
    Ok(())
}

#[test]
fn losses_count_what_counts_wherever_the_logits_are() -> Result<()> {
    let targets = Tensor::new(&[2i64, -100, 0, 3], &Device::Cpu)?;
    let logits = random(&[4, 5], DType::F32, 1)?;
    for (offset, label_smoothing, z_loss, reduction) in [
        (0., 0., 0., Reduction::Mean),
        (-30_000., 0.1, 0., Reduction::Sum),
        (500., 1., 0.02, Reduction::Mean),
    ] {
        let config =
            CrossEntropyConfig { label_smoothing, z_loss, reduction, ..Default::default() };
        let x = Var::from_tensor(&(&logits + offset)?)?;
        let [fused, composed] = both(|| {
            let loss = cross_entropy(&x, &targets, &config)?;
            Ok([loss.to_dtype(DType::F64)?, gradients(&loss, &loss.ones_like()?, &[&x])?.remove(0)])
        })?;
        for (fused, composed) in fused.iter().zip(&composed) {
            let bound = 32. * f64::from(f32::EPSILON) * largest(fused)?.max(1.);
            assert!(
                error(fused, composed)? <= bound,
                "{config:?}: {fused} and composed {composed}"
            );
        }
    }

    let _composed = compose();
    let config = CrossEntropyConfig::default();
    // Ignored rows may hold anything; so may all of them.
    let nan = Tensor::full(f32::NAN, (1, 5), &Device::Cpu)?;
    let x = Var::from_tensor(&logits.slice_assign(&[1..2, 0..5], &nan)?)?;
    let loss = cross_entropy(&x, &targets, &config)?;
    let clean = cross_entropy(&logits, &targets, &config)?;
    assert_eq!(loss.to_scalar::<f32>()?, clean.to_scalar::<f32>()?);
    let dx = gradients(&loss, &loss.ones_like()?, &[&x])?.remove(0);
    assert_eq!(dx.get(1)?.to_vec1::<f64>()?, [0.; 5]);
    assert!(largest(&dx)?.is_finite());
    let loss = cross_entropy(&x, &Tensor::full(-100i64, 4, &Device::Cpu)?, &config)?;
    assert_eq!(loss.to_scalar::<f32>()?, 0.);
    assert_eq!(largest(&gradients(&loss, &loss.ones_like()?, &[&x])?[0])?, 0.);
    // A class that is masked has no part in it, and a target that is no class makes NaN of its row alone.
    let masked = Tensor::full(f32::NEG_INFINITY, (4, 1), &Device::Cpu)?;
    let x = Var::from_tensor(&Tensor::cat(&[&logits, &masked], 1)?)?;
    let loss = cross_entropy(&x, &targets, &config)?;
    assert_eq!(loss.to_scalar::<f32>()?, clean.to_scalar::<f32>()?);
    let dx = gradients(&loss, &loss.ones_like()?, &[&x])?.remove(0);
    assert_eq!(dx.narrow(1, 5, 1)?.flatten_all()?.to_vec1::<f64>()?, [0.; 4]);
    let wrong = Tensor::new(&[6i64, -100, -1, 3], &Device::Cpu)?;
    let loss = cross_entropy(&x, &wrong, &config)?;
    assert!(loss.to_scalar::<f32>()?.is_nan());
    let dx = gradients(&loss, &loss.ones_like()?, &[&x])?.remove(0).to_vec2::<f64>()?;
    let is_nan = dx.iter().map(|row| row[0].is_nan()).collect::<Vec<_>>();
    assert_eq!(is_nan, [true, false, true, false]);
    Ok(())
}

#[test]
fn rows_far_from_0_keep_their_digits() -> Result<()> {
    let _composed = compose();
    let cols = 768;
    let norm = |eps| -> Result<Norm> {
        let one = Tensor::ones(cols, DType::F32, &Device::Cpu)?;
        Ok(Norm::layer_norm(one.clone(), Some(one), eps))
    };
    // Of a constant row exactly the bias is left, even where the sum of the row is no number.
    for value in [1972.7168f32, 1.59e5, -3e6, 1e38] {
        let n = norm(1e-5)?.forward(&Tensor::full(value, (1, cols), &Device::Cpu)?)?;
        assert_eq!(n.flatten_all()?.to_vec1::<f32>()?, vec![1.; cols], "{value}");
    }
    // The steps of a row at 1000 are exact in f32, and so is what is left of it without its mean.
    let steps: Vec<f32> = (0..cols).map(|i| (i * 31 % cols) as f32 / 1024.).collect();
    let near = Tensor::new(steps, &Device::Cpu)?.unsqueeze(0)?;
    let (n, far) = (norm(0.)?.forward(&near)?, norm(0.)?.forward(&(&near + 1024.)?)?);
    let apart = error(&n.to_dtype(DType::F64)?, &far.to_dtype(DType::F64)?)?;
    assert!(apart <= 16. * f64::from(f32::EPSILON), "{apart}");
    Ok(())
}

#[test]
fn adamw_goes_step_by_step_as_its_pass_does() -> Result<()> {
    for (dtype, with_master) in
        [(DType::F32, false), (DType::F64, false), (DType::F16, true), (DType::BF16, false)]
    {
        let [fused, composed] = both(|| {
            let matrix = Var::from_tensor(&random(&[5, 7], dtype, 1)?)?;
            let number = Var::from_tensor(&Tensor::new(0.5f32, &Device::Cpu)?.to_dtype(dtype)?)?;
            let vars = [("matrix", &matrix), ("number", &number)];
            let vars: NamedVars =
                vars.iter().map(|(name, var)| (name.to_string(), (*var).clone())).collect();
            let groups = vec![ParamGroup::new(&vars)];
            let mut adamw =
                AdamW::from_groups(groups, ParamsAdamW { lr: 0.1, ..Default::default() })?
                    .with_clip_norm(0.7)?;
            if with_master {
                adamw = adamw.with_master_weights()?.with_loss_scale(LossScale::dynamic())?;
            }
            for _ in 0..5 {
                let sum = matrix.to_dtype(DType::F32)?.sqr()?.sum_all()?;
                adamw.backward_step(&(sum + number.to_dtype(DType::F32)?.sqr()?)?)?;
            }
            let mut state: Vec<Tensor> = adamw.state()?.into_values().collect();
            state.extend(vars.into_values().map(|var| var.as_tensor().copy().expect("a copy")));
            state.iter().map(|x| x.to_dtype(DType::F64)).collect::<Result<Vec<_>>>()
        })?;
        assert_eq!(fused.len(), composed.len());
        for (i, (fused, composed)) in fused.iter().zip(&composed).enumerate() {
            assert_eq!(error(fused, composed)?, 0., "{dtype:?}, tensor {i}");
        }
    }
    Ok(())
}

#[test]
fn a_model_trains_and_generates_as_it_does_by_kernels() -> Result<()> {
    let gpt2 = TransformerConfig {
        vocab_size: 17,
        max_position_embeddings: 16,
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        drop_path_rate: 0.2,
        ..TransformerConfig::gpt2()
    };
    let gpt2 = gpt2.with_dropout(0.1);
    let llama = TransformerConfig {
        vocab_size: 17,
        max_position_embeddings: 16,
        hidden_size: 16,
        intermediate_size: Some(24),
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        ..TransformerConfig::llama()
    };
    let llama = llama.with_dropout(0.1);
    for config in [gpt2, llama] {
        let [fused, composed] = both(|| {
            let map = VarMap::new();
            let vb = seeded_var_builder(&map, 3, DType::F32, &Device::Cpu);
            let model = Transformer::new(&config, Arc::new(MaskGenerator::new(4)), vb)?;
            let vars = named_vars(&map)?;
            let mut adamw = AdamW::new_lr(map.all_vars(), 3e-3)?;
            let mut losses = Vec::new();
            for step in 0..20u32 {
                let ids: Vec<u32> =
                    (0..8 * 13).map(|at| (at / 13 + at % 13 * (step % 2 + 1)) % 17).collect();
                let ids = Tensor::from_vec(ids, (8, 13), &Device::Cpu)?;
                let logits = model.forward(&ids.narrow(1, 0, 12)?.contiguous()?, true)?;
                let loss =
                    cross_entropy(&logits, &ids.narrow(1, 1, 12)?, &CrossEntropyConfig::default())?;
                let mut grads = loss.backward()?;
                check_gradients(&vars, &grads)?;
                clip_grad_norm(&vars, &mut grads, 1.)?;
                adamw.step(&grads)?;
                losses.push(loss.to_scalar::<f32>()?);
            }
            let greedy =
                GenerationConfig { temperature: 0., max_new_tokens: 20, ..Default::default() };
            Ok((losses, model.generate(&[1, 2, 3], &greedy)?))
        })?;
        for (step, (a, b)) in fused.0.iter().zip(&composed.0).enumerate() {
            assert!((a - b).abs() < 1e-4, "step {step}: loss {a}, composed {b}");
        }
        assert!(composed.0[19] < composed.0[0], "the loss did not fall: {:?}", composed.0);
        assert_eq!(fused.1, composed.1);
    }
    Ok(())
}

#[test]
fn scores_scaled_by_0_have_a_gradient_of_zeros() -> Result<()> {
    let _composed = compose();
    let scores = Var::from_tensor(&random(&[2, 3, 4], DType::F32, 1)?)?;
    let y = softmax_dropout(&scores, 0., &AttentionMask::None, &DropMask::none())?;
    assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [0.25; 24]);
    let slopes = random(&[2, 3, 4], DType::F32, 2)?;
    let grads = (y * slopes)?.sum_all()?.backward()?;
    assert_eq!(grads.get(&scores).unwrap().flatten_all()?.to_vec1::<f32>()?, [0.; 24]);

    let dims = [1, 2, 3, 4];
    let [q, k, v] =
        [1, 2, 3].map(|seed| Var::from_tensor(&random(&dims, DType::F32, seed).unwrap()).unwrap());
    let config = AttentionConfig { scale: Some(0.), ..Default::default() };
    let o = attention(&q, &k, &v, &config, &DropMask::none())?;
    let grads = o.sqr()?.sum_all()?.backward()?;
    for x in [&q, &k] {
        assert_eq!(grads.get(x).unwrap().flatten_all()?.to_vec1::<f32>()?, [0.; 24]);
    }
    assert!(grads.get(&v).is_some());
    Ok(())
}
