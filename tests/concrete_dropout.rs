//! Dropout at a rate that learns: what the op gives on average and at both ends, and the layer.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::concrete_dropout;
use candle_dropout::training::{AdamW, ParamGroup, Progress, TrainingState, named_vars};
use candle_dropout::{
    ConcreteDropout, ConcreteDropoutConfig, DropMask, MaskGenerator, MaskKey, Rate, compose,
    seeded_var_builder,
};
use candle_nn::{Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap, linear};
use cases::runner::{gradient, same_bits};
use cases::{DTYPES, bits, mask, random};

const CPU: &Device = &Device::Cpu;

fn sigmoid(x: f64) -> f64 {
    1. / (1. + (-x).exp())
}

#[test]
fn the_mean_of_what_is_kept_is_that_of_a_quadrature() -> Result<()> {
    const N: usize = 1 << 20;
    let x = Tensor::ones((N / 256, 256), DType::F32, CPU)?;
    for logit in [-2.2, 0., 1.5] {
        for temperature in [0.05, 0.1, 2. / 3., 2.] {
            let gain = |i: usize| {
                let u = (i as f64 + 0.5) / N as f64;
                let z = sigmoid((logit + u.ln() - (-u).ln_1p()) / temperature);
                (1. - z) / (1. - sigmoid(logit))
            };
            let moment = |power: i32| (0..N).map(|i| gain(i).powi(power)).sum::<f64>() / N as f64;
            let (mean, square) = (moment(1), moment(2));
            let sigma = ((square - mean * mean) / N as f64).sqrt();
            let logit_p = Tensor::new(logit, CPU)?;
            let y = concrete_dropout(&x, &logit_p, temperature, &mask(0.5))?;
            let ours = y.to_dtype(DType::F64)?.mean_all()?.to_scalar::<f64>()?;
            let off = (ours - mean) / sigma;
            assert!(off.abs() < 4.5, "logit {logit}, temperature {temperature}: {off} sigma");
        }
    }
    Ok(())
}

#[test]
fn more_than_half_is_dropped_at_the_rate_whatever_the_temperature() -> Result<()> {
    const N: usize = 1 << 20;
    let x = Tensor::ones((8, N / 8), DType::F32, CPU)?;
    for logit in [-5., -2.2, 0., 3.] {
        let p = sigmoid(logit);
        for temperature in [0.1, 2.] {
            let y = concrete_dropout(&x, &Tensor::new(logit, CPU)?, temperature, &mask(0.5))?;
            let dropped =
                y.lt(0.5 / (1. - p))?.to_dtype(DType::F64)?.mean_all()?.to_scalar::<f64>()?;
            let off = (dropped - p) / (p * (1. - p) / N as f64).sqrt();
            assert!(off.abs() < 4.5, "logit {logit}, temperature {temperature}: {off} sigma");
        }
    }
    Ok(())
}

#[test]
fn at_both_ends_of_the_rate_all_is_kept_or_nothing_and_gradients_are_finite() -> Result<()> {
    both_ends()?;
    let _composed = compose();
    both_ends()
}

fn both_ends() -> Result<()> {
    for dtype in DTYPES {
        let x = Var::from_tensor(&random(&[37, 131], dtype, 1)?)?;
        for logit in [-1e30, -100., -60., 60., 100., 1e30] {
            let logit_p = Var::new(logit, CPU)?;
            let y = concrete_dropout(&x, &logit_p, 0.1, &mask(0.5))?;
            let grads = y.backward()?;
            let expected = if logit < 0. { x.as_tensor().clone() } else { x.zeros_like()? };
            let differs =
                (&y - expected)?.to_dtype(DType::F64)?.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(differs < 1e-15, "{dtype:?}, logit {logit}: off by {differs}");
            let dlogit_p = grads.get(&logit_p).expect("a gradient").to_scalar::<f64>()?;
            assert!(dlogit_p.abs() < 1e-15, "{dtype:?}, logit {logit}: {dlogit_p}");
        }
        // Near the ends, where the rate itself rounds to 0 or 1 in f32.
        for (logit, temperature) in [(-40., 0.1), (40., 1.), (59., 1.), (-59., 3.)] {
            let logit_p = Var::new(logit, CPU)?;
            let y = (concrete_dropout(&x, &logit_p, temperature, &mask(0.5))? * 1e-6)?;
            let grads = y.to_dtype(DType::F32)?.backward()?;
            let dlogit_p = grads.get(&logit_p).expect("a gradient").to_scalar::<f64>()?;
            assert!(dlogit_p.is_finite(), "{dtype:?}, logit {logit}");
        }
    }
    Ok(())
}

