//! Gradients reach every parameter, and all forms of a model train alike.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::{MaskGenerator, Transformer, TransformerConfig, seeded_var_builder};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss::cross_entropy};
use cases::activation_dropout::{GATED, PLAIN};

use super::{difference, ids, loss, new_model, styles, tiny, tiny_llama};

/// The variables of a model, of which those that `trains` names are trained and the others constants.
fn partly_frozen(vars: &VarMap, trains: impl Fn(&str) -> bool) -> VarBuilder<'static> {
    let vars = vars.data().lock().expect("variables");
    let tensors = vars.iter().map(|(name, var)| {
        let tensor = var.as_tensor();
        (name.clone(), if trains(name) { tensor.clone() } else { tensor.detach() })
    });
    VarBuilder::from_tensors(tensors.collect(), DType::F32, &Device::Cpu)
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
    for hidden_act in PLAIN.into_iter().chain(GATED) {
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
