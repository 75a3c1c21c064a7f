//! What holds of every layer that drops or adds noise: one table, and the facts over all of it, which is why it is one
//! text.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_dropout::training::{
    AdamW, NamedVars, ParamGroup, ParamsAdamW, Progress, TrainingState, named_vars,
};
use candle_dropout::{
    AlphaDropout, BroadcastDropout, ClassicDropout, ConcreteDropout, ConcreteDropoutConfig, Cutout,
    DropBlock2d, DropConnectConv2d, DropConnectLinear, DropHead, DropPath, Dropout, Dropout1d,
    Dropout2d, Dropout3d, EmbeddingDropout, FeatureAlphaDropout, GaussianDropout, GaussianNoise,
    Gru, LayerDrop, LockedDropout, LoraConfig, LoraLinear, Lstm, MaskGenerator, MultiHeadAttention,
    MultiHeadAttentionConfig, MultiSampleDropout, RateClock, RateSchedule, RecurrentDropout,
    ScheduledRate, Switched, TokenDropout, TrainMode, VariationalConv2d, VariationalLinear,
    Zoneout, seeded_var_builder,
};
use candle_nn::{Optimizer, VarBuilder, VarMap};
use cases::{DTYPES, bits, random};

use super::generator;

/// A layer as a function of its input and of `train`.
struct Layer(Box<Forward>);

type Forward = dyn Fn(&Tensor, bool) -> Result<Tensor>;

impl ModuleT for Layer {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        (self.0)(xs, train)
    }
}

fn layer(f: impl Fn(&Tensor, bool) -> Result<Tensor> + 'static) -> Result<Layer> {
    Ok(Layer(Box::new(f)))
}

fn module(module: impl ModuleT + 'static) -> Result<Layer> {
    layer(move |xs, train| module.forward_t(xs, train))
}

/// What a layer is built from.
struct Parts<'a> {
    masks: Arc<MaskGenerator>,
    vb: VarBuilder<'a>,
    /// A rate to follow, for layers that have one.
    rate: Option<ScheduledRate>,
}

/// Of a rate of one's own.
const DROP_P: f64 = 0.5;

/// The layer, following the rate if there is one.
macro_rules! followed {
    ($layer:expr, $parts:expr) => {{
        let layer = $layer;
        match &$parts.rate {
            Some(rate) => layer.following(rate),
            None => layer,
        }
    }};
}

