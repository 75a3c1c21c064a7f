//! Rates that follow schedules, in layers, in a model and across a saved training; max-norm; weight scaling.

use std::sync::Arc;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_dropout::nn::Linear;
use candle_dropout::training::{
    AdamW, MaxNorm, NamedVars, ParamGroup, ParamsAdamW, Progress, TrainingState, named_vars,
};
use candle_dropout::{
    ClassicDropout, DropPath, Dropout, MaskGenerator, RateClock, RateSchedule, Transformer,
    TransformerConfig, TransformerRates, seeded_var_builder,
};
use candle_nn::VarMap;
use cases::{DTYPES, bits, random};
use proptest::prelude::*;

fn generator(seed: u64) -> Arc<MaskGenerator> {
    Arc::new(MaskGenerator::new(seed))
}

// ---- schedules ----

#[test]
fn schedules_have_their_closed_forms() -> Result<()> {
    let at = |schedule: RateSchedule, steps: [usize; 5]| steps.map(|step| schedule.at(step));
    let steps = [0, 1, 5, 10, 1000];
    assert_eq!(at(RateSchedule::constant(0.3)?, steps), [0.3; 5]);
    assert_eq!(at(RateSchedule::linear(0.4, 0.2, 10)?, steps), [0.4, 0.38, 0.3, 0.2, 0.2]);
    let cosine = |step: f64| (0.1 + 0.2 * (1. + (std::f64::consts::PI * step / 10.).cos())) as f32;
    let expected = [0.5, cosine(1.), cosine(5.), 0.1, 0.1];
    assert_eq!(at(RateSchedule::cosine(0.5, 0.1, 10)?, steps), expected);
    assert_eq!(at(RateSchedule::early(0.1, 5)?, steps), [0.1, 0.1, 0., 0., 0.]);
    assert_eq!(at(RateSchedule::early_linear(0.1, 10)?, steps), [0.1, 0.09, 0.05, 0., 0.]);
    assert_eq!(at(RateSchedule::late(0.1, 5)?, steps), [0., 0., 0.1, 0.1, 0.1]);
    assert_eq!(at(RateSchedule::late_ramp(0.1, 5, 10)?, steps), [0., 0., 0., 0.05, 0.1]);
    assert_eq!(at(RateSchedule::ramp(0.1, 10)?, steps), [0., 0.01, 0.05, 0.1, 0.1]);
    let curriculum = RateSchedule::curriculum(0.5, 0.1)?;
    let morerio = |step: f64| (0.5 * (1. - (-0.1 * step).exp())) as f32;
    assert_eq!(at(curriculum, steps), [0., morerio(1.), morerio(5.), morerio(10.), 0.5]);
    Ok(())
}

#[test]
fn depths_have_their_share_of_the_last_rate() -> Result<()> {
    let last = RateSchedule::constant(0.3)?;
    let paper = (1..=4).map(|layer| Ok(last.at_layer(layer, 4)?.at(0)));
    assert_eq!(paper.collect::<Result<Vec<_>>>()?, [0.075, 0.15, 0.225, 0.3]);
    let timm = (0..4).map(|block| Ok(last.at_block(block, 4)?.at(0)));
    assert_eq!(timm.collect::<Result<Vec<_>>>()?, [0., 0.1, 0.2, 0.3]);
    assert_eq!(last.at_block(0, 1)?.at(0), 0., "a single block");
    // As a layer has them itself.
    for layer in 1..=7 {
        let itself = DropPath::linear(layer, 7, 0.3, generator(1))?.drop_p();
        let followed = RateClock::new().rate(last.at_layer(layer, 7)?).drop_p();
        assert!((itself - followed).abs() <= f32::EPSILON, "{itself}, {followed}");
    }
    Ok(())
}

proptest! {
    /// Whatever the numbers, a rate is a probability between its ends.
    #[test]
    fn rates_lie_between_their_ends(from in 0f64..=1., to in 0f64..=1., steps in 1usize..50, step in 0usize..100) {
        let (low, high) = (from.min(to) as f32, from.max(to) as f32);
        for schedule in [RateSchedule::linear(from, to, steps), RateSchedule::cosine(from, to, steps)] {
            let drop_p = schedule.unwrap().at(step);
            prop_assert!((low..=high).contains(&drop_p), "{drop_p} of {from} to {to}");
        }
        let curriculum = RateSchedule::curriculum(to, 1. / steps as f64).unwrap().at(step);
        prop_assert!((0. ..=to as f32).contains(&curriculum));
    }
}

