//! What the layers promise: they stand in for candle's, and draw one key a call in training.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::{
    AttentionConfig, DropMask, DropPath, Dropout, MaskGenerator, MaskKey, MaskState,
    MultiHeadAttention, MultiHeadAttentionConfig, StochasticDepth, drop_path_add, dropout,
    seeded_var_builder, set_seed,
};
use candle_nn::VarMap;
use cases::{bits, random};

fn generator(seed: u64) -> Arc<MaskGenerator> {
    Arc::new(MaskGenerator::new(seed))
}

// ---- a drop-in for candle_nn::Dropout ----

/// Code written for `candle_nn::Dropout`, compiled against the one given.
macro_rules! code_written_for_candle {
    ($module:ident, $Dropout:ty) => {
        mod $module {
            use super::*;
            use candle_core::ModuleT;

            #[derive(Clone, Debug)]
            struct Block {
                dropout: $Dropout,
            }

            impl ModuleT for Block {
                fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
                    xs.apply_t(&self.dropout, train)
                }
            }

            #[test]
            fn zeroes_some_elements_and_scales_the_others() -> Result<()> {
                let block = Block { dropout: <$Dropout>::new(0.5) }.clone();
                assert!(format!("{block:?}").contains("drop_p: 0.5"));
                let xs = Tensor::ones((64, 64), DType::F32, &Device::Cpu)?;
                assert_eq!(bits(&block.forward_t(&xs, false)?)?, bits(&xs)?);
                let outputs = [block.forward_t(&xs, true)?, block.dropout.forward(&xs, true)?];
                for ys in outputs {
                    let ys = ys.flatten_all()?.to_vec1::<f32>()?;
                    assert!(ys.iter().all(|y| [0., 2.].contains(y)));
                    let kept = ys.iter().filter(|y| **y == 2.).count();
                    // 9 sigma of 32.
                    assert!((1760..2336).contains(&kept), "{kept} of 4096 are kept");
                }
                Ok(())
            }

            #[test]
            fn refuses_a_rate_that_is_no_probability() -> Result<()> {
                let xs = Tensor::ones(3, DType::F32, &Device::Cpu)?;
                for drop_p in [-0.1, 1.1] {
                    assert!(<$Dropout>::new(drop_p).forward(&xs, true).is_err());
                }
                Ok(())
            }
        }
    };
}

code_written_for_candle!(candle, candle_nn::Dropout);
code_written_for_candle!(ours, candle_dropout::Dropout);

// ---- rates ----

#[test]
fn a_bad_rate_is_an_error_in_training_and_in_evaluation() -> Result<()> {
    let (generator, x) = (generator(1), random(&[3, 5], DType::F32, 1)?);
    for drop_p in [-0.1, 1.001, f32::NAN, f32::INFINITY] {
        for train in [true, false] {
            let layers = [Dropout::new(drop_p), Dropout::with_generator(drop_p, generator.clone())];
            let path = DropPath::new(drop_p, generator.clone());
            let results = layers
                .map(|layer| layer.forward(&x, train))
                .into_iter()
                .chain([path.forward_add(&x, &x, train)]);
            for result in results {
                let error = result.unwrap_err().to_string();
                assert!(
                    error.contains("drop_p: expected a probability of dropping in [0, 1], got"),
                    "{error}"
                );
            }
        }
    }
    assert_eq!(generator.state().counter, 0, "no key is drawn for a rate that is refused");
    Ok(())
}

#[test]
fn the_linear_schedule_rises_to_its_last_rate() -> Result<()> {
    for n_layer in [1, 3, 12] {
        for layer in 1..=n_layer {
            let drop_p = DropPath::linear(layer, n_layer, 0.3, generator(1))?.drop_p();
            assert!((drop_p - 0.3 * layer as f32 / n_layer as f32).abs() < 1e-7);
        }
        assert_eq!(DropPath::linear(n_layer, n_layer, 0.3, generator(1))?.drop_p(), 0.3);
    }
    for (layer, n_layer) in [(0, 4), (5, 4), (0, 0), (1, 0)] {
        let error = DropPath::linear(layer, n_layer, 0.3, generator(1)).unwrap_err().to_string();
        assert!(
            error.contains(&format!("expected 1 to n_layer {n_layer}, got {layer}; count")),
            "{error}"
        );
    }
    Ok(())
}

