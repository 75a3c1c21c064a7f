//! The Transformer in both styles: gradients, fused against unfused, saving, generation, refused
//! configurations.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::{
    Activation, Architecture, AttentionMask, DropMask, GenerationConfig, MaskGenerator, MaskKey,
    Norm, RopeScaling, Transformer, TransformerConfig, seeded_var_builder,
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

/// Grouped queries, a head of its own.
fn tiny_llama() -> TransformerConfig {
    TransformerConfig {
        vocab_size: 17,
        max_position_embeddings: 12,
        hidden_size: 16,
        intermediate_size: Some(24),
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        rope_theta: 100.,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: false,
        ..TransformerConfig::llama()
    }
    .with_dropout(0.1)
}

/// Both styles, fused or not.
fn styles(fused: bool) -> [TransformerConfig; 2] {
    [tiny(), tiny_llama()].map(|config| TransformerConfig { fused, ..config })
}

fn new_model(config: &TransformerConfig, seed: u64) -> Result<(Transformer, VarMap)> {
    let vars = VarMap::new();
    let vb = seeded_var_builder(&vars, seed, DType::F32, &Device::Cpu);
    Ok((Transformer::new(config, Arc::new(MaskGenerator::new(seed)), vb)?, vars))
}

/// The variables of a model, of which those that `trains` names are trained and the others constants.
fn partly_frozen(vars: &VarMap, trains: impl Fn(&str) -> bool) -> VarBuilder<'static> {
    let vars = vars.data().lock().expect("variables");
    let tensors = vars.iter().map(|(name, var)| {
        let tensor = var.as_tensor();
        (name.clone(), if trains(name) { tensor.clone() } else { tensor.detach() })
    });
    VarBuilder::from_tensors(tensors.collect(), DType::F32, &Device::Cpu)
}

/// Token ids `[b, t]` that follow a pattern a model can learn.
fn ids(b: usize, t: usize, step: usize) -> Result<Tensor> {
    let ids: Vec<u32> =
        (0..b * t).map(|at| ((at / t + (at % t) * (step + 1)) % 17) as u32).collect();
    Tensor::from_vec(ids, (b, t), &Device::Cpu)
}

fn loss(model: &Transformer, ids: &Tensor, train: bool) -> Result<Tensor> {
    let t = ids.dim(1)? - 1;
    let logits = model.forward(&ids.narrow(1, 0, t)?.contiguous()?, train)?;
    cross_entropy(&logits.flatten_to(1)?, &ids.narrow(1, 1, t)?.flatten_all()?)
}

#[test]
fn every_parameter_receives_a_finite_non_zero_gradient() -> Result<()> {
    for config in [true, false].into_iter().flat_map(styles) {
        for drop_path_rate in [0.0, 0.3] {
            let config = TransformerConfig { drop_path_rate, ..config.clone() };
            let what = |name: &str| format!("{name} ({config:?})");
            let (model, vars) = new_model(&config, 1)?;
            let grads = loss(&model, &ids(8, 13, 0)?, true)?.backward()?;
            for (name, var) in vars.data().lock().unwrap().iter() {
                let grad = grads.get(var).unwrap_or_else(|| panic!("no gradient: {}", what(name)));
                let grad = grad.flatten_all()?.to_vec1::<f32>()?;
                assert!(grad.iter().all(|g| g.is_finite()), "gradient not finite: {}", what(name));
                assert!(grad.iter().any(|g| *g != 0.0), "gradient is zero: {}", what(name));
            }
        }
    }
    Ok(())
}