#[test]
fn errors_name_op_argument_expected_got_and_remedy() -> Result<()> {
    let fails = |error: candle_core::Error, expected: &str| {
        assert!(error.to_string().contains(expected), "{expected:?} is missing from: {error}");
    };
    for drop_p in [-0.1, 1.1, f64::NAN] {
        let expected = "rate schedule: drop_p: expected a probability of dropping in [0, 1], got";
        fails(RateSchedule::constant(drop_p).unwrap_err(), expected);
        fails(RateSchedule::linear(0., drop_p, 3).unwrap_err(), expected);
        fails(RateSchedule::cosine(drop_p, 0., 3).unwrap_err(), expected);
        fails(RateSchedule::early(drop_p, 3).unwrap_err(), expected);
        fails(RateSchedule::late_ramp(drop_p, 3, 3).unwrap_err(), expected);
        fails(RateSchedule::curriculum(drop_p, 1.).unwrap_err(), expected);
    }
    fails(
        RateSchedule::ramp(0.1, 0).unwrap_err(),
        "rate schedule: steps: expected at least 1, got 0",
    );
    fails(
        RateSchedule::curriculum(0.1, 0.).unwrap_err(),
        "gamma: expected a positive number, got 0",
    );
    let last = RateSchedule::constant(0.1)?;
    fails(last.at_layer(0, 3).unwrap_err(), "layer: expected 1 to n_layer 3, got 0");
    fails(
        last.at_block(3, 3).unwrap_err(),
        "block: expected 0 to n_block - 1 for n_block 3, got 3",
    );
    let mut layer = Dropout::new(0.5).following(&RateClock::new().rate(last));
    fails(
        layer.set_drop_p(0.2).unwrap_err(),
        "dropout: drop_p: expected a layer with a rate of its own",
    );
    assert_eq!(layer.drop_p(), 0.1);
    for max_norm in [0., -1., f64::NAN, f64::INFINITY] {
        fails(
            MaxNorm::new(max_norm).unwrap_err(),
            "max_norm: max_norm: expected a positive number",
        );
    }
    let norm = MaxNorm::new(1.)?;
    let (good, ids) = (
        Var::ones((2, 3), DType::F32, &Device::Cpu)?,
        Var::ones((2, 3), DType::U32, &Device::Cpu)?,
    );
    fails(
        norm.apply([&good, &ids]).unwrap_err(),
        "max_norm: vars[1]: expected dtype f32, f64, f16 or bf16, got U32",
    );
    let bias = Var::ones(3, DType::F32, &Device::Cpu)?;
    fails(
        norm.apply([&good, &bias]).unwrap_err(),
        "max_norm: vars[1]: expected weights with units in dimension 0",
    );
    assert_eq!(good.to_vec2::<f32>()?, [[1.; 3]; 2], "nothing is changed where one is refused");
    Ok(())
}

// ---- layers that follow ----

/// A schedule that passes through 0 shifts the masks of no other site.
#[test]
fn a_schedule_that_passes_through_zero_shifts_no_other_site() -> Result<()> {
    let x = random(&[7, 40], DType::F32, 1)?;
    let others = |schedule: RateSchedule| -> Result<Vec<Vec<u64>>> {
        let (masks, clock) = (generator(3), RateClock::new());
        let first = Dropout::with_generator(0., masks.clone())?.following(&clock.rate(schedule));
        let second = Dropout::with_generator(0.5, masks)?;
        (0..4)
            .map(|step| {
                clock.set_step(step);
                let y = first.forward(&x, true)?;
                assert_eq!(bits(&y)? == bits(&x)?, schedule.at(step) == 0., "step {step}");
                assert_eq!(bits(&first.forward(&x, false)?)?, bits(&x)?, "evaluation");
                bits(&second.forward(&x, true)?)
            })
            .collect()
    };
    let constant = others(RateSchedule::constant(0.3)?)?;
    assert_eq!(others(RateSchedule::early(0.3, 2)?)?, constant);
    assert_eq!(others(RateSchedule::late_ramp(0.3, 1, 2)?)?, constant);
    Ok(())
}