// ---- keys ----

#[test]
fn a_call_draws_one_key_in_training_whatever_the_rate_and_none_in_evaluation() -> Result<()> {
    let x = random(&[3, 5], DType::F32, 1)?;
    for drop_p in [0., 1e-6, 0.5, 1.] {
        let generator = generator(1);
        let (layer, path) = (
            Dropout::with_generator(drop_p, generator.clone()),
            DropPath::new(drop_p, generator.clone()),
        );
        let calls: [&dyn Fn(bool) -> Result<()>; 4] = [
            &|train| layer.forward(&x, train).map(drop),
            &|train| layer.next_mask(train).map(drop),
            &|train| path.forward_add(&x, &x, train).map(drop),
            &|train| path.next_mask(train).map(drop),
        ];
        for call in calls {
            let before = generator.state();
            call(false)?;
            assert_eq!(generator.state(), before);
            call(true)?;
            assert_eq!(generator.state(), MaskState { counter: before.counter + 1, ..before });
        }
    }
    Ok(())
}

#[test]
fn a_rate_that_passes_through_zero_shifts_no_other_site() -> Result<()> {
    let x = random(&[8, 64], DType::F32, 1)?;
    let second_site = |first_drop_p| {
        let generator = generator(5);
        Dropout::with_generator(first_drop_p, generator.clone()).forward(&x, true)?;
        bits(&Dropout::with_generator(0.5, generator).forward(&x, true)?)
    };
    assert_eq!(second_site(0.)?, second_site(0.5)?);
    Ok(())
}

#[test]
fn a_layer_applies_the_op_with_the_next_mask_of_its_generator() -> Result<()> {
    let (x, residual) = (random(&[8, 64], DType::F32, 1)?, random(&[8, 64], DType::F32, 2)?);
    let keys = MaskGenerator::new(9);
    let layer = Dropout::with_generator(0.4, generator(9));
    let expected = dropout(&x, &DropMask::new(0.4, keys.next_key())?)?;
    assert_eq!(bits(&layer.forward(&x, true)?)?, bits(&expected)?);
    assert_eq!(layer.next_mask(true)?, DropMask::new(0.4, keys.next_key())?);
    for depth in [StochasticDepth::Row, StochasticDepth::Batch] {
        let keys = MaskGenerator::new(9);
        let layer = DropPath::new(0.4, generator(9)).with_mode(depth);
        assert_eq!(layer.mode(), depth);
        for _ in 0..4 {
            let drop = DropMask::new(0.4, keys.next_key())?;
            let expected = drop_path_add(&x, &residual, depth, &drop)?;
            assert_eq!(bits(&layer.forward_add(&x, &residual, true)?)?, bits(&expected)?);
        }
    }
    Ok(())
}

#[test]
fn a_rate_of_zero_in_training_changes_nothing() -> Result<()> {
    let (x, residual) = (random(&[8, 64], DType::F32, 1)?, random(&[8, 64], DType::F32, 2)?);
    assert_eq!(bits(&Dropout::new(0.).forward(&x, true)?)?, bits(&x)?);
    for train in [true, false] {
        let y = DropPath::new(0., generator(1)).forward_add(&x, &residual, train)?;
        assert_eq!(bits(&y)?, bits(&(&residual + &x)?)?);
    }
    Ok(())
}

#[test]
fn a_clone_shares_the_generator_of_its_original() -> Result<()> {
    let generator = generator(1);
    let layer = Dropout::with_generator(0.5, generator.clone());
    let masks = [layer.next_mask(true)?, layer.clone().next_mask(true)?];
    assert_ne!(masks[0], masks[1]);
    assert_eq!(generator.state().counter, 2);
    Ok(())
}

// ---- state ----

#[test]
fn a_restored_state_replays_the_masks() -> Result<()> {
    let (generator, x) = (generator(3), random(&[8, 64], DType::F32, 1)?);
    let layer = Dropout::with_generator(0.5, generator.clone());
    let run = |layer: &Dropout| -> Result<Vec<Vec<u64>>> {
        (0..3).map(|_| bits(&layer.forward(&x, true)?)).collect()
    };
    run(&layer)?;
    let state = generator.state();
    let first_pass = run(&layer)?;
    assert_ne!(first_pass[0], first_pass[1]);
    generator.restore(state);
    assert_eq!(run(&layer)?, first_pass, "a recomputed block");
    let resumed = Dropout::with_generator(0.5, Arc::new(MaskGenerator::from(state)));
    assert_eq!(run(&resumed)?, first_pass, "a resumed run");
    Ok(())
}