#[test]
fn biases_train_beside_frozen_weights() -> Result<()> {
    let config = TransformerConfig { attention_bias: true, mlp_bias: true, ..tiny_llama() };
    for fused in [true, false] {
        let config = TransformerConfig { fused, ..config.clone() };
        let (_, vars) = new_model(&config, 1)?;
        let vb = partly_frozen(&vars, |name| name.ends_with("bias"));
        let model = Transformer::new(&config, Arc::new(MaskGenerator::new(1)), vb)?;
        let ids = ids(2, 9, 0)?;
        let grads = loss(&model, &ids, false)?.backward()?;
        let mut before: Vec<f32> = model.forward(&ids, false)?.flatten_all()?.to_vec1()?;
        for (name, var) in vars.data().lock().expect("variables").iter() {
            assert_eq!(grads.get(var).is_some(), name.ends_with("bias"), "{name}");
            if name.ends_with("bias") {
                let other = Tensor::rand(0.5f32, 1.5, var.shape(), &Device::Cpu)?;
                var.set(&other)?;
                let after = model.forward(&ids, false)?.flatten_all()?.to_vec1()?;
                assert_ne!(before, after, "{name} has no effect");
                before = after;
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
        let model = Transformer::new(&config, Arc::new(MaskGenerator::new(1)), vb)?;
        let large: Vec<f32> = (0..64).map(|i| if i % 2 == 0 { 300. } else { -2000. }).collect();
        let large = Tensor::new(large, &Device::Cpu)?.to_dtype(DType::F16)?;
        let vars = vars.data().lock().unwrap();
        vars["h.0.mlp.c_fc.bias"].set(&large)?;

        let logits = model.forward(&ids(8, 12, 0)?, true)?.to_dtype(DType::F32)?.flatten_to(1)?;
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
    for config in styles(true) {
        let train = |fused| -> Result<Vec<f32>> {
            let config = TransformerConfig { drop_path_rate: 0.1, fused, ..config.clone() };
            let (model, vars) = new_model(&config, 3)?;
            let mut adamw =
                AdamW::new(vars.all_vars(), ParamsAdamW { lr: 3e-3, ..Default::default() })?;
            let step = |step: usize| {
                let loss = loss(&model, &ids(8, 13, step % 2)?, true)?;
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
    }
    Ok(())
}

#[test]
fn training_with_flash_attention_and_with_materialised_scores_agree() -> Result<()> {
    for config in styles(true) {
        let train = |flash_attention| -> Result<Vec<f32>> {
            let config = TransformerConfig { flash_attention, ..config.clone() };
            let (model, vars) = new_model(&config, 3)?;
            let mut adamw =
                AdamW::new(vars.all_vars(), ParamsAdamW { lr: 3e-3, ..Default::default() })?;
            let step = |step: usize| {
                let loss = loss(&model, &ids(8, 13, step % 2)?, true)?;
                adamw.backward_step(&loss)?;
                loss.to_scalar()
            };
            (0..20).map(step).collect()
        };
        let (flash, materialised) = (train(true)?, train(false)?);
        for (step, (a, b)) in flash.iter().zip(&materialised).enumerate() {
            assert!((a - b).abs() < 1e-4, "step {step}: loss {a} flash, {b} materialised");
        }
        assert!(flash[19] < flash[0], "the loss did not fall: {flash:?}");
    }
    Ok(())
}

#[test]
fn every_activation_agrees_fused_and_unfused() -> Result<()> {
    use Activation::*;
    for hidden_act in [GeluTanh, GeluErf, Silu, Relu, SwiGlu, GeGlu] {
        let style = if hidden_act.is_gated() { tiny_llama() } else { tiny() };
        let of = |fused| -> Result<(f64, Vec<(String, Tensor)>)> {
            let config = TransformerConfig { hidden_act, fused, ..style.clone() };
            let vars = VarMap::new();
            let vb = seeded_var_builder(&vars, 1, DType::F64, &Device::Cpu);
            let model = Transformer::new(&config, Arc::new(MaskGenerator::new(1)), vb)?;
            let loss = loss(&model, &ids(2, 13, 0)?, true)?;
            let grads = loss.backward()?;
            let mut gradients = Vec::new();
            for (name, var) in vars.data().lock().unwrap().iter() {
                gradients.push((name.clone(), grads.get(var).unwrap().clone()));
            }
            gradients.sort_by(|a, b| a.0.cmp(&b.0));
            Ok((loss.to_scalar()?, gradients))
        };
        let ((fused, gradients), (unfused, unfused_gradients)) = (of(true)?, of(false)?);
        assert!((fused - unfused).abs() < 1e-9, "{hidden_act:?}: {fused} fused, {unfused} not");
        for ((name, a), (_, b)) in gradients.iter().zip(&unfused_gradients) {
            // Candle's own erf, in the exact GELU, is good to seven digits.
            let error = difference(a, b)?;
            assert!(error < 1e-7, "{hidden_act:?}: gradient of {name} off by {error:e}");
        }
    }
    Ok(())
}

#[test]
fn the_same_masks_are_drawn_fused_or_not_and_none_in_evaluation() -> Result<()> {
    for (drop_p, drop_path_rate) in [(0.1, 0.1), (0.1, 0.0), (0.0, 0.0), (0.0, 0.5), (1.0, 1.0)] {
        let logits = |config: TransformerConfig| -> Result<(Vec<f32>, u64)> {
            let config = TransformerConfig { drop_path_rate, ..config.with_dropout(drop_p) };
            let vars = VarMap::new();
            let masks = Arc::new(MaskGenerator::new(5));
            let vb = seeded_var_builder(&vars, 5, DType::F32, &Device::Cpu);
            let model = Transformer::new(&config, masks.clone(), vb)?;
            model.forward(&ids(3, 12, 0)?, false)?;
            model.forward_cached(&ids(3, 12, 0)?, &mut model.kv_caches(12))?;
            assert_eq!(masks.state().counter, 0, "evaluation drew a key");
            let logits = model.forward(&ids(3, 12, 0)?, true)?.flatten_all()?.to_vec1()?;
            Ok((logits, masks.state().counter))
        };
        for (fused, unfused) in styles(true).into_iter().zip(styles(false)) {
            let ((fused, keys), (unfused, unfused_keys)) = (logits(fused)?, logits(unfused)?);
            assert_eq!((keys, unfused_keys), (11, 11), "1 + 5 num_hidden_layers keys a call");
            for (a, b) in fused.iter().zip(&unfused) {
                assert!(
                    (a - b).abs() < 1e-5,
                    "p {drop_p}, drop path {drop_path_rate}: {a} fused, {b} unfused"
                );
            }
        }
    }
    Ok(())
}

fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
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

/// The logits of a model from the formulas, with these masks as (keep, scale).
fn reference_logits(
    config: &TransformerConfig,
    vars: &VarMap,
    ids: &Tensor,
    masks: &[(Tensor, f64)],
) -> Result<Tensor> {
    let vars = vars.data().lock().unwrap();
    let var = |name: &str| vars[name].as_tensor();
    let (b, t) = ids.dims2()?;
    let (c, h) = (config.hidden_size, config.num_attention_heads);
    let is_llama = config.architecture == Architecture::Llama;
    let norm = |x: &Tensor, name: String| {
        let weight = var(&format!("{name}.weight")).clone();
        let norm = match is_llama {
            true => Norm::rms_norm(weight, config.norm_eps),
            false => {
                let bias = Some(var(&format!("{name}.bias")).clone());
                Norm::layer_norm(weight, bias, config.norm_eps)
            }
        };
        cases::norm::formula(x, &norm)
    };
    let linear = |x: &Tensor, name: String| {
        let weight = var(&format!("{name}.weight"));
        let weight = if is_llama { weight.t()? } else { weight.clone() };
        x.broadcast_matmul(&weight)?.broadcast_add(var(&format!("{name}.bias")))
    };
    let heads = |x: &Tensor| x.reshape((b, t, (), c / h))?.transpose(1, 2)?.contiguous();
    // Turned to its position: each element of the first half with its twin in the second.
    let rotate = |x: &Tensor| {
        let half = c / h / 2;
        let angle = |at: usize| {
            let exponent = (at % half) as f64 / half as f64;
            (at / half) as f64 / config.rope_theta.powf(exponent)
        };
        let angles = Tensor::from_iter((0..t * half).map(angle), &Device::Cpu)?;
        let angles = angles.reshape((t, half))?;
        candle_nn::rotary_emb::rope_slow(x, &angles.cos()?, &angles.sin()?)
    };
    let tokens = var(if is_llama { "model.embed_tokens.weight" } else { "wte.weight" });
    let x = tokens.index_select(&ids.flatten_all()?, 0)?.reshape((b, t, c))?;
    let x = match is_llama {
        true => x,
        false => x.broadcast_add(&var("wpe.weight").narrow(0, 0, t)?)?,
    };
    let mut masks = masks.iter();
    let mut next = || masks.next().unwrap();
    let (keep, scale) = next();
    let mut x = cases::dropout::formula(&x, keep, *scale)?;
    for layer in 0..config.num_hidden_layers {
        let of = |llama: &str, gpt2: &str| match is_llama {
            true => format!("model.layers.{layer}.{llama}"),
            false => format!("h.{layer}.{gpt2}"),
        };
        let n = norm(&x, of("input_layernorm", "ln_1"))?;
        let [q, k, v] = if is_llama {
            let part = |name: &str| heads(&linear(&n, of(name, ""))?);
            let (q, k) = (part("self_attn.q_proj")?, part("self_attn.k_proj")?);
            let [k, v] = [rotate(&k)?, part("self_attn.v_proj")?].map(|x| {
                // Written out: heads 0, 0, 1, 1 of two for four heads of queries.
                let group = h / config.num_key_value_heads.unwrap();
                let head = |head: usize| x.narrow(1, head / group, 1).unwrap();
                Tensor::cat(&(0..h).map(head).collect::<Vec<_>>(), 1).unwrap()
            });
            [rotate(&q)?, k, v]
        } else {
            let qkv = linear(&n, of("", "attn.c_attn"))?.chunk(3, 2)?;
            [heads(&qkv[0])?, heads(&qkv[1])?, heads(&qkv[2])?]
        };
        let (keep, scale) = next();
        let scores = q.matmul(&k.t()?.contiguous()?)?;
        let of_key = 1. / ((c / h) as f64).sqrt();
        let weights =
            cases::softmax_dropout::formula(&scores, of_key, &AttentionMask::Causal, keep, *scale)?;
        let y = weights.matmul(&v)?.transpose(1, 2)?.reshape((b, t, c))?;
        let mut add = |x: &Tensor, y: Tensor| {
            let ((keep, scale), (path_keep, path_scale)) = (next(), next());
            let y = cases::dropout::formula(&y, keep, *scale)?;
            cases::drop_path_add::formula(&y, x, path_keep, *path_scale)
        };
        x = add(&x, linear(&y, of("self_attn.o_proj", "attn.c_proj"))?)?;
        let n = norm(&x, of("post_attention_layernorm", "ln_2"))?;
        let y = if is_llama {
            let gate = linear(&n, of("mlp.gate_proj", ""))?;
            gate.silu()? * linear(&n, of("mlp.up_proj", ""))?
        } else {
            let u = linear(&n, of("", "mlp.c_fc"))?;
            let all = Tensor::ones(u.shape(), DType::U8, &Device::Cpu)?;
            cases::activation_dropout::formula(&u, None, Activation::GeluTanh, &all, 1.)
        };
        x = add(&x, linear(&y?, of("mlp.down_proj", "mlp.c_proj"))?)?;
    }
    let head = if is_llama { var("lm_head.weight") } else { tokens };
    norm(&x, if is_llama { "model.norm" } else { "ln_f" }.into())?.broadcast_matmul(&head.t()?)
}

#[test]
fn every_site_drops_exactly_what_its_key_says_fused_or_not() -> Result<()> {
    for style in [tiny(), tiny_llama()] {
        every_site_drops_what_its_key_says(TransformerConfig {
            vocab_size: 7,
            max_position_embeddings: 5,
            num_attention_heads: 2,
            num_key_value_heads: style.num_key_value_heads.and(Some(1)),
            initializer_range: 0.3,
            drop_path_rate: 0.5,
            // Without, a token whose attention is all dropped adds zeros, dropped or not.
            attention_bias: true,
            mlp_bias: true,
            ..style.with_dropout(0.5)
        })?;
    }
    Ok(())
}

fn every_site_drops_what_its_key_says(config: TransformerConfig) -> Result<()> {
    let ids = Tensor::new(&[[0u32, 5, 3, 3, 1], [6, 2, 4, 0, 5], [1, 1, 2, 6, 3]], &Device::Cpu)?;
    let (b, t) = ids.dims2()?;
    let seed = 11;
    let sites = sites(&config, seed, (b, t))?;
    let law = |(mask, dims): &(DropMask, Vec<usize>)| -> Result<(Tensor, f64)> {
        let keep = mask.to_tensor(dims.clone(), &Device::Cpu)?;
        Ok((keep, mask.rate().scale().into()))
    };
    let law = sites.iter().map(law).collect::<Result<Vec<_>>>()?;

    // Logits and gradients of all forms are those of the formulas with the masks of the law.
    let vars = VarMap::new();
    let mut expected = None;
    for (fused, flash_attention) in [(true, true), (true, false), (false, false)] {
        let config = TransformerConfig { fused, flash_attention, ..config.clone() };
        let vb = seeded_var_builder(&vars, 1, DType::F64, &Device::Cpu);
        let masks = Arc::new(MaskGenerator::new(seed));
        let model = Transformer::new(&config, masks.clone(), vb)?;
        // Biases begin as zeros, and which of these are dropped does not show.
        for (name, var) in vars.data().lock().unwrap().iter() {
            if name.ends_with(".bias") && fused {
                let values = (0..var.elem_count()).map(|i| 0.1 + 0.07 * (i % 5) as f64).collect();
                var.set(&Tensor::from_vec(values, var.dims(), &Device::Cpu)?)?;
            }
        }
        let logits = model.forward(&ids, true)?;
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
    for config in [true, false].into_iter().flat_map(styles) {
        let (model, _) = new_model(&config.with_dropout(0.0), 1)?;
        let logits = |train| -> Result<Vec<f32>> {
            model.forward(&ids(2, 9, 0)?, train)?.flatten_all()?.to_vec1()
        };
        assert_eq!(logits(true)?, logits(false)?);
    }
    Ok(())
}

#[test]
fn a_token_sees_only_what_precedes_it() -> Result<()> {
    for config in [true, false].into_iter().flat_map(styles) {
        let (model, _) = new_model(&config, 1)?;
        let logits = |last: u32| -> Result<Vec<Vec<f32>>> {
            let ids = Tensor::new(&[[1u32, 2, 3, last]], &Device::Cpu)?;
            model.forward(&ids, false)?.squeeze(0)?.to_vec2()
        };
        let (a, b) = (logits(4)?, logits(5)?);
        assert_eq!(a[..3], b[..3]);
        assert_ne!(a[3], b[3]);
    }
    Ok(())
}

#[test]
fn saved_weights_load_into_an_equal_model() -> Result<()> {
    let path =
        std::env::temp_dir().join(format!("candle-dropout-gpt-{}.safetensors", std::process::id()));
    let (model, vars) = new_model(&tiny(), 1)?;
    vars.save(&path)?;

    let logits = |model: &Transformer| -> Result<Vec<f32>> {
        model.forward(&ids(2, 9, 0)?, false)?.flatten_all()?.to_vec1()
    };
    let (other, mut other_vars) = new_model(&tiny(), 2)?;
    assert_ne!(logits(&model)?, logits(&other)?);
    other_vars.load(&path)?;
    assert_eq!(logits(&model)?, logits(&other)?);

    // For use without training, the file itself can back the model.
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    assert_eq!(
        logits(&model)?,
        logits(&Transformer::new(&tiny(), Arc::new(MaskGenerator::new(0)), vb)?)?
    );
    std::fs::remove_file(path)?;
    Ok(())
}

#[test]
fn parameter_names_and_layout_are_those_of_gpt2() -> Result<()> {
    let (_, vars) = new_model(&tiny(), 1)?;
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
fn parameter_names_and_layout_are_those_of_llama() -> Result<()> {
    let config = TransformerConfig { attention_bias: true, mlp_bias: true, ..tiny_llama() };
    let (_, vars) = new_model(&TransformerConfig { head_dim: Some(6), ..config }, 1)?;
    let vars = vars.data().lock().unwrap();
    let dims = |name: &str| vars.get(name).unwrap_or_else(|| panic!("no {name}")).dims().to_vec();
    assert_eq!(vars.len(), 3 + 2 * 16);
    assert_eq!(dims("model.embed_tokens.weight"), [17, 16]);
    assert_eq!(dims("model.layers.0.input_layernorm.weight"), [16]);
    assert_eq!(dims("model.layers.0.self_attn.q_proj.weight"), [24, 16]);
    assert_eq!(dims("model.layers.0.self_attn.k_proj.weight"), [12, 16]);
    assert_eq!(dims("model.layers.1.self_attn.v_proj.bias"), [12]);
    assert_eq!(dims("model.layers.1.self_attn.o_proj.weight"), [16, 24]);
    assert_eq!(dims("model.layers.1.post_attention_layernorm.weight"), [16]);
    assert_eq!(dims("model.layers.1.mlp.gate_proj.weight"), [24, 16]);
    assert_eq!(dims("model.layers.1.mlp.up_proj.bias"), [24]);
    assert_eq!(dims("model.layers.1.mlp.down_proj.weight"), [16, 24]);
    assert_eq!(dims("model.norm.weight"), [16]);
    assert_eq!(dims("lm_head.weight"), [17, 16]);
    Ok(())
}

/// A model in f64, whose logits spread enough that no two tokens are equally likely.
fn exact_model(config: &TransformerConfig) -> Result<Transformer> {
    let config = TransformerConfig {
        initializer_range: 0.7,
        tie_word_embeddings: false, // tied, it would say the same token again and again
        ..config.clone()
    };
    let vb = seeded_var_builder(&VarMap::new(), 6, DType::F64, &Device::Cpu);
    Transformer::new(&config, Arc::new(MaskGenerator::new(0)), vb)
}

#[test]
fn a_cache_changes_no_logits() -> Result<()> {
    for config in [true, false].into_iter().flat_map(styles) {
        let model = exact_model(&config)?;
        let ids = ids(3, 12, 2)?;
        let expected = model.forward(&ids, false)?;
        // Room for all tokens, or caches that grow.
        for capacity in [12, 1, 0] {
            let mut caches = model.kv_caches(capacity);
            for (start, t) in [(0, 5), (5, 1), (6, 1), (7, 3), (10, 2)] {
                let logits = model.forward_cached(&ids.narrow(1, start, t)?, &mut caches)?;
                let expected = expected.narrow(1, start + t - 1, 1)?.squeeze(1)?;
                let error = difference(&logits, &expected)?;
                assert!(error < 1e-12, "{start} + {t}: logits off by {error:e}");
            }
            let error = model.forward_cached(&ids.narrow(1, 0, 1)?, &mut caches).unwrap_err();
            assert!(error.to_string().contains("12 cached + T <= max_position_embeddings = 12"));
        }
        let mut caches = model.kv_caches(12);
        model.forward_cached(&ids.narrow(1, 0, 2)?, &mut caches)?;
        let error = model.forward_cached(&ids.narrow(0, 0, 2)?, &mut caches).unwrap_err();
        assert!(
            error.to_string().contains("expected 3 sequences like the caches hold, got [2, 12]")
        );
        let error = model.forward_cached(&ids, &mut []).unwrap_err().to_string();
        assert!(error.contains("transformer: caches: expected 2, one a block, got 0"), "{error}");
    }
    Ok(())
}

#[test]
fn cached_text_is_that_of_computing_every_window_anew() -> Result<()> {
    for config in [true, false].into_iter().flat_map(styles) {
        for prompt_len in [2, 12, 13, 31] {
            let prompt = &(0..prompt_len).map(|at| at * at * 3 % 17).collect::<Vec<u32>>();
            let model = exact_model(&config)?;
            let settings =
                GenerationConfig { max_new_tokens: 40, temperature: 0., ..Default::default() };
            let text = model.generate(prompt, &settings)?;
            let (mut ids, mut start) = (prompt.to_vec(), 0);
            for _ in 0..settings.max_new_tokens {
                // The window moves on by half of its 12 tokens when it is full.
                while ids.len() - start > 12 {
                    start += 6;
                }
                let window = Tensor::new(&ids[start..], &Device::Cpu)?.unsqueeze(0)?;
                let last = model.forward(&window, false)?.squeeze(0)?.get(ids.len() - start - 1)?;
                ids.push(last.argmax(0)?.to_scalar()?);
            }
            assert_eq!(text, ids);
            let distinct =
                text[prompt.len()..].iter().collect::<std::collections::HashSet<_>>().len();
            assert!(distinct > 3, "too dull a text to tell: {text:?}");
            // In two calls as in one.
            let half = GenerationConfig { max_new_tokens: 20, ..settings };
            assert_eq!(model.generate(&model.generate(prompt, &half)?, &half)?, text);
        }
    }
    Ok(())
}

#[test]
fn generation_is_repeatable_and_obeys_its_settings() -> Result<()> {
    let (model, _) = new_model(&tiny(), 1)?;
    let config = GenerationConfig { max_new_tokens: 30, seed: 4, ..Default::default() };
    let text = model.generate(&[1, 2, 3], &config)?;
    assert_eq!(text.len(), 33); // longer than max_position_embeddings: the context slides
    assert_eq!(text[..3], [1, 2, 3]);
    assert!(text.iter().all(|&id| id < 17));
    assert_eq!(text, model.generate(&[1, 2, 3], &config)?);
    assert_ne!(text, model.generate(&[1, 2, 3], &GenerationConfig { seed: 5, ..config.clone() })?);

    let greedy = model.generate(&[1], &GenerationConfig { temperature: 0.0, ..config.clone() })?;
    assert_eq!(
        greedy,
        model.generate(&[1], &GenerationConfig { top_k: Some(1), ..config.clone() })?
    );
    Ok(())
}

#[test]
fn bad_generation_settings_are_refused() -> Result<()> {
    let (model, _) = new_model(&tiny(), 1)?;
    let config = GenerationConfig::default;
    let error = |prompt: &[u32], config| model.generate(prompt, &config).unwrap_err().to_string();
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
    let (model, vars) = new_model(&tiny(), 1)?;
    let nan = Tensor::full(f32::NAN, 16, &Device::Cpu)?;
    vars.data().lock().unwrap()["ln_f.bias"].set(&nan)?;
    for temperature in [0., 1.] {
        let config = GenerationConfig { temperature, ..Default::default() };
        let error = model.generate(&[1], &config).unwrap_err().to_string();
        assert!(error.starts_with("generate: logits: expected finite numbers, got NaN"), "{error}");
    }
    Ok(())
}

#[test]
fn bad_configurations_are_refused_before_any_variable_is_made() {
    let cases = [
        (
            TransformerConfig { num_key_value_heads: Some(3), ..tiny_llama() },
            "transformer: num_key_value_heads: expected a divisor of num_attention_heads = 4, got 3",
        ),
        (
            TransformerConfig { head_dim: Some(5), ..tiny_llama() },
            "transformer: head_dim: expected an even number for rotary positions, got 5",
        ),
        (
            TransformerConfig { hidden_act: Activation::Silu, ..tiny_llama() },
            "transformer: hidden_act: expected a gated activation for Llama, got Silu",
        ),
        (
            TransformerConfig { hidden_act: Activation::SwiGlu, ..tiny() },
            "transformer: hidden_act: expected an activation without a gate for Gpt2, got SwiGlu",
        ),
        (
            TransformerConfig { rope_theta: 0., ..tiny_llama() },
            "transformer: rope_theta: expected a positive number, got 0",
        ),
        (
            TransformerConfig { rope_scaling: RopeScaling::Linear { factor: 0. }, ..tiny_llama() },
            "rope: scaling.factor: expected a positive number, got 0",
        ),
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
    let (model, _) = new_model(&tiny(), 1)?;
    let error = model.forward(&ids(1, 13, 0)?, false).unwrap_err().to_string();
    assert!(error.contains("0 cached + T <= max_position_embeddings = 12, got [1, 13]"), "{error}");
    assert!(model.forward(&Tensor::new(&[1u32, 2], &Device::Cpu)?, false).is_err());
    assert!(model.forward(&Tensor::new(&[[17u32]], &Device::Cpu)?, false).is_err());
    Ok(())
}