#[test]
fn one_clock_moves_every_site_of_a_model() -> Result<()> {
    let config = TransformerConfig {
        vocab_size: 16,
        max_position_embeddings: 8,
        hidden_size: 8,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        drop_path_rate: 0.,
        ..TransformerConfig::gpt2()
    };
    let ids = Tensor::new(&[[1u32, 2, 3], [4, 5, 6]], &Device::Cpu)?;
    let logits = |config: TransformerConfig, rates: Option<TransformerRates>| {
        let vb = seeded_var_builder(&VarMap::new(), 1, DType::F32, &Device::Cpu);
        let model = Transformer::new(&config, generator(5), vb)?;
        let model = match rates {
            Some(rates) => model.following(&rates)?,
            None => model,
        };
        bits(&model.forward(&ids, true)?)
    };
    let clock = RateClock::new();
    let ramp = |drop_p| -> Result<_> { Ok(Some(clock.rate(RateSchedule::ramp(drop_p, 4)?))) };
    let rates = TransformerRates {
        embd_pdrop: ramp(0.4)?,
        attn_pdrop: ramp(0.8)?,
        resid_pdrop: ramp(0.2)?,
        drop_path_rate: ramp(0.6)?,
    };
    for step in [0, 1, 2, 4] {
        clock.set_step(step);
        let share = step as f32 / 4.;
        let configured = TransformerConfig {
            embd_pdrop: 0.4 * share,
            attn_pdrop: 0.8 * share,
            resid_pdrop: 0.2 * share,
            drop_path_rate: 0.6 * share,
            ..config.clone()
        };
        let expected = logits(configured, None)?;
        assert_eq!(logits(config.clone(), Some(rates.clone()))?, expected, "step {step}");
        let alone =
            TransformerRates { resid_pdrop: rates.resid_pdrop.clone(), ..Default::default() };
        let differs = logits(config.clone(), Some(alone))? != expected;
        assert!(differs, "step {step}: the others keep the rates of the configuration");
    }
    Ok(())
}

/// A run that is stopped and resumed has the rates and the masks of one that is not, and another schedule is refused.
#[test]
fn a_saved_training_resumes_rates_and_masks() -> Result<()> {
    struct Run {
        clock: RateClock,
        state: TrainingState,
        adamw: AdamW,
        layers: [Dropout; 2],
        weight: Var,
    }
    fn run(last: f64) -> Result<Run> {
        let map = VarMap::new();
        let vb = seeded_var_builder(&map, 1, DType::F32, &Device::Cpu);
        vb.get_with_hints((5, 6), "weight", candle_nn::init::ZERO)?;
        let vars: NamedVars = named_vars(&map)?;
        let adamw = AdamW::from_groups(vec![ParamGroup::new(&vars)], ParamsAdamW::default())?;
        let (masks, clock) = (generator(9), RateClock::new());
        let ramp = clock.rate(RateSchedule::ramp(last, 8)?);
        let early = clock.rate(RateSchedule::early(0.5, 6)?);
        let layer = |rate| {
            Ok::<_, candle_core::Error>(Dropout::with_generator(0., masks.clone())?.following(rate))
        };
        let layers = [layer(&ramp)?, layer(&early)?];
        let state = TrainingState::new(&vars).with_masks("masks", &masks);
        let state = state.with_rate("ramp", &ramp).with_rate("early", &early);
        Ok(Run { clock, state, adamw, layers, weight: vars["weight"].clone() })
    }
    impl Run {
        fn steps(&mut self, steps: std::ops::Range<usize>) -> Result<Vec<u64>> {
            let mut seen = Vec::new();
            for step in steps {
                self.clock.set_step(step);
                let x = Tensor::ones((5, 6), DType::F32, &Device::Cpu)?;
                let x = self.layers.iter().try_fold(x, |x, layer| layer.forward(&x, true))?;
                seen.extend(bits(&x)?);
                let loss = (self.weight.as_tensor() - x)?.sqr()?.sum_all()?;
                candle_nn::Optimizer::backward_step(&mut self.adamw, &loss)?;
            }
            seen.extend(bits(self.weight.as_tensor())?);
            Ok(seen)
        }
    }
    let path = std::env::temp_dir().join(format!("candle-dropout-rates-{}", std::process::id()));
    let mut whole = run(0.8)?;
    whole.steps(0..5)?;
    whole.state.save(&path, &whole.adamw, &Progress { step: 5, ..Default::default() })?;
    let expected = whole.steps(5..10)?;

    let mut resumed = run(0.8)?;
    let progress = resumed.state.load(&path, &mut resumed.adamw)?;
    assert_eq!(
        (progress.step, resumed.clock.step()),
        (5, 4),
        "the clock stands where it was saved"
    );
    assert_eq!(resumed.steps(5..10)?, expected);

    let mut other = run(0.7)?;
    let error = other.state.load(&path, &mut other.adamw).unwrap_err().to_string();
    assert!(
        error.contains("schedules: ramp: expected") && error.contains("another training"),
        "{error}"
    );
    assert_eq!(other.clock.step(), 0, "nothing is changed");
    let twice = run(0.8)?;
    let rate = RateClock::new().rate(RateSchedule::constant(0.1)?);
    let twice =
        twice.state.with_rate("ramp", &rate).save(&path, &twice.adamw, &Progress::default());
    assert!(twice.unwrap_err().to_string().contains("schedules: ramp: expected each name once"));
    std::fs::remove_file(&path)?;
    Ok(())
}

// ---- max-norm ----