#[test]
fn models_trained_side_by_side_give_what_they_give_alone() -> Result<()> {
    let train = |seed: u64| -> Result<Vec<Vec<u64>>> {
        let generator = generator(seed);
        let layers = [
            Dropout::with_generator(0.2, generator.clone()),
            Dropout::with_generator(0.5, generator),
        ];
        let x = random(&[64, 512], DType::F32, seed)?;
        (0..50).map(|step| bits(&layers[step % 2].forward(&x, true)?)).collect()
    };
    let alone = [train(1)?, train(2)?];
    let together = std::thread::scope(|scope| {
        let threads = [1, 2].map(|seed| scope.spawn(move || train(seed)));
        threads.map(|thread| thread.join().unwrap())
    });
    for (together, alone) in together.into_iter().zip(alone) {
        assert_eq!(together?, alone);
    }
    Ok(())
}

/// In a process of its own, since other tests draw from the process-wide generator too.
#[test]
fn a_seed_restarts_the_process_wide_generator() -> Result<()> {
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "seeded_in_a_process_of_its_own", "--ignored"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && text.contains("1 passed"), "{text}");
    Ok(())
}

#[test]
#[ignore = "run by a_seed_restarts_the_process_wide_generator"]
fn seeded_in_a_process_of_its_own() -> Result<()> {
    let layer = Dropout::new(0.5);
    set_seed(7);
    let masks = [layer.next_mask(true)?, Dropout::new(0.5).next_mask(true)?];
    let keys = MaskGenerator::new(7);
    assert_eq!(masks, [DropMask::new(0.5, keys.next_key())?, DropMask::new(0.5, keys.next_key())?]);
    Ok(())
}

// ---- multi-head attention ----

/// Twelve columns, four heads of queries and two of keys and values, in f64.
fn multi_head_config(drop_p: f32) -> MultiHeadAttentionConfig {
    MultiHeadAttentionConfig {
        hidden_size: 12,
        num_heads: 4,
        num_kv_heads: Some(2),
        head_dim: Some(5),
        drop_p,
        ..Default::default()
    }
}

fn multi_head(drop_p: f32, seed: u64) -> Result<(MultiHeadAttention, VarMap)> {
    let vars = VarMap::new();
    let vb = seeded_var_builder(&vars, 1, DType::F64, &Device::Cpu);
    Ok((MultiHeadAttention::new(&multi_head_config(drop_p), generator(seed), vb)?, vars))
}

#[test]
fn multi_head_attention_is_its_formula_and_every_parameter_learns() -> Result<()> {
    let (layer, vars) = multi_head(0.3, 7)?;
    let (b, s, h, kv, d) = (2, 9, 4, 2, 5);
    let xs = random(&[b, s, 12], DType::F64, 1)?;
    let y = layer.forward(&xs, true)?;

    let of = |name: &str| vars.data().lock().unwrap()[name].as_tensor().clone();
    let linear = |x: &Tensor, name: &str| {
        let weight = of(&format!("{name}.weight"));
        x.broadcast_matmul(&weight.t()?)?.broadcast_add(&of(&format!("{name}.bias")))
    };
    let qkv = linear(&xs, "qkv_proj")?.reshape((b, s, h + 2 * kv, d))?.transpose(1, 2)?;
    let part = |from, heads| qkv.narrow(1, from, heads)?.contiguous();
    let (q, k, v) = (part(0, h)?, part(h, kv)?, part(h + kv, kv)?);
    let drop = DropMask::new(0.3, MaskKey::derive(7, 0))?;
    let (keep, scale) = (drop.to_tensor((b, h, s, s), &Device::Cpu)?, drop.rate().scale().into());
    let config = AttentionConfig { causal: true, ..Default::default() };
    let o = cases::attention::formula(&q, &k, &v, &config, &keep, scale)?;
    let expected = linear(&o.transpose(1, 2)?.reshape((b, s, h * d))?, "o_proj")?;
    let error = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.max_all()?.to_scalar::<f64>();
    assert!(error(&y, &expected)? < 1e-12);

    let (grads, exact) = (y.sqr()?.backward()?, expected.sqr()?.backward()?);
    for (name, var) in vars.data().lock().unwrap().iter() {
        let (ours, exact) = (grads.get(var).unwrap(), exact.get(var).unwrap());
        assert!(error(ours, &exact.zeros_like()?)? > 0., "{name}");
        assert!(error(ours, exact)? < 1e-12, "{name}");
    }
    Ok(())
}