#[test]
fn a_rate_that_is_no_number_shows() -> Result<()> {
    let x = random(&[3, 5], DType::F32, 1)?;
    let y = concrete_dropout(&x, &Tensor::new(f32::NAN, CPU)?, 0.1, &mask(0.5))?;
    assert!(y.flatten_all()?.to_vec1::<f32>()?.iter().all(|y| y.is_nan()));
    Ok(())
}

#[test]
fn the_logit_may_have_a_dtype_and_a_shape_of_its_own() -> Result<()> {
    let x = random(&[7, 33], DType::BF16, 1)?;
    let expected = concrete_dropout(&x, &Tensor::new(-0.5f32, CPU)?, 0.1, &mask(0.5))?;
    for dtype in DTYPES {
        let logit_p = Var::from_tensor(&Tensor::new(&[[-0.5f32]], CPU)?.to_dtype(dtype)?)?;
        let y = concrete_dropout(&x, &logit_p, 0.1, &mask(0.5))?;
        same_bits(&y, &expected, "y")?;
        let grads = y.backward()?;
        let grad = grads.get(&logit_p).expect("a gradient");
        assert_eq!((grad.dims(), grad.dtype()), (&[1, 1][..], dtype));
    }
    Ok(())
}

#[test]
fn a_part_with_its_window_draws_what_the_whole_does() -> Result<()> {
    let (x, logit_p) =
        (Var::from_tensor(&random(&[4, 6, 43], DType::F32, 1)?)?, Tensor::new(-1f32, CPU)?);
    let (drop, dy) = (mask(0.5), random(&[4, 6, 43], DType::F32, 2)?);
    let whole = concrete_dropout(&x, &logit_p, 0.5, &drop)?;
    for (dim, cut) in [(0, 1), (1, 4), (2, 3), (2, 8)] {
        let part = |start: usize, len: usize| {
            let mut at = [0; 3];
            at[dim] = start;
            let x = x.narrow(dim, start, len)?;
            concrete_dropout(&x, &logit_p, 0.5, &drop.window(&[4, 6, 43], &at))
        };
        let parts = Tensor::cat(&[part(0, cut)?, part(cut, x.dim(dim)? - cut)?], dim)?;
        let what = format!("dimension {dim} at {cut}");
        same_bits(&parts, &whole, &what)?;
        same_bits(&gradient(&parts, &dy, &x)?, &gradient(&whole, &dy, &x)?, &what)?;
    }
    Ok(())
}

#[test]
fn without_a_mask_x_itself_comes_back_and_the_rate_counts_nothing() -> Result<()> {
    let x = random(&[3, 5], DType::F32, 1)?;
    let logit_p = Tensor::new(1f32, CPU)?;
    let y = concrete_dropout(&x, &logit_p, 0.1, &DropMask::none())?;
    assert_eq!(y.id(), x.id());
    let learnt = Var::new(1f32, CPU)?;
    let y = concrete_dropout(&x, &learnt, 0.1, &DropMask::none())?;
    same_bits(&y, &x, "y")?;
    assert_eq!(y.backward()?.get(&learnt).expect("a gradient").to_scalar::<f32>()?, 0.);
    let at =
        |rate| concrete_dropout(&x, &logit_p, 0.1, &DropMask::with_rate(rate, MaskKey::new(3)));
    same_bits(&at(Rate::DROP_ALL)?, &at(Rate::new(0.1)?)?, "another rate")
}

#[track_caller]
fn fails<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("an error").to_string();
    assert!(parts.iter().all(|part| message.contains(part)), "{message}");
}