#[test]
fn norms_of_units_stay_within_the_ball() -> Result<()> {
    for dtype in DTYPES {
        for (dims, unit_dim) in [(vec![7, 13], 0), (vec![7, 13], 1), (vec![4, 3, 3, 3], 0)] {
            let before = random(&dims, dtype, 3)?;
            let var = Var::from_tensor(&before)?;
            MaxNorm::new(3.)?.with_unit_dim(unit_dim).apply([&var])?;
            let others: Vec<usize> = (0..dims.len()).filter(|d| *d != unit_dim).collect();
            let norms = |x: &Tensor| -> Result<Vec<f64>> {
                x.to_dtype(DType::F64)?.sqr()?.sum(others.clone())?.sqrt()?.to_vec1()
            };
            let (before_norms, after) = (norms(&before)?, norms(var.as_tensor())?);
            assert!(before_norms.iter().any(|norm| *norm > 3.), "the case has something to do");
            let epsilon = cases::epsilon(dtype) * 4.;
            for (unit, (before_norm, after)) in before_norms.into_iter().zip(after).enumerate() {
                let expected = before_norm.min(3.);
                assert!(
                    (after - expected).abs() <= epsilon * 3.,
                    "{dtype:?} {dims:?}: {before_norm} became {after}"
                );
                if before_norm < 3. * (1. - epsilon) {
                    let same = |x: &Tensor| bits(&x.get_on_dim(unit_dim, unit)?);
                    assert_eq!(
                        same(&before)?,
                        same(var.as_tensor())?,
                        "what is within keeps its bits"
                    );
                }
            }
        }
    }
    // Neither too large nor too small to be squared.
    let var = Var::from_tensor(&Tensor::new(
        &[[3e30f32, 4e30], [3e-30, 4e-30], [0., 0.]],
        &Device::Cpu,
    )?)?;
    MaxNorm::new(1e-10)?.apply([&var])?;
    let [long, short, zero] = [0, 1, 2].map(|row| var.get(row).unwrap().to_vec1::<f32>().unwrap());
    assert!((long[0] / 6e-11 - 1.).abs() < 1e-6 && (long[1] / 8e-11 - 1.).abs() < 1e-6, "{long:?}");
    assert_eq!((short, zero), (vec![3e-30, 4e-30], vec![0., 0.]));
    Ok(())
}

// ---- the original form ----

#[test]
fn classic_dropout_scales_in_evaluation_and_its_weights_can_instead() -> Result<()> {
    for dtype in DTYPES {
        for drop_p in [0., 0.3, 0.5, 1.] {
            let (layer, x) =
                (ClassicDropout::new(drop_p, generator(4))?, random(&[9, 6], dtype, 2)?);
            let drop = ClassicDropout::new(drop_p, generator(4))?.next_mask(true)?;
            let keep = drop.to_tensor((9, 6), &Device::Cpu)?;
            let expected = keep.where_cond(&x, &x.zeros_like()?)?;
            assert_eq!(bits(&layer.forward(&x, true)?)?, bits(&expected)?, "{dtype:?} at {drop_p}");
            let keep_p = layer.keep_p()?;
            let scaled = (&x.to_dtype(DType::F64)? * keep_p)?.to_dtype(dtype)?;
            let eval = layer.forward(&x, false)?;
            let distance =
                cases::error(&eval.to_dtype(DType::F64)?, &scaled.to_dtype(DType::F64)?)?;
            assert!(distance <= 2. * cases::epsilon(dtype), "{dtype:?} at {drop_p}: {distance}");

            let linear = Linear::new(random(&[5, 6], dtype, 7)?, Some(random(&[5], dtype, 8)?));
            let (with, without) =
                (linear.forward(&eval)?, layer.to_weight_scaled(&linear)?.forward(&x)?);
            let distance =
                cases::error(&with.to_dtype(DType::F64)?, &without.to_dtype(DType::F64)?)?;
            // Six products of numbers up to 2, each rounded after its factors.
            assert!(
                distance <= 6. * 4. * 3. * cases::epsilon(dtype),
                "{dtype:?} at {drop_p}: {distance}"
            );
        }
    }
    // The expectation of training is the evaluation: a mean over many calls, to 4.5 sigma of the mean.
    let (layer, x) =
        (ClassicDropout::new(0.3, generator(4))?, Tensor::ones(100_000, DType::F64, &Device::Cpu)?);
    let mean = layer.forward(&x, true)?.mean_all()?.to_scalar::<f64>()?;
    let keep_p = layer.keep_p()?;
    assert!((mean - keep_p).abs() < 4.5 * (keep_p * (1. - keep_p) / 1e5).sqrt(), "{mean}");
    Ok(())
}
