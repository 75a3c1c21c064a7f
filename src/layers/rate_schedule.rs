use std::f64::consts::PI;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{Result, bail};
use serde::Serialize;

use super::site::probability;

const NAME: &str = "rate schedule";

/// A drop probability as a pure function of the step.
///
/// ```text
/// constant      p
/// linear        from + (to - from) t             t(i) = min(1, i / steps)
/// cosine        to + (from - to) (1 + cos(pi t)) / 2
/// early         i < stop ? p : 0
/// early_linear  p (1 - t)
/// late          i < start ? 0 : p
/// late_ramp     p min(1, max(0, i - start) / steps)
/// curriculum    p (1 - e^(-gamma i))
/// ramp          p t
/// ```
///
/// Steps count from 0. Early and late are those of Liu, Xu, Jin, Shen, Darrell, "Dropout reduces underfitting", 2023,
/// arXiv 2303.01500; the curriculum is that of Morerio, Cavazza, Volpi, Vidal, Murino, "Curriculum dropout", 2017, arXiv
/// 1703.06229 (eq. 3, there of the probability of keeping); the ramp that of DropBlock: Ghiasi, Lin, Le, 2018, arXiv
/// 1810.12890 (section 3.2).
///
/// It has no state. A [`RateClock`] holds the step, and the layers that [follow](ScheduledRate) it.
///
/// # Example
/// ```
/// use candle_dropout::RateSchedule;
///
/// # fn main() -> candle_core::Result<()> {
/// let early = RateSchedule::early(0.1, 100)?;
/// assert_eq!([0, 99, 100].map(|step| early.at(step)), [0.1, 0.1, 0.]);
/// let ramp = RateSchedule::ramp(0.2, 10)?;
/// assert_eq!([0, 5, 10, 11].map(|step| ramp.at(step)), [0., 0.1, 0.2, 0.2]);
/// // The second of four layers, and the second of five blocks by timm's convention.
/// assert_eq!(ramp.at_layer(2, 4)?.at(10), 0.1);
/// assert_eq!(ramp.at_block(1, 5)?.at(10), 0.05);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RateSchedule {
    form: Form,
    /// Of each rate.
    share: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Form {
    Linear {
        from: f64,
        to: f64,
        start: usize,
        steps: usize,
    },
    Cosine {
        from: f64,
        to: f64,
        steps: usize,
    },
    /// One rate before a step, another from it on.
    Switch {
        before: f64,
        after: f64,
        at: usize,
    },
    Curriculum {
        drop_p: f64,
        gamma: f64,
    },
}

impl RateSchedule {
    /// `drop_p` at every step.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn constant(drop_p: f64) -> Result<Self> {
        Self::of(Form::Switch { before: drop_p, after: drop_p, at: 0 })
    }

    /// On a straight line `from` one rate `to` another, and there from step `steps` on.
    ///
    /// # Errors
    /// A rate is no probability, or `steps` is 0.
    pub fn linear(from: f64, to: f64, steps: usize) -> Result<Self> {
        Self::of(Form::Linear { from, to, start: 0, steps })
    }

    /// On half a wave of a cosine `from` one rate `to` another, and there from step `steps` on.
    ///
    /// # Errors
    /// A rate is no probability, or `steps` is 0.
    pub fn cosine(from: f64, to: f64, steps: usize) -> Result<Self> {
        Self::of(Form::Cosine { from, to, steps })
    }

    /// Early dropout: `drop_p` up to step `stop`, then 0; against underfitting.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn early(drop_p: f64, stop: usize) -> Result<Self> {
        Self::of(Form::Switch { before: drop_p, after: 0., at: stop })
    }

    /// Early dropout that falls on a straight line from `drop_p` to 0 at step `stop`.
    ///
    /// # Errors
    /// `drop_p` is no probability, or `stop` is 0.
    pub fn early_linear(drop_p: f64, stop: usize) -> Result<Self> {
        Self::linear(drop_p, 0., stop)
    }

    /// Late dropout: 0 up to step `start`, then `drop_p`.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn late(drop_p: f64, start: usize) -> Result<Self> {
        Self::of(Form::Switch { before: 0., after: drop_p, at: start })
    }

    /// 0 up to step `start`, then on a straight line to `drop_p` over `steps` steps.
    ///
    /// # Errors
    /// `drop_p` is no probability, or `steps` is 0.
    pub fn late_ramp(drop_p: f64, start: usize, steps: usize) -> Result<Self> {
        Self::of(Form::Linear { from: 0., to: drop_p, start, steps })
    }

    /// Curriculum dropout: from 0 towards `drop_p`, near which it is after several times `1 / gamma` steps; the
    /// paper takes `gamma = 10 / steps`.
    ///
    /// # Errors
    /// `drop_p` is no probability, or `gamma` no positive number.
    pub fn curriculum(drop_p: f64, gamma: f64) -> Result<Self> {
        if !(gamma.is_finite() && gamma > 0.) {
            bail!(
                "{NAME}: gamma: expected a positive number, got {gamma}; the paper takes 10 / steps"
            )
        }
        Self::of(Form::Curriculum { drop_p, gamma })
    }

    /// DropBlock's: on a straight line from 0 to `drop_p` over `steps` steps.
    ///
    /// # Errors
    /// `drop_p` is no probability, or `steps` is 0.
    pub fn ramp(drop_p: f64, steps: usize) -> Result<Self> {
        Self::linear(0., drop_p, steps)
    }

    fn of(form: Form) -> Result<Self> {
        let rates = match form {
            Form::Linear { from, to, .. } | Form::Cosine { from, to, .. } => [from, to],
            Form::Switch { before, after, .. } => [before, after],
            Form::Curriculum { drop_p, .. } => [drop_p, drop_p],
        };
        for drop_p in rates {
            probability(NAME, drop_p as f32)?;
        }
        if let Form::Linear { steps: 0, .. } | Form::Cosine { steps: 0, .. } = form {
            bail!("{NAME}: steps: expected at least 1, got 0; a rate that stays has `constant`")
        }
        Ok(Self { form, share: 1. })
    }

    /// The schedule of layer `layer` (1 to `n_layer`) where the last one has this one: `l/L p_L`, as in "Deep networks
    /// with stochastic depth".
    ///
    /// # Errors
    /// `layer` is 0 or above `n_layer`.
    pub fn at_layer(self, layer: usize, n_layer: usize) -> Result<Self> {
        Ok(Self { share: self.share * share_of_layer(NAME, layer, n_layer)?, ..self })
    }

    /// The schedule of block `block` (0 to `n_block - 1`) where the last one has this one: `linspace(0, p, n_block)`, as
    /// in timm.
    ///
    /// # Errors
    /// `block` is not below `n_block`.
    pub fn at_block(self, block: usize, n_block: usize) -> Result<Self> {
        Ok(Self { share: self.share * share_of_block(NAME, block, n_block)?, ..self })
    }

    /// The drop probability of step `step`, which counts from 0.
    pub fn at(&self, step: usize) -> f32 {
        let progress =
            |start: usize, steps: usize| (step.saturating_sub(start) as f64 / steps as f64).min(1.);
        let drop_p = match self.form {
            Form::Linear { from, to, start, steps } => from + (to - from) * progress(start, steps),
            Form::Cosine { from, to, steps } => {
                to + (from - to) * (1. + (PI * progress(0, steps)).cos()) / 2.
            }
            Form::Switch { before, after, at } => {
                if step < at {
                    before
                } else {
                    after
                }
            }
            Form::Curriculum { drop_p, gamma } => drop_p * -(-gamma * step as f64).exp_m1(),
        };
        // A sum of products may round to a hair below 0 or above 1.
        (self.share * drop_p).clamp(0., 1.) as f32
    }
}