#[test]
fn errors_name_op_argument_expected_got_and_remedy() -> Result<()> {
    let (x, logit_p) = (random(&[3, 5], DType::F32, 1)?, Tensor::new(&[0f32], CPU)?);
    let call = |x: &Tensor, logit_p: &Tensor, t: f64| concrete_dropout(x, logit_p, t, &mask(0.5));
    let integers = x.to_dtype(DType::U32)?;
    fails(call(&integers, &logit_p, 0.1), &["concrete_dropout: x: expected dtype", "got U32"]);
    fails(call(&x, &integers, 0.1), &["concrete_dropout: logit_p: expected dtype", "got U32"]);
    let shape =
        ["concrete_dropout: logit_p: expected one element", "got shape [3, 5]; call this for each"];
    fails(call(&x, &x, 0.1), &shape);
    for temperature in [0., -0.1, f64::NAN, f64::INFINITY, 1e-60] {
        let temperature_is = ["concrete_dropout: temperature: expected a positive number", "0.1"];
        fails(call(&x, &logit_p, temperature), &temperature_is);
    }
    let window = mask(0.5).window(&[3, 4], &[0, 0]);
    fails(concrete_dropout(&x, &logit_p, 0.1, &window), &["concrete_dropout: drop.window: "]);
    let wide = mask(0.5).window(&[3, 1 << 35], &[0, 1 << 34]);
    fails(
        concrete_dropout(&x, &logit_p, 0.1, &wide),
        &["concrete_dropout: x: expected at most 2^34"],
    );

    let defaults = ConcreteDropoutConfig::default();
    let layer =
        |config| ConcreteDropout::new(config, generator(), VarBuilder::zeros(DType::F32, CPU));
    for (init_min, init_max) in [(0., 0.1), (0.2, 0.1), (0.1, 1.), (f64::NAN, 0.1)] {
        let config = ConcreteDropoutConfig { init_min, init_max, ..defaults };
        fails(
            layer(config),
            &["concrete_dropout: init_min, init_max: expected 0 < init_min", "the usual"],
        );
    }
    let config = ConcreteDropoutConfig { temperature: 0., ..defaults };
    fails(layer(config), &["concrete_dropout: temperature: expected a positive number, got 0"]);
    for factor in [-1e-6, f64::NAN, f64::INFINITY] {
        let config = ConcreteDropoutConfig { weight_regularizer: factor, ..defaults };
        fails(
            layer(config),
            &["concrete_dropout: weight_regularizer: expected a finite number", "divide by"],
        );
        let config = ConcreteDropoutConfig { dropout_regularizer: factor, ..defaults };
        fails(
            layer(config),
            &["concrete_dropout: dropout_regularizer: expected a finite number", "divide by"],
        );
    }
    Ok(())
}

fn generator() -> Arc<MaskGenerator> {
    Arc::new(MaskGenerator::new(5))
}

/// A layer whose rate is a variable with this logit.
fn layer(
    logit: f64,
    config: ConcreteDropoutConfig,
) -> Result<(ConcreteDropout, Var, Arc<MaskGenerator>)> {
    let (vars, generator) = (VarMap::new(), generator());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, CPU);
    let layer = ConcreteDropout::new(config, generator.clone(), vb.pp("drop"))?;
    let var = named_vars(&vars)?.remove("drop.p_logit").expect("its variable");
    var.set(&Tensor::new(&[logit], CPU)?)?;
    Ok((layer, var, generator))
}

#[test]
fn a_call_draws_one_key_in_training_and_in_evaluation_it_is_the_identity() -> Result<()> {
    let (layer, _, generator) = layer(-1., ConcreteDropoutConfig::default())?;
    let (x, begin) = (random(&[3, 5], DType::F64, 1)?, generator.state());
    assert_eq!(layer.forward(&x, false)?.id(), x.id());
    assert_eq!(generator.state(), begin);
    let y = layer.forward(&x, true)?;
    assert_eq!(generator.state().counter, begin.counter + 1);
    let drop = DropMask::new(0.5, MaskKey::derive(begin.seed, begin.counter))?;
    same_bits(&y, &concrete_dropout(&x, &Tensor::new(-1f64, CPU)?, 0.1, &drop)?, "the key")
}

#[test]
fn the_first_rate_lies_where_the_configuration_says() -> Result<()> {
    let first = |init_min, init_max, seed| {
        let config = ConcreteDropoutConfig { init_min, init_max, ..Default::default() };
        let vars = VarMap::new();
        let vb = seeded_var_builder(&vars, seed, DType::F32, CPU);
        ConcreteDropout::new(config, generator(), vb)?.drop_p()
    };
    assert!((first(0.1, 0.1, 1)? - 0.1).abs() < 1e-7);
    let drawn = (0..50).map(|seed| first(0.2, 0.4, seed)).collect::<Result<Vec<_>>>()?;
    assert!(drawn.iter().all(|p| (0.2..0.4).contains(p)), "{drawn:?}");
    assert!(drawn.iter().any(|p| *p < 0.25) && drawn.iter().any(|p| *p > 0.35), "{drawn:?}");
    Ok(())
}

/// `(value, derivative by the logit)` as the paper has it.
fn regularizer(
    logit: f64,
    squares: f64,
    config: &ConcreteDropoutConfig,
    input_dim: f64,
) -> [f64; 2] {
    let (p, keep_p) = (sigmoid(logit), sigmoid(-logit));
    let weights = config.weight_regularizer * squares / keep_p;
    let dropout = config.dropout_regularizer * input_dim;
    let entropy = p * p.ln() + keep_p * keep_p.ln();
    [weights + dropout * entropy, weights * p + dropout * p * keep_p * logit]
}

