//! The GPT model: gradients, fused against unfused, saving, generation, refused configurations.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::{GenerationConfig, Gpt, GptConfig, MaskGenerator, seeded_var_builder};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss::cross_entropy};

fn tiny() -> GptConfig {
    GptConfig {
        vocab_size: 17,
        n_positions: 12,
        n_embd: 16,
        n_layer: 2,
        n_head: 4,
        ..GptConfig::default()
    }
    .with_dropout(0.1)
}

fn model(config: &GptConfig, seed: u64) -> Result<(Gpt, VarMap)> {
    let vars = VarMap::new();
    let vb = seeded_var_builder(&vars, seed, DType::F32, &Device::Cpu);
    Ok((Gpt::new(config, Arc::new(MaskGenerator::new(seed)), vb)?, vars))
}

/// Token ids `[b, t]` that follow a pattern a model can learn.
fn ids(b: usize, t: usize, step: usize) -> Result<Tensor> {
    let ids: Vec<u32> =
        (0..b * t).map(|at| ((at / t + (at % t) * (step + 1)) % 17) as u32).collect();
    Tensor::from_vec(ids, (b, t), &Device::Cpu)
}

fn loss(gpt: &Gpt, ids: &Tensor, train: bool) -> Result<Tensor> {
    let t = ids.dim(1)? - 1;
    let logits = gpt.forward(&ids.narrow(1, 0, t)?.contiguous()?, train)?;
    cross_entropy(&logits.flatten_to(1)?, &ids.narrow(1, 1, t)?.flatten_all()?)
}

#[test]
fn every_parameter_receives_a_finite_non_zero_gradient() -> Result<()> {
    for fused in [true, false] {
        for drop_path_rate in [0.0, 0.3] {
            let (gpt, vars) = model(&GptConfig { drop_path_rate, fused, ..tiny() }, 1)?;
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
fn fused_and_unfused_training_agree() -> Result<()> {
    let train = |fused| -> Result<Vec<f32>> {
        let (gpt, vars) = model(&GptConfig { drop_path_rate: 0.1, fused, ..tiny() }, 3)?;
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
            let config = GptConfig { drop_path_rate, fused, ..tiny().with_dropout(drop_p) };
            let vars = VarMap::new();
            let masks = Arc::new(MaskGenerator::new(5));
            let gpt = Gpt::new(
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
        assert_eq!((keys, unfused_keys), (11, 11), "1 + 5 n_layer keys a call");
        for (a, b) in fused.iter().zip(&unfused) {
            assert!(
                (a - b).abs() < 1e-5,
                "p {drop_p}, drop path {drop_path_rate}: {a} fused, {b} unfused"
            );
        }
    }
    Ok(())
}

#[test]
fn training_mode_without_dropout_is_evaluation_mode() -> Result<()> {
    for fused in [true, false] {
        let (gpt, _) = model(&GptConfig { fused, ..tiny().with_dropout(0.0) }, 1)?;
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

    let logits = |gpt: &Gpt| -> Result<Vec<f32>> {
        gpt.forward(&ids(2, 9, 0)?, false)?.flatten_all()?.to_vec1()
    };
    let (other, mut other_vars) = model(&tiny(), 2)?;
    assert_ne!(logits(&gpt)?, logits(&other)?);
    other_vars.load(&path)?;
    assert_eq!(logits(&gpt)?, logits(&other)?);

    // For use without training, the file itself can back the model.
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    assert_eq!(logits(&gpt)?, logits(&Gpt::new(&tiny(), Arc::new(MaskGenerator::new(0)), vb)?)?);
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
    assert_eq!(text.len(), 33); // longer than n_positions: the context slides
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
    assert!(gpt.generate(&[17], &config()).is_err());
    Ok(())
}

#[test]
fn bad_configurations_are_refused_before_any_variable_is_made() {
    let cases = [
        (
            GptConfig { n_head: 3, ..tiny() },
            "gpt: n_embd: expected a multiple of n_head = 3, got 16",
        ),
        (GptConfig { n_layer: 0, ..tiny() }, "gpt: n_layer: expected at least 1, got 0"),
        (
            GptConfig { attn_pdrop: 1.5, ..tiny() },
            "gpt: attn_pdrop: expected a probability from 0 to 1, got 1.5",
        ),
        (
            GptConfig { resid_pdrop: f32::NAN, ..tiny() },
            "gpt: resid_pdrop: expected a probability from 0 to 1, got NaN",
        ),
        (
            GptConfig { drop_path_rate: -0.1, ..tiny() },
            "gpt: drop_path_rate: expected a probability from 0 to 1",
        ),
        (
            GptConfig { initializer_range: 0.0, ..tiny() },
            "gpt: initializer_range: expected a positive number, got 0",
        ),
    ];
    for (config, expected) in cases {
        let vars = VarMap::new();
        let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
        let error = Gpt::new(&config, Arc::new(MaskGenerator::new(1)), vb).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(vars.all_vars().is_empty());
    }
}

#[test]
fn ids_that_do_not_fit_are_refused() -> Result<()> {
    let (gpt, _) = model(&tiny(), 1)?;
    let error = gpt.forward(&ids(1, 13, 0)?, false).unwrap_err().to_string();
    assert!(error.contains("1 <= T <= n_positions = 12, got [1, 13]"), "{error}");
    assert!(gpt.forward(&Tensor::new(&[1u32, 2], &Device::Cpu)?, false).is_err());
    assert!(gpt.forward(&Tensor::new(&[[17u32]], &Device::Cpu)?, false).is_err());
    Ok(())
}