/// `l / L`, the paper's share of the last rate.
pub(super) fn share_of_layer(op: &str, layer: usize, n_layer: usize) -> Result<f64> {
    if !(1..=n_layer).contains(&layer) {
        bail!("{op}: layer: expected 1 to n_layer {n_layer}, got {layer}; count layers from 1")
    }
    Ok(layer as f64 / n_layer as f64)
}

/// timm's share of the last rate; a single block has none of it.
pub(super) fn share_of_block(op: &str, block: usize, n_block: usize) -> Result<f64> {
    if block >= n_block {
        bail!(
            "{op}: block: expected 0 to n_block - 1 for n_block {n_block}, got {block}; count blocks from 0"
        )
    }
    Ok(block as f64 / (n_block - 1).max(1) as f64)
}

/// The step of all rates that follow it: a training loop sets it in one place.
///
/// A clone is the same clock. [`TrainingState`](crate::training::TrainingState) saves the step, and the schedules, which
/// have to be equal where a training goes on.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_dropout::{DropPath, Dropout, MaskGenerator, RateClock, RateSchedule};
///
/// # fn main() -> candle_core::Result<()> {
/// let clock = RateClock::new();
/// let (early, ramp) = (RateSchedule::early(0.1, 2)?, RateSchedule::ramp(0.2, 4)?);
/// let masks = Arc::new(MaskGenerator::new(42));
/// let dropout = Dropout::with_generator(0., masks.clone())?.following(&clock.rate(early));
/// let path = DropPath::new(0., masks)?.following(&clock.rate(ramp.at_layer(1, 2)?));
/// let mut rates = Vec::new();
/// for step in 0..4 {
///     clock.set_step(step);
///     rates.push([dropout.drop_p(), path.drop_p()]);
/// }
/// assert_eq!(rates, [[0.1, 0.], [0.1, 0.025], [0., 0.05], [0., 0.075]]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct RateClock(Arc<AtomicUsize>);

impl RateClock {
    /// A clock of its own, at step 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// The step that all its rates are at.
    pub fn step(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    /// Sets the step, of which the index counts from 0, for all its rates.
    pub fn set_step(&self, step: usize) {
        self.0.store(step, Ordering::SeqCst);
    }

    /// A rate by this clock.
    pub fn rate(&self, schedule: RateSchedule) -> ScheduledRate {
        ScheduledRate { schedule, clock: self.clone() }
    }
}

/// A rate that layers follow: a [`RateSchedule`] by a [`RateClock`].
#[derive(Clone, Debug)]
pub struct ScheduledRate {
    schedule: RateSchedule,
    clock: RateClock,
}

impl ScheduledRate {
    /// The drop probability of this step.
    pub fn drop_p(&self) -> f32 {
        self.schedule.at(self.clock.step())
    }

    /// The schedule.
    pub fn schedule(&self) -> &RateSchedule {
        &self.schedule
    }

    /// The clock.
    pub fn clock(&self) -> &RateClock {
        &self.clock
    }

    /// The rate of layer `layer` by the same clock; see [`RateSchedule::at_layer`].
    ///
    /// # Errors
    /// `layer` is 0 or above `n_layer`.
    pub fn at_layer(&self, layer: usize, n_layer: usize) -> Result<Self> {
        Ok(self.clock.rate(self.schedule.at_layer(layer, n_layer)?))
    }

    /// The rate of block `block` by the same clock; see [`RateSchedule::at_block`].
    ///
    /// # Errors
    /// `block` is not below `n_block`.
    pub fn at_block(&self, block: usize, n_block: usize) -> Result<Self> {
        Ok(self.clock.rate(self.schedule.at_block(block, n_block)?))
    }
}
