//! What every dropout site drops, against the formulas with the masks of the law.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::functional::{Activation, AttentionMask, Norm};
use candle_dropout::{
    Architecture, DropMask, MaskGenerator, MaskKey, Transformer, TransformerConfig,
    seeded_var_builder,
};
use candle_nn::VarMap;

use super::{difference, ids, new_model, styles, tiny, tiny_llama};

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
