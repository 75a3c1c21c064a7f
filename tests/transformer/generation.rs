//! Text from a model, and the caches of keys and values behind it.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::{
    GenerationConfig, MaskGenerator, Transformer, TransformerConfig, seeded_var_builder,
};
use candle_nn::VarMap;

use super::{difference, ids, new_model, styles, tiny};

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
