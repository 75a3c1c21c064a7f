//! The GPT model: gradients, fused against unfused, saving, generation, refused configurations.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::{
    Activation, AttentionMask, DropMask, GenerationConfig, MaskGenerator, MaskKey, Norm,
    Transformer, TransformerConfig, reference, seeded_var_builder,
};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss::cross_entropy};

fn tiny() -> TransformerConfig {
    TransformerConfig {
        vocab_size: 17,
        max_position_embeddings: 12,
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        ..TransformerConfig::gpt2()
    }
    .with_dropout(0.1)
}

fn model(config: &TransformerConfig, seed: u64) -> Result<(Transformer, VarMap)> {
    let vars = VarMap::new();
    let vb = seeded_var_builder(&vars, seed, DType::F32, &Device::Cpu);
    Ok((Transformer::new(config, Arc::new(MaskGenerator::new(seed)), vb)?, vars))
}

/// Token ids `[b, t]` that follow a pattern a model can learn.
fn ids(b: usize, t: usize, step: usize) -> Result<Tensor> {
    let ids: Vec<u32> =
        (0..b * t).map(|at| ((at / t + (at % t) * (step + 1)) % 17) as u32).collect();
    Tensor::from_vec(ids, (b, t), &Device::Cpu)
}

fn loss(gpt: &Transformer, ids: &Tensor, train: bool) -> Result<Tensor> {
    let t = ids.dim(1)? - 1;
    let logits = gpt.forward(&ids.narrow(1, 0, t)?.contiguous()?, train)?;
    cross_entropy(&logits.flatten_to(1)?, &ids.narrow(1, 1, t)?.flatten_all()?)
}

