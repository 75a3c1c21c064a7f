//! What the layers promise: they stand in for candle's, and draw one key a call in training.

mod family;
mod multi_head_attention;
mod train_mode;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{StochasticDepth, drop_path_add, dropout};
use candle_dropout::nn;
use candle_dropout::{
    DropMask, DropPath, Dropout, MaskGenerator, MaskKey, MaskState, MultiHeadAttention,
    MultiHeadAttentionConfig, set_seed,
};
use candle_nn::{VarBuilder, VarMap};
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
    let is_named = |error: candle_core::Error, layer: &str| {
        let expected =
            format!("{layer}: drop_p: expected a probability of dropping in [0, 1], got");
        assert!(error.to_string().starts_with(&expected), "{error}");
    };
    for drop_p in [-0.1, 1.001, f64::NAN, f64::INFINITY] {
        for train in [true, false] {
            is_named(Dropout::new(drop_p).forward(&x, train).unwrap_err(), "dropout");
        }
        is_named(Dropout::with_generator(drop_p, generator.clone()).unwrap_err(), "dropout");
        let of_path = |path: Result<DropPath>| is_named(path.unwrap_err(), "drop_path");
        of_path(DropPath::new(drop_p, generator.clone()));
        of_path(DropPath::linear(1, 2, drop_p, generator.clone()));
        of_path(DropPath::linspace(0, 2, drop_p, generator.clone()));

        let mut layer = Dropout::new(0.25);
        is_named(layer.set_drop_p(drop_p).unwrap_err(), "dropout");
        assert_eq!(layer.drop_p(), 0.25, "a rate that is refused changes nothing");
        let mut path = DropPath::new(0.25, generator.clone())?;
        is_named(path.set_drop_p(drop_p).unwrap_err(), "drop_path");
        assert_eq!(path.drop_p(), 0.25);
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

#[test]
fn timms_schedule_rises_from_no_dropping_to_its_last_rate() -> Result<()> {
    let rates = |n_block| -> Result<Vec<f32>> {
        (0..n_block)
            .map(|b| Ok(DropPath::linspace(b, n_block, 0.3, generator(1))?.drop_p()))
            .collect()
    };
    assert_eq!(rates(1)?, [0.]);
    assert_eq!(rates(2)?, [0., 0.3]);
    assert_eq!(rates(4)?, [0., 0.1, 0.2, 0.3]);
    for (block, n_block) in [(4, 4), (0, 0)] {
        let error = DropPath::linspace(block, n_block, 0.3, generator(1)).unwrap_err().to_string();
        assert!(error.contains(&format!("n_block {n_block}, got {block}; count")), "{error}");
    }
    Ok(())
}

#[test]
fn a_rate_of_a_config_in_f64_drops_what_the_same_rate_in_f32_drops() -> Result<()> {
    let mut differ = 0;
    for thousandths in 0..=1000u32 {
        let (wide, narrow) = (f64::from(thousandths) / 1000., thousandths as f32 / 1000.);
        assert_eq!(DropMask::new(wide, MaskKey::new(1))?, DropMask::new(narrow, MaskKey::new(1))?);
        assert_eq!(Dropout::new(wide).drop_p(), narrow);
        differ += u32::from(wide != f64::from(narrow));
    }
    assert!(differ > 900, "{differ}");
    let mut layer = Dropout::new(0);
    layer.set_drop_p(0.1f32)?;
    assert_eq!(layer.next_mask(true)?.rate(), Dropout::new(0.1).next_mask(true)?.rate());
    Ok(())
}

#[test]
fn what_layers_are_made_of_is_checked_when_they_are_made_and_named_by_its_path() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).pp("h").pp(0);
    for eps in [-1e-5, f64::NAN, f64::INFINITY] {
        for (layer, error) in [
            ("layer_norm", nn::layer_norm(8, eps, vb.pp("ln_1")).unwrap_err()),
            ("layer_norm", nn::layer_norm_no_bias(8, eps, vb.pp("ln_1")).unwrap_err()),
            ("rms_norm", nn::rms_norm(8, eps, vb.pp("ln_1")).unwrap_err()),
        ] {
            let expected =
                format!("{layer} h.0.ln_1: eps: expected a finite number of at least 0, got");
            assert!(error.to_string().starts_with(&expected), "{error}");
        }
    }
    let config = MultiHeadAttentionConfig { drop_p: 2., ..MultiHeadAttentionConfig::default() };
    let [q, k, v, o] = ["query", "key", "value", "out"].map(|name| vb.pp("attn").pp(name));
    let error = MultiHeadAttention::from_qkv(&config, generator(1), [q, k, v], o).unwrap_err();
    assert!(
        error.to_string().starts_with("multi_head_attention h.0.attn: drop_p: expected"),
        "{error}"
    );
    let error = MultiHeadAttention::new(&config, generator(1), vb.pp("attn")).unwrap_err();
    assert!(
        error.to_string().starts_with("multi_head_attention h.0.attn: drop_p: expected"),
        "{error}"
    );
    Ok(())
}

// ---- keys ----