#[test]
fn the_regularizer_and_its_gradients_are_those_of_the_formula() -> Result<()> {
    let weight = Var::from_tensor(&random(&[6, 4], DType::F64, 1)?)?;
    let squares = weight.sqr()?.sum_all()?.to_scalar::<f64>()?;
    for (weight_regularizer, dropout_regularizer) in [(1e-2, 0.3), (0., 0.3), (1e-2, 0.), (0., 0.)]
    {
        let config =
            ConcreteDropoutConfig { weight_regularizer, dropout_regularizer, ..Default::default() };
        for logit in [-55., -2.2, 0., 0.7, 4., 30.] {
            let (layer, var, _) = layer(logit, config)?;
            let loss = layer.regularizer(&weight, 4)?;
            let grads = loss.backward()?;
            let dlogit = grads.get(&var).expect("a gradient").to_vec1::<f64>()?[0];
            let [value, slope] = regularizer(logit, squares, &config, 4.);
            let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * (1. + b.abs());
            assert!(near(loss.to_scalar::<f64>()?, value), "{config:?} {logit}");
            assert!(near(dlogit, slope), "{config:?} {logit}: {dlogit}, not {slope}");
            let dweight = grads.get(&weight).expect("a gradient");
            let expected = (weight.as_tensor() * (2. * weight_regularizer / sigmoid(-logit)))?;
            let scale = 1. + weight_regularizer / sigmoid(-logit);
            assert!(cases::error(dweight, &expected)? <= 1e-13 * scale, "{config:?} {logit}");
        }
    }
    Ok(())
}

#[test]
fn in_halves_the_regularizer_is_computed_in_f32() -> Result<()> {
    let (layer, _, _) = layer(-2., ConcreteDropoutConfig::default())?;
    let weight = Tensor::full(300f32, (40, 40), CPU)?.to_dtype(DType::F16)?;
    let loss = layer.regularizer(&weight, 40)?;
    let [expected, _] = regularizer(-2., 300. * 300. * 1600., layer.config(), 40.);
    assert!((f64::from(loss.to_scalar::<f32>()?) / expected - 1.).abs() < 1e-6);
    Ok(())
}

/// A training of one layer whose input is dropped.
struct Training {
    dropout: ConcreteDropout,
    head: Linear,
    vars: VarMap,
    generator: Arc<MaskGenerator>,
    adamw: AdamW,
}

impl Training {
    fn new(seed: u64) -> Result<Self> {
        let (vars, generator) = (VarMap::new(), Arc::new(MaskGenerator::new(seed)));
        let vb = seeded_var_builder(&vars, seed, DType::F32, CPU);
        let config = ConcreteDropoutConfig { dropout_regularizer: 1e-2, ..Default::default() };
        let dropout = ConcreteDropout::new(config, generator.clone(), vb.pp("dropout"))?;
        let head = linear(8, 2, vb.pp("head"))?;
        let groups = vec![ParamGroup::new(&named_vars(&vars)?)];
        let adamw = AdamW::from_groups(groups, ParamsAdamW { lr: 0.05, ..Default::default() })?;
        Ok(Self { dropout, head, vars, generator, adamw })
    }

    fn step(&mut self) -> Result<()> {
        let x = random(&[16, 8], DType::F32, 3)?;
        let y = self.head.forward(&self.dropout.forward(&x, true)?)?;
        let loss = (y - 1.)?.sqr()?.mean_all()?;
        let loss = (loss + self.dropout.regularizer(self.head.weight(), 8)?)?;
        self.adamw.backward_step(&loss)
    }

    fn state(&self) -> Result<TrainingState> {
        Ok(TrainingState::new(&named_vars(&self.vars)?).with_masks("dropout", &self.generator))
    }
}

#[test]
fn a_training_that_is_loaded_goes_on_with_its_rate_and_its_masks() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("concrete-dropout-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("state.safetensors");
    let mut saved = Training::new(1)?;
    (0..5).try_for_each(|_| saved.step())?;
    assert!((saved.dropout.drop_p()? - 0.1).abs() > 1e-3, "the rate has learnt nothing");
    saved.state()?.save(&path, &saved.adamw, &Progress { step: 5, ..Default::default() })?;
    let mut loaded = Training::new(2)?;
    assert_eq!(loaded.state()?.load(&path, &mut loaded.adamw)?.step, 5);
    std::fs::remove_dir_all(&folder)?;
    for training in [&mut saved, &mut loaded] {
        (0..5).try_for_each(|_| training.step())?;
    }
    let [ours, theirs] = [named_vars(&loaded.vars)?, named_vars(&saved.vars)?];
    for (name, var) in &ours {
        assert_eq!(bits(var)?, bits(&theirs[name])?, "{name}");
    }
    Ok(())
}