struct Entry {
    name: &'static str,
    new: fn(Parts<'_>) -> Result<Layer>,
    /// The shape of its input.
    dims: &'static [usize],
    /// Keys that a call draws in training.
    keys: u64,
    /// Whether it gives back its input where nothing is dropped.
    is_identity: bool,
    /// Whether it has a rate that follows a schedule, at which nothing happens if it is 0.
    follows: bool,
}

const fn entry(
    name: &'static str,
    dims: &'static [usize],
    new: fn(Parts<'_>) -> Result<Layer>,
) -> Entry {
    Entry { name, new, dims, keys: 1, is_identity: true, follows: true }
}

impl Entry {
    /// Has weights: evaluation is a projection.
    const fn projects(self) -> Self {
        Self { is_identity: false, ..self }
    }

    const fn keys(self, keys: u64) -> Self {
        Self { keys, ..self }
    }

    const fn without_rate(self) -> Self {
        Self { follows: false, ..self }
    }
}

const LAYERS: &[Entry] = &[
    entry("Dropout", &[4, 30], |p| {
        module(followed!(Dropout::with_generator(DROP_P, p.masks.clone())?, p))
    }),
    entry("ClassicDropout", &[4, 30], |p| {
        module(followed!(ClassicDropout::new(DROP_P, p.masks.clone())?, p))
    })
    .projects(),
    entry("Dropout1d", &[4, 30, 3], |p| {
        module(followed!(Dropout1d::new(DROP_P, p.masks.clone())?, p))
    }),
    entry("Dropout2d", &[4, 30, 3, 2], |p| {
        module(followed!(Dropout2d::new(DROP_P, p.masks.clone())?, p))
    }),
    entry("Dropout3d", &[4, 30, 3, 2, 2], |p| {
        module(followed!(Dropout3d::new(DROP_P, p.masks.clone())?, p))
    }),
    entry("LockedDropout", &[4, 3, 30], |p| {
        module(followed!(LockedDropout::new(DROP_P, p.masks.clone())?, p))
    }),
    entry("TokenDropout", &[4, 30, 3], |p| {
        module(followed!(TokenDropout::new(DROP_P, p.masks.clone())?, p))
    }),
    entry("DropHead", &[4, 30, 3, 2], |p| {
        module(followed!(DropHead::new(DROP_P, p.masks.clone())?, p))
    }),
    entry("BroadcastDropout", &[30, 3, 4], |p| {
        let noise_shape = [None, Some(1), None];
        module(followed!(BroadcastDropout::new(DROP_P, &noise_shape, p.masks.clone())?, p))
    }),
    entry("EmbeddingDropout", &[4, 30, 3], |p| {
        let layer_of = followed!(EmbeddingDropout::new(DROP_P, p.masks.clone())?, p);
        let ids = Tensor::arange(0u32, 120, &Device::Cpu)?.reshape((4, 30))?;
        layer(move |xs, train| layer_of.forward(xs, &ids, train))
    }),
    entry("AlphaDropout", &[4, 30], |p| {
        module(followed!(AlphaDropout::new(DROP_P, p.masks.clone())?, p))
    }),
    entry("FeatureAlphaDropout", &[4, 30, 3], |p| {
        module(followed!(FeatureAlphaDropout::new(DROP_P, p.masks.clone())?, p))
    }),
    entry("GaussianDropout", &[4, 30], |p| {
        module(followed!(GaussianDropout::new(DROP_P, p.masks.clone())?, p))
    }),
    entry("GaussianNoise", &[4, 30], |p| module(GaussianNoise::new(0.1, p.masks)?)).without_rate(),
    entry("DropPath", &[30, 3], |p| module(followed!(DropPath::new(DROP_P, p.masks.clone())?, p))),
    entry("DropBlock2d", &[4, 3, 9, 9], |p| {
        module(followed!(DropBlock2d::new(DROP_P, p.masks.clone())?, p))
    }),
    entry("Cutout", &[4, 3, 9, 9], |p| module(Cutout::new(4, p.masks)?)).without_rate(),
    entry("LayerDrop", &[4, 30], |p| {
        let layer_of = followed!(LayerDrop::new(DROP_P, p.masks.clone())?, p);
        layer(move |xs, train| layer_of.forward(xs, train, |xs| xs * 2.))
    })
    .projects(),
    entry("MultiSampleDropout", &[4, 30], |p| {
        let layer_of = followed!(MultiSampleDropout::new(DROP_P, 3, p.masks.clone())?, p);
        layer(move |xs, train| layer_of.forward(xs, train, |xs| xs * 2.))
    })
    .projects(),
    entry("Zoneout", &[4, 30], |p| {
        let layer_of = followed!(Zoneout::new(DROP_P, p.masks.clone())?, p);
        layer(move |xs, train| layer_of.forward(xs, &xs.sin()?, train))
    })
    .projects(),
    entry("ConcreteDropout", &[4, 30], |p| {
        let config = ConcreteDropoutConfig { init_min: 0.3, init_max: 0.5, ..Default::default() };
        module(ConcreteDropout::new(config, p.masks, p.vb)?)
    })
    .without_rate(),
    entry("VariationalLinear", &[4, 30], |p| module(VariationalLinear::new(30, 7, p.masks, p.vb)?))
        .projects()
        .without_rate(),
    entry("VariationalConv2d", &[2, 3, 6, 5], |p| {
        let config = candle_nn::Conv2dConfig { padding: 1, ..Default::default() };
        module(VariationalConv2d::new(3, 4, 3, config, p.masks, p.vb)?)
    })
    .projects()
    .without_rate(),
    entry("DropConnectLinear", &[4, 30], |p| {
        module(followed!(DropConnectLinear::new(30, 7, DROP_P, p.masks.clone(), p.vb)?, p))
    })
    .projects(),
    entry("DropConnectConv2d", &[2, 3, 6, 5], |p| {
        let config = candle_nn::Conv2dConfig { padding: 1, ..Default::default() };
        let conv = DropConnectConv2d::new(3, 4, 3, config, DROP_P, p.masks.clone(), p.vb)?;
        module(followed!(conv, p))
    })
    .projects(),
    entry("LoraLinear", &[4, 30], |p| {
        let base = candle_nn::linear(30, 7, p.vb.pp("base_layer"))?;
        let config = LoraConfig { r: 2, lora_dropout: DROP_P, ..Default::default() };
        module(followed!(LoraLinear::new(base, &config, p.masks.clone(), p.vb)?, p))
    })
    .projects(),
    entry("MultiHeadAttention", &[2, 5, 8], |p| {
        let config = MultiHeadAttentionConfig {
            drop_p: DROP_P as f32,
            hidden_size: 8,
            num_heads: 2,
            ..Default::default()
        };
        module(followed!(MultiHeadAttention::new(&config, p.masks.clone(), p.vb)?, p))
    })
    .projects(),
    entry("Lstm", &[2, 5, 6], |p| {
        let dropout = RecurrentDropout::Variational { input_p: DROP_P, state_p: DROP_P };
        module(followed!(Lstm::new(6, 8, Default::default(), dropout, p.masks.clone(), p.vb)?, p))
    })
    .projects()
    .keys(2),
    entry("Lstm, zoneout", &[2, 5, 6], |p| {
        let dropout = RecurrentDropout::Zoneout { cell_p: DROP_P, state_p: DROP_P };
        module(followed!(Lstm::new(6, 8, Default::default(), dropout, p.masks.clone(), p.vb)?, p))
    })
    .projects()
    .keys(2),
    entry("Gru", &[2, 5, 6], |p| {
        let dropout = RecurrentDropout::NoMemoryLoss { drop_p: DROP_P, masks: Default::default() };
        module(followed!(Gru::new(6, 8, Default::default(), dropout, p.masks.clone(), p.vb)?, p))
    })
    .projects(),
];

/// The layer, its variables and its generator.
struct Built {
    layer: Layer,
    map: VarMap,
    masks: Arc<MaskGenerator>,
}

fn built(entry: &Entry, dtype: DType, rate: Option<&ScheduledRate>) -> Result<Built> {
    let (map, masks) = (VarMap::new(), generator(7));
    let vb = seeded_var_builder(&map, 1, dtype, &Device::Cpu);
    let parts = Parts { masks: masks.clone(), vb, rate: rate.cloned() };
    let layer = (entry.new)(parts)?;
    // LoRA begins with an adapter of zeros, of which nothing can be seen.
    for (name, var) in map.data().lock().unwrap().iter().filter(|(name, _)| name.contains("lora_B"))
    {
        var.set(&random(var.dims(), var.dtype(), name.len() as u64)?)?;
    }
    Ok(Built { layer, map, masks })
}

fn input(entry: &Entry, dtype: DType) -> Result<Tensor> {
    random(entry.dims, dtype, 5)
}

#[test]
fn training_draws_keys_and_differs_from_call_to_call_evaluation_neither() -> Result<()> {
    for entry in LAYERS {
        for dtype in DTYPES {
            let (Built { layer, masks, .. }, x) =
                (built(entry, dtype, None)?, input(entry, dtype)?);
            let what = format!("{} {dtype:?}", entry.name);
            let eval = bits(&layer.forward_t(&x, false)?)?;
            assert_eq!(masks.state().counter, 0, "{what}: evaluation draws none");
            assert_eq!(bits(&layer.forward_t(&x, false)?)?, eval, "{what}");
            assert!(!entry.is_identity || eval == bits(&x)?, "{what}: evaluation is the identity");
            let mut seen = vec![eval];
            for call in 1..=4 {
                seen.push(bits(&layer.forward_t(&x, true)?)?);
                assert_eq!(
                    masks.state().counter,
                    call * entry.keys,
                    "{what}: keys of {call} calls"
                );
            }
            seen.sort();
            seen.dedup();
            // A layer that keeps or drops as a whole has two results.
            assert!(seen.len() >= 2, "{what}: nothing is drawn");
        }
    }
    Ok(())
}

#[test]
fn every_layer_works_under_the_train_switch() -> Result<()> {
    for entry in LAYERS {
        let (plain, switched) = (built(entry, DType::F32, None)?, built(entry, DType::F32, None)?);
        let (x, mode) = (input(entry, DType::F32)?, TrainMode::new());
        let module = Switched::new(switched.layer, &mode);
        for _ in 0..2 {
            let trained = bits(&module.forward(&x)?)?;
            assert_eq!(trained, bits(&plain.layer.forward_t(&x, true)?)?, "{}", entry.name);
            let evaluated = mode.evaluate(|| module.forward(&x))?;
            assert_eq!(
                bits(&evaluated)?,
                bits(&plain.layer.forward_t(&x, false)?)?,
                "{}",
                entry.name
            );
        }
        assert_eq!(switched.masks.state(), plain.masks.state(), "{}", entry.name);
    }
    Ok(())
}

/// The layer between a weight before it and a sum behind it, as much of a model as it takes.
struct Training {
    layer: Layer,
    weight: Var,
    adamw: AdamW,
    state: TrainingState,
    clock: RateClock,
}

impl Training {
    fn new(entry: &Entry) -> Result<Self> {
        let clock = RateClock::new();
        let rate = clock.rate(RateSchedule::ramp(DROP_P, 3)?);
        let Built { layer, map, masks } =
            built(entry, DType::F32, Some(&rate).filter(|_| entry.follows))?;
        let mut vars: NamedVars = named_vars(&map)?;
        let weight = Var::from_tensor(&random(entry.dims, DType::F32, 11)?)?;
        vars.insert("before".to_string(), weight.clone());
        let params = ParamsAdamW { lr: 0.05, ..Default::default() };
        let adamw = AdamW::from_groups(vec![ParamGroup::new(&vars)], params)?;
        let state = TrainingState::new(&vars).with_masks("masks", &masks).with_rate("rate", &rate);
        Ok(Self { layer, weight, adamw, state, clock })
    }

    fn step(&mut self, entry: &Entry, step: usize) -> Result<Vec<u64>> {
        self.clock.set_step(step);
        let x = (input(entry, DType::F32)? * self.weight.as_tensor())?;
        let y = self.layer.forward_t(&x, true)?;
        self.adamw.backward_step(&y.sqr()?.sum_all()?)?;
        bits(&y)
    }
}

#[test]
fn every_layer_goes_on_from_a_saved_training_state() -> Result<()> {
    let folder = std::env::temp_dir();
    for (at, entry) in LAYERS.iter().enumerate() {
        let file = format!("candle-dropout-family-{}-{at}", std::process::id());
        let path: PathBuf = folder.join(file);
        let mut whole = Training::new(entry)?;
        for step in 0..3 {
            whole.step(entry, step)?;
        }
        whole.state.save(&path, &whole.adamw, &Progress { step: 3, ..Default::default() })?;
        let mut resumed = Training::new(entry)?;
        let progress = resumed.state.load(&path, &mut resumed.adamw)?;
        std::fs::remove_file(&path)?;
        for step in progress.step..6 {
            let (expected, got) = (whole.step(entry, step)?, resumed.step(entry, step)?);
            assert_eq!(got, expected, "{} at step {step}", entry.name);
        }
        assert_eq!(bits(&resumed.weight)?, bits(&whole.weight)?, "{}", entry.name);
    }
    Ok(())
}

#[test]
fn every_rate_follows_a_schedule_and_at_0_nothing_happens() -> Result<()> {
    for entry in LAYERS.iter().filter(|entry| entry.follows) {
        let (clock, x) = (RateClock::new(), input(entry, DType::F32)?);
        let early = clock.rate(RateSchedule::early(DROP_P, 1)?);
        let (followed, fixed) =
            (built(entry, DType::F32, Some(&early))?, built(entry, DType::F32, None)?);
        let eval = fixed.layer.forward_t(&x, false)?;
        let eval_at_0 = match entry.name {
            // They scale in evaluation, and so by what the rate is.
            "ClassicDropout" => x.clone(),
            "Zoneout" | "Lstm, zoneout" => {
                clock.set_step(1);
                followed.layer.forward_t(&x, false)?
            }
            _ => eval,
        };
        clock.set_step(0);
        let first = followed.layer.forward_t(&x, true)?;
        assert_eq!(
            bits(&first)?,
            bits(&fixed.layer.forward_t(&x, true)?)?,
            "{}: the same rate",
            entry.name
        );
        clock.set_step(1);
        let second = followed.layer.forward_t(&x, true)?;
        fixed.layer.forward_t(&x, true)?;
        let distance =
            cases::error(&second.to_dtype(DType::F64)?, &eval_at_0.to_dtype(DType::F64)?)?;
        // A mean of three equal heads, and sums in another order, round.
        assert!(distance <= 1e-6 * 4., "{}: off by {distance} at a rate of 0", entry.name);
        assert_eq!(followed.masks.state(), fixed.masks.state(), "{}: a key at 0, too", entry.name);
    }
    Ok(())
}

#[test]
fn gradients_reach_the_input_and_every_variable() -> Result<()> {
    for entry in LAYERS {
        for dtype in DTYPES {
            let Built { layer, map, .. } = built(entry, dtype, None)?;
            let what = format!("{} {dtype:?}", entry.name);
            let x = Var::from_tensor(&input(entry, dtype)?)?;
            // Of some calls, since one may drop everything.
            let calls = (0..4).map(|_| layer.forward_t(&x, true)?.sqr()?.sum_all());
            let loss = calls.reduce(|a, b| a? + b?).expect("calls")?;
            let gradients = loss.backward()?;
            let vars = map.data().lock().unwrap().clone();
            let vars = vars.iter().filter(|(name, _)| !name.starts_with("base_layer"));
            for (name, var) in vars.chain([(&"x".to_string(), &x)]) {
                let gradient =
                    gradients.get(var).unwrap_or_else(|| panic!("{what}: {name} has none"));
                let largest = cases::largest(&gradient.to_dtype(DType::F64)?)?;
                assert!(largest.is_finite() && largest > 0., "{what}: of {name} it is {largest}");
            }
        }
    }
    Ok(())
}