#[test]
fn a_call_draws_one_key_in_training_whatever_the_rate_and_none_in_evaluation() -> Result<()> {
    let x = random(&[3, 5], DType::F32, 1)?;
    for drop_p in [0., 1e-6, 0.5, 1.] {
        let generator = generator(1);
        let (layer, path) = (
            Dropout::with_generator(drop_p, generator.clone())?,
            DropPath::new(drop_p, generator.clone())?,
        );
        let calls: [&dyn Fn(bool) -> Result<()>; 5] = [
            &|train| layer.forward(&x, train).map(drop),
            &|train| layer.next_mask(train).map(drop),
            &|train| path.forward_add(&x, &x, train).map(drop),
            &|train| path.next_mask(train).map(drop),
            &|train| path.forward(&x, train).map(drop),
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
        Dropout::with_generator(first_drop_p, generator.clone())?.forward(&x, true)?;
        bits(&Dropout::with_generator(0.5, generator)?.forward(&x, true)?)
    };
    assert_eq!(second_site(0.)?, second_site(0.5)?);
    Ok(())
}

#[test]
fn a_layer_applies_the_op_with_the_next_mask_of_its_generator() -> Result<()> {
    let (x, residual) = (random(&[8, 64], DType::F32, 1)?, random(&[8, 64], DType::F32, 2)?);
    let keys = MaskGenerator::new(9);
    let layer = Dropout::with_generator(0.4, generator(9))?;
    let expected = dropout(&x, &DropMask::new(0.4, keys.next_key())?)?;
    assert_eq!(bits(&layer.forward(&x, true)?)?, bits(&expected)?);
    assert_eq!(layer.next_mask(true)?, DropMask::new(0.4, keys.next_key())?);
    for mode in [StochasticDepth::Row, StochasticDepth::Batch] {
        let keys = MaskGenerator::new(9);
        let layer = DropPath::new(0.4, generator(9))?.with_mode(mode);
        assert_eq!(layer.mode(), mode);
        for _ in 0..4 {
            let drop = DropMask::new(0.4, keys.next_key())?;
            let expected = drop_path_add(&x, &residual, mode, &drop)?;
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
        let y = DropPath::new(0., generator(1))?.forward_add(&x, &residual, train)?;
        assert_eq!(bits(&y)?, bits(&(&residual + &x)?)?);
    }
    Ok(())
}

#[test]
fn a_branch_alone_is_what_is_added_to_a_residual_and_so_is_its_gradient() -> Result<()> {
    let residual = random(&[8, 64], DType::F64, 2)?;
    for mode in [StochasticDepth::Row, StochasticDepth::Batch] {
        for drop_p in [0., 0.4, 1.] {
            let layer = || {
                Ok::<_, candle_core::Error>(DropPath::new(drop_p, generator(9))?.with_mode(mode))
            };
            let (alone, added) = (layer()?, layer()?);
            for train in [true, true, true, false] {
                let x = Var::from_tensor(&random(&[8, 64], DType::F64, 1)?)?;
                let y = alone.forward(&x, train)?;
                let sum = added.forward_add(&x, &residual, train)?;
                assert_eq!(bits(&(&residual + &y)?)?, bits(&sum)?, "{mode:?} {drop_p} {train}");
                let slope = random(&[8, 64], DType::F64, 3)?;
                let of_y = (y * &slope)?.backward()?;
                let of_sum = (sum * slope)?.backward()?;
                let grad = |grads: candle_core::backprop::GradStore| bits(grads.get(&x).unwrap());
                assert_eq!(grad(of_y)?, grad(of_sum)?);
            }
        }
    }
    Ok(())
}

#[test]
fn a_clone_shares_the_generator_of_its_original() -> Result<()> {
    let generator = generator(1);
    let layer = Dropout::with_generator(0.5, generator.clone())?;
    let masks = [layer.next_mask(true)?, layer.clone().next_mask(true)?];
    assert_ne!(masks[0], masks[1]);
    assert_eq!(generator.state().counter, 2);
    Ok(())
}

// ---- state ----

#[test]
fn a_restored_state_replays_the_masks() -> Result<()> {
    let (generator, x) = (generator(3), random(&[8, 64], DType::F32, 1)?);
    let layer = Dropout::with_generator(0.5, generator.clone())?;
    let run = |layer: &Dropout| -> Result<Vec<Vec<u64>>> {
        (0..3).map(|_| bits(&layer.forward(&x, true)?)).collect()
    };
    run(&layer)?;
    let state = generator.state();
    let first_pass = run(&layer)?;
    assert_ne!(first_pass[0], first_pass[1]);
    generator.restore(state);
    assert_eq!(run(&layer)?, first_pass, "a recomputed block");
    let resumed = Dropout::with_generator(0.5, Arc::new(MaskGenerator::from(state)))?;
    assert_eq!(run(&resumed)?, first_pass, "a resumed run");
    Ok(())
}

#[test]
fn models_trained_side_by_side_give_what_they_give_alone() -> Result<()> {
    let train = |seed: u64| -> Result<Vec<Vec<u64>>> {
        let generator = generator(seed);
        let layers = [
            Dropout::with_generator(0.2, generator.clone())?,
            Dropout::with_generator(0.5, generator)?,
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