#[test]
fn multi_head_attention_draws_one_key_a_call_in_training_and_none_in_evaluation() -> Result<()> {
    let vars = VarMap::new();
    let vb = seeded_var_builder(&vars, 1, DType::F64, &Device::Cpu);
    let keys = generator(3);
    let layer = MultiHeadAttention::new(&multi_head_config(0.), keys.clone(), vb)?;
    let xs = random(&[2, 9, 12], DType::F64, 1)?;
    let (trained, evaluated) = (layer.forward(&xs, true)?, layer.forward(&xs, false)?);
    assert_eq!(bits(&trained)?, bits(&evaluated)?);
    assert_eq!(keys.state(), MaskState { seed: 3, counter: 1 });
    Ok(())
}

#[test]
fn padding_reaches_no_other_token() -> Result<()> {
    let sees_all =
        MultiHeadAttentionConfig { attention: AttentionConfig::default(), ..multi_head_config(0.) };
    let vb = seeded_var_builder(&VarMap::new(), 1, DType::F64, &Device::Cpu);
    let layer = MultiHeadAttention::new(&sees_all, generator(1), vb)?;
    let xs = random(&[2, 9, 12], DType::F64, 1)?;
    let lengths = Tensor::new(&[6u32, 9], &Device::Cpu)?;
    let y = layer.forward_padded(&xs, &lengths, false)?;
    let nan = (xs.narrow(1, 6, 3)? * f64::NAN)?;
    let bad = Tensor::cat(&[&xs.narrow(1, 0, 6)?, &nan], 1)?.narrow(0, 0, 1)?;
    let bad = Tensor::cat(&[&bad, &xs.narrow(0, 1, 1)?], 0)?;
    let z = layer.forward_padded(&bad, &lengths, false)?;
    for (sample, tokens) in [(0, 6), (1, 9)] {
        let of = |x: &Tensor| x.narrow(0, sample, 1)?.narrow(1, 0, tokens)?.contiguous();
        assert_eq!(bits(&of(&y)?)?, bits(&of(&z)?)?);
    }
    Ok(())
}

#[test]
fn sizes_that_do_not_fit_multi_head_attention_are_refused() -> Result<()> {
    let error = |config: MultiHeadAttentionConfig| {
        let vb = seeded_var_builder(&VarMap::new(), 1, DType::F32, &Device::Cpu);
        MultiHeadAttention::new(&config, generator(1), vb).unwrap_err().to_string()
    };
    let fits = multi_head_config(0.1);
    for (config, expected) in [
        (
            MultiHeadAttentionConfig { num_heads: 0, ..fits.clone() },
            "num_heads: expected at least 1",
        ),
        (
            MultiHeadAttentionConfig { head_dim: None, num_heads: 5, ..fits.clone() },
            "hidden_size: expected a multiple of num_heads = 5, got 12",
        ),
        (
            MultiHeadAttentionConfig { num_kv_heads: Some(3), ..fits.clone() },
            "num_kv_heads: expected a divisor of num_heads = 4, got 3",
        ),
    ] {
        let message = error(config);
        assert!(message.starts_with(&format!("multi_head_attention: {expected}")), "{message}");
    }
    assert!(error(MultiHeadAttentionConfig { drop_p: 1.5, ..fits.clone() }).contains("1.5"));
    let (layer, _) = multi_head(0., 1)?;
    let message = layer.forward(&random(&[9, 12], DType::F64, 1)?, true).unwrap_err().to_string();
    assert!(message.starts_with("multi_head_attention: xs: expected [B, S, hidden_size]"));
    Ok(())
}