#[test]
fn every_parameter_receives_a_finite_non_zero_gradient() -> Result<()> {
    for fused in [true, false] {
        for drop_path_rate in [0.0, 0.3] {
            let (gpt, vars) = model(&TransformerConfig { drop_path_rate, fused, ..tiny() }, 1)?;
            let grads = loss(&gpt, &ids(8, 13, 0)?, true)?.backward()?;
            for (name, var) in vars.data().lock().unwrap().iter() {
                let grad = grads
                    .get(var)
                    .unwrap_or_else(|| panic!("{name} has no gradient (fused: {fused})"));
                let grad = grad.flatten_all()?.to_vec1::<f32>()?;
                assert!(
                    grad.iter().all(|g| g.is_finite()),
                    "{name}: gradient not finite (fused: {fused})"
                );
                assert!(
                    grad.iter().any(|g| *g != 0.0),
                    "{name}: gradient is zero (fused: {fused})"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn activations_beyond_256_train_in_f16() -> Result<()> {
    for fused in [true, false] {
        let vars = VarMap::new();
        let vb = seeded_var_builder(&vars, 1, DType::F16, &Device::Cpu);
        let config = TransformerConfig { fused, ..tiny() };
        let gpt = Transformer::new(&config, Arc::new(MaskGenerator::new(1)), vb)?;
        let large: Vec<f32> = (0..64).map(|i| if i % 2 == 0 { 300. } else { -2000. }).collect();
        let large = Tensor::new(large, &Device::Cpu)?.to_dtype(DType::F16)?;
        let vars = vars.data().lock().unwrap();
        vars["h.0.mlp.c_fc.bias"].set(&large)?;

        let logits = gpt.forward(&ids(8, 12, 0)?, true)?.to_dtype(DType::F32)?.flatten_to(1)?;
        let grads = cross_entropy(&logits, &ids(8, 12, 1)?.flatten_all()?)?.backward()?;
        for (name, var) in vars.iter() {
            let grad = grads.get(var).unwrap().to_dtype(DType::F32)?.flatten_all()?;
            let finite = grad.to_vec1::<f32>()?.iter().all(|g| g.is_finite());
            assert!(finite, "{name}: gradient not finite (fused: {fused})");
        }
    }
    Ok(())
}

#[test]
fn fused_and_unfused_training_agree() -> Result<()> {
    let train = |fused| -> Result<Vec<f32>> {
        let (gpt, vars) = model(&TransformerConfig { drop_path_rate: 0.1, fused, ..tiny() }, 3)?;
        let mut adamw =
            AdamW::new(vars.all_vars(), ParamsAdamW { lr: 3e-3, ..Default::default() })?;
        let step = |step| {
            let loss = loss(&gpt, &ids(8, 13, step)?, true)?;
            adamw.backward_step(&loss)?;
            loss.to_scalar()
        };
        (0..20).map(step).collect()
    };
    let (fused, unfused) = (train(true)?, train(false)?);
    for (step, (a, b)) in fused.iter().zip(&unfused).enumerate() {
        assert!((a - b).abs() < 1e-4, "step {step}: loss {a} fused, {b} unfused");
    }
    assert!(fused[19] < fused[0], "the loss did not fall: {fused:?}");
    Ok(())
}

#[test]
fn the_same_masks_are_drawn_fused_or_not_and_none_in_evaluation() -> Result<()> {
    for (drop_p, drop_path_rate) in [(0.1, 0.1), (0.1, 0.0), (0.0, 0.0), (0.0, 0.5), (1.0, 1.0)] {
        let logits = |fused| -> Result<(Vec<f32>, u64)> {
            let config = TransformerConfig { drop_path_rate, fused, ..tiny().with_dropout(drop_p) };
            let vars = VarMap::new();
            let masks = Arc::new(MaskGenerator::new(5));
            let gpt = Transformer::new(
                &config,
                masks.clone(),
                seeded_var_builder(&vars, 5, DType::F32, &Device::Cpu),
            )?;
            gpt.forward(&ids(3, 12, 0)?, false)?;
            assert_eq!(masks.state().counter, 0, "evaluation drew a key");
            let logits = gpt.forward(&ids(3, 12, 0)?, true)?.flatten_all()?.to_vec1()?;
            Ok((logits, masks.state().counter))
        };
        let ((fused, keys), (unfused, unfused_keys)) = (logits(true)?, logits(false)?);
        assert_eq!((keys, unfused_keys), (11, 11), "1 + 5 num_hidden_layers keys a call");
        for (a, b) in fused.iter().zip(&unfused) {
            assert!(
                (a - b).abs() < 1e-5,
                "p {drop_p}, drop path {drop_path_rate}: {a} fused, {b} unfused"
            );
        }
    }
    Ok(())
}

/// The mask of every dropout site in the order of their keys, with the shape of what it drops.
fn sites(
    config: &TransformerConfig,
    seed: u64,
    (b, t): (usize, usize),
) -> Result<Vec<(DropMask, Vec<usize>)>> {
    let TransformerConfig { hidden_size: c, num_attention_heads: h, num_hidden_layers, .. } =
        *config;
    let mut sites = vec![(config.embd_pdrop, vec![b, t, c])];
    for layer in 1..=num_hidden_layers {
        let drop_path = config.drop_path_rate * layer as f32 / num_hidden_layers as f32;
        sites.extend([
            (config.attn_pdrop, vec![b, h, t, t]),
            (config.resid_pdrop, vec![b, t, c]),
            (drop_path, vec![1, b]),
            (config.resid_pdrop, vec![b, t, c]),
            (drop_path, vec![1, b]),
        ]);
    }
    let keyed = |(counter, (drop_p, dims)): (usize, (f32, Vec<usize>))| {
        Ok((DropMask::new(drop_p, MaskKey::derive(seed, counter as u64))?, dims))
    };
    sites.into_iter().enumerate().map(keyed).collect()
}

/// The logits of a GPT from the formulas, with these masks as (keep, scale).
fn reference_logits(
    config: &TransformerConfig,
    vars: &VarMap,
    ids: &Tensor,
    masks: &[(Tensor, f64)],
) -> Result<Tensor> {
    let vars = vars.data().lock().unwrap();
    let (b, t) = ids.dims2()?;
    let (c, h) = (config.hidden_size, config.num_attention_heads);
    let norm = |x: &Tensor, name: String| {
        let [weight, bias] = ["weight", "bias"].map(|v| vars[&format!("{name}.{v}")].as_tensor());
        let bias = Some(bias.clone());
        reference::norm(x, &Norm::layer_norm(weight.clone(), bias, config.norm_eps))
    };
    let linear = |x: &Tensor, name: String| {
        let [weight, bias] = ["weight", "bias"].map(|v| vars[&format!("{name}.{v}")].as_tensor());
        x.broadcast_matmul(weight)?.broadcast_add(bias)
    };
    let wte = vars["wte.weight"].as_tensor();
    let tokens = wte.index_select(&ids.flatten_all()?, 0)?.reshape((b, t, c))?;
    let x = tokens.broadcast_add(&vars["wpe.weight"].narrow(0, 0, t)?)?;
    let mut masks = masks.iter();
    let mut next = || masks.next().unwrap();
    let (keep, scale) = next();
    let mut x = reference::dropout(&x, keep, *scale)?;
    for layer in 0..config.num_hidden_layers {
        let qkv = linear(&norm(&x, format!("h.{layer}.ln_1"))?, format!("h.{layer}.attn.c_attn"))?;
        let qkv = qkv.chunk(3, 2)?;
        let heads = |x: &Tensor| x.reshape((b, t, h, c / h))?.transpose(1, 2)?.contiguous();
        let (q, k, v) = (heads(&qkv[0])?, heads(&qkv[1])?, heads(&qkv[2])?);
        let (keep, scale) = next();
        let scores = q.matmul(&k.t()?.contiguous()?)?;
        let of_key = 1. / ((c / h) as f64).sqrt();
        let weights =
            reference::softmax_dropout(&scores, of_key, &AttentionMask::Causal, keep, *scale)?;
        let y = weights.matmul(&v)?.transpose(1, 2)?.reshape((b, t, c))?;
        let mut add = |x: &Tensor, y: Tensor| {
            let ((keep, scale), (path_keep, path_scale)) = (next(), next());
            let y = reference::dropout(&y, keep, *scale)?;
            reference::drop_path_add(&y, x, path_keep, *path_scale)
        };
        x = add(&x, linear(&y, format!("h.{layer}.attn.c_proj"))?)?;
        let u = linear(&norm(&x, format!("h.{layer}.ln_2"))?, format!("h.{layer}.mlp.c_fc"))?;
        let all = Tensor::ones(u.shape(), DType::U8, &Device::Cpu)?;
        let y = reference::activation_dropout(&u, None, Activation::GeluTanh, &all, 1.)?;
        x = add(&x, linear(&y, format!("h.{layer}.mlp.c_proj"))?)?;
    }
    norm(&x, "ln_f".into())?.broadcast_matmul(&wte.t()?)
}

#[test]
fn every_site_drops_exactly_what_its_key_says_fused_or_not() -> Result<()> {
    let config = TransformerConfig {
        vocab_size: 7,
        max_position_embeddings: 5,
        num_attention_heads: 2,
        initializer_range: 0.3,
        drop_path_rate: 0.5,
        ..tiny()
    }
    .with_dropout(0.5);
    let ids = Tensor::new(&[[0u32, 5, 3, 3, 1], [6, 2, 4, 0, 5], [1, 1, 2, 6, 3]], &Device::Cpu)?;
    let (b, t) = ids.dims2()?;
    let seed = 11;
    let sites = sites(&config, seed, (b, t))?;
    let law = |(mask, dims): &(DropMask, Vec<usize>)| -> Result<(Tensor, f64)> {
        let keep = mask.to_tensor(dims.clone(), &Device::Cpu)?;
        Ok((keep, mask.rate().scale().into()))
    };
    let law = sites.iter().map(law).collect::<Result<Vec<_>>>()?;
    let difference = |a: &Tensor, b: &Tensor| -> Result<f64> {
        (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
    };

    // Logits and gradients of both forms are those of the formulas with the masks of the law.
    let vars = VarMap::new();
    let mut expected = None;
    for fused in [true, false] {
        let config = TransformerConfig { fused, ..config.clone() };
        let vb = seeded_var_builder(&vars, 1, DType::F64, &Device::Cpu);
        let masks = Arc::new(MaskGenerator::new(seed));
        let gpt = Transformer::new(&config, masks.clone(), vb)?;
        // Biases begin as zeros, and which of these are dropped does not show.
        for (name, var) in vars.data().lock().unwrap().iter() {
            if name.ends_with(".bias") && fused {
                let values = (0..var.elem_count()).map(|i| 0.1 + 0.07 * (i % 5) as f64).collect();
                var.set(&Tensor::from_vec(values, var.dims(), &Device::Cpu)?)?;
            }
        }
        let logits = gpt.forward(&ids, true)?;
        assert_eq!(masks.state().counter as usize, sites.len());
        let formula = reference_logits(&config, &vars, &ids, &law)?;
        let error = difference(&logits, &formula)?;
        assert!(error < 1e-9, "fused {fused}: logits off by {error:e}");
        let (grads, exact) = (logits.sqr()?.backward()?, formula.sqr()?.backward()?);
        for (name, var) in vars.data().lock().unwrap().iter() {
            let error = difference(grads.get(var).unwrap(), exact.get(var).unwrap())?;
            assert!(error < 1e-7, "fused {fused}: gradient of {name} off by {error:e}");
        }
        expected = Some(formula.detach());
    }

    // And a single wrong element of any mask would show.
    let expected = expected.unwrap();
    let mut flips = 0;
    for (site, (keep, _)) in law.iter().enumerate() {
        let dims = keep.dims().to_vec();
        let bits = keep.flatten_all()?.to_vec1::<u8>()?;
        // What a skipped sample drops elsewhere in the branch shows nowhere, nor does the future.
        let path = match site.checked_sub(1).map(|site| site % 5) {
            Some(0) => Some(site + 2),
            Some(1 | 3) => Some(site + 1),
            _ => None,
        };
        let path = path.map(|path| law[path].0.flatten_all()?.to_vec1::<u8>()).transpose()?;
        for at in 0..bits.len() {
            let sample = at / (bits.len() / b);
            let is_future = dims.len() == 4 && at % t > at / t % t;
            if is_future || path.as_ref().is_some_and(|path| path[sample] == 0) {
                continue;
            }
            let mut flipped = bits.clone();
            flipped[at] ^= 1;
            let mut masks = law.clone();
            masks[site].0 = Tensor::from_vec(flipped, dims.clone(), &Device::Cpu)?;
            let logits = reference_logits(&config, &vars, &ids, &masks)?;
            let change = difference(&logits, &expected)?;
            assert!(change > 1e-6, "site {site}, element {at}: changes logits by {change:e}");
            flips += 1;
        }
    }
    assert!(flips > 300, "only {flips} elements show");
    Ok(())
}

#[test]
fn training_mode_without_dropout_is_evaluation_mode() -> Result<()> {
    for fused in [true, false] {
        let (gpt, _) = model(&TransformerConfig { fused, ..tiny().with_dropout(0.0) }, 1)?;
        let logits = |train| -> Result<Vec<f32>> {
            gpt.forward(&ids(2, 9, 0)?, train)?.flatten_all()?.to_vec1()
        };
        assert_eq!(logits(true)?, logits(false)?);
    }
    Ok(())
}

#[test]
fn a_token_sees_only_what_precedes_it() -> Result<()> {
    let (gpt, _) = model(&tiny(), 1)?;
    let logits = |last: u32| -> Result<Vec<Vec<f32>>> {
        let ids = Tensor::new(&[[1u32, 2, 3, last]], &Device::Cpu)?;
        gpt.forward(&ids, false)?.squeeze(0)?.to_vec2()
    };
    let (a, b) = (logits(4)?, logits(5)?);
    assert_eq!(a[..3], b[..3]);
    assert_ne!(a[3], b[3]);
    Ok(())
}

#[test]
fn saved_weights_load_into_an_equal_model() -> Result<()> {
    let path =
        std::env::temp_dir().join(format!("candle-dropout-gpt-{}.safetensors", std::process::id()));
    let (gpt, vars) = model(&tiny(), 1)?;
    vars.save(&path)?;

    let logits = |gpt: &Transformer| -> Result<Vec<f32>> {
        gpt.forward(&ids(2, 9, 0)?, false)?.flatten_all()?.to_vec1()
    };
    let (other, mut other_vars) = model(&tiny(), 2)?;
    assert_ne!(logits(&gpt)?, logits(&other)?);
    other_vars.load(&path)?;
    assert_eq!(logits(&gpt)?, logits(&other)?);

    // For use without training, the file itself can back the model.
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    assert_eq!(
        logits(&gpt)?,
        logits(&Transformer::new(&tiny(), Arc::new(MaskGenerator::new(0)), vb)?)?
    );
    std::fs::remove_file(path)?;
    Ok(())
}

#[test]
fn parameter_names_and_layout_are_those_of_gpt2() -> Result<()> {
    let (_, vars) = model(&tiny(), 1)?;
    let vars = vars.data().lock().unwrap();
    let dims = |name: &str| vars.get(name).unwrap_or_else(|| panic!("no {name}")).dims().to_vec();
    assert_eq!(vars.len(), 4 + 2 * 12);
    assert_eq!(dims("wte.weight"), [17, 16]);
    assert_eq!(dims("wpe.weight"), [12, 16]);
    assert_eq!(dims("h.0.ln_1.weight"), [16]);
    assert_eq!(dims("h.0.attn.c_attn.weight"), [16, 48]);
    assert_eq!(dims("h.1.attn.c_proj.bias"), [16]);
    assert_eq!(dims("h.1.mlp.c_fc.weight"), [16, 64]);
    assert_eq!(dims("h.1.mlp.c_proj.weight"), [64, 16]);
    assert_eq!(dims("ln_f.bias"), [16]);
    Ok(())
}

#[test]
fn generation_is_repeatable_and_obeys_its_settings() -> Result<()> {
    let (gpt, _) = model(&tiny(), 1)?;
    let config = GenerationConfig { max_new_tokens: 30, seed: 4, ..Default::default() };
    let text = gpt.generate(&[1, 2, 3], &config)?;
    assert_eq!(text.len(), 33); // longer than max_position_embeddings: the context slides
    assert_eq!(text[..3], [1, 2, 3]);
    assert!(text.iter().all(|&id| id < 17));
    assert_eq!(text, gpt.generate(&[1, 2, 3], &config)?);
    assert_ne!(text, gpt.generate(&[1, 2, 3], &GenerationConfig { seed: 5, ..config.clone() })?);

    let greedy = gpt.generate(&[1], &GenerationConfig { temperature: 0.0, ..config.clone() })?;
    assert_eq!(greedy, gpt.generate(&[1], &GenerationConfig { top_k: Some(1), ..config.clone() })?);
    Ok(())
}

#[test]
fn bad_generation_settings_are_refused() -> Result<()> {
    let (gpt, _) = model(&tiny(), 1)?;
    let config = GenerationConfig::default;
    let error = |prompt: &[u32], config| gpt.generate(prompt, &config).unwrap_err().to_string();
    assert!(
        error(&[], config()).starts_with("generate: prompt: expected at least 1 token, got none")
    );
    assert!(
        error(&[1], GenerationConfig { temperature: -1.0, ..config() })
            .starts_with("generate: temperature:")
    );
    assert!(
        error(&[1], GenerationConfig { top_k: Some(0), ..config() })
            .starts_with("generate: top_k:")
    );
    for max_new_tokens in [0, 1] {
        let config = || GenerationConfig { max_new_tokens, ..config() };
        assert!(error(&[1, 16, 17], config()).starts_with(
            "generate: prompt: expected tokens below vocab_size = 17, got 17 at position 2:"
        ));
        // Candle itself would look this one up as zeros.
        assert!(error(&[u32::MAX], config()).contains("got 4294967295 at position 0"));
    }
    Ok(())
}

#[test]
fn a_model_that_has_diverged_generates_an_error_at_every_temperature() -> Result<()> {
    let (gpt, vars) = model(&tiny(), 1)?;
    let nan = Tensor::full(f32::NAN, 16, &Device::Cpu)?;
    vars.data().lock().unwrap()["ln_f.bias"].set(&nan)?;
    for temperature in [0., 1.] {
        let config = GenerationConfig { temperature, ..Default::default() };
        let error = gpt.generate(&[1], &config).unwrap_err().to_string();
        assert!(error.starts_with("generate: logits: expected finite numbers, got NaN"), "{error}");
    }
    Ok(())
}

#[test]
fn bad_configurations_are_refused_before_any_variable_is_made() {
    let cases = [
        (
            TransformerConfig { num_attention_heads: 3, ..tiny() },
            "transformer: hidden_size: expected a multiple of num_attention_heads = 3, got 16",
        ),
        (
            TransformerConfig { num_hidden_layers: 0, ..tiny() },
            "transformer: num_hidden_layers: expected at least 1, got 0",
        ),
        (
            TransformerConfig { attn_pdrop: 1.5, ..tiny() },
            "transformer: attn_pdrop: expected a probability from 0 to 1, got 1.5",
        ),
        (
            TransformerConfig { resid_pdrop: f32::NAN, ..tiny() },
            "transformer: resid_pdrop: expected a probability from 0 to 1, got NaN",
        ),
        (
            TransformerConfig { drop_path_rate: -0.1, ..tiny() },
            "transformer: drop_path_rate: expected a probability from 0 to 1",
        ),
        (
            TransformerConfig { initializer_range: 0.0, ..tiny() },
            "transformer: initializer_range: expected a positive number, got 0",
        ),
    ];
    for (config, expected) in cases {
        let vars = VarMap::new();
        let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
        let error =
            Transformer::new(&config, Arc::new(MaskGenerator::new(1)), vb).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(vars.all_vars().is_empty());
    }
}

#[test]
fn ids_that_do_not_fit_are_refused() -> Result<()> {
    let (gpt, _) = model(&tiny(), 1)?;
    let error = gpt.forward(&ids(1, 13, 0)?, false).unwrap_err().to_string();
    assert!(error.contains("1 <= T <= max_position_embeddings = 12, got [1, 13]"), "{error}");
    assert!(gpt.forward(&Tensor::new(&[1u32, 2], &Device::Cpu)?, false).is_err());
    assert!(gpt.forward(&Tensor::new(&[[17u32]], &Device::Cpu)?, false).is_err());
    Ok(())
}
