//! The learning rate of every step.

use std::f64::consts::PI;

use candle_core::{Result, bail};
use serde::Serialize;

const NAME: &str = "lr schedule";

/// How a learning rate falls once it has warmed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LrDecay {
    /// Not at all.
    Constant,
    /// On a straight line.
    Linear,
    /// On half a wave of a cosine.
    Cosine,
}

/// A learning rate as a pure function of the step: warm-up on a straight line, then constant, linear or
/// cosine decay.
///
/// ```text
/// warmup(i)   = min(1, (i + 1) / warmup_steps)                  step i counts from 0
/// progress(i) = (i - warmup_steps) / (steps - warmup_steps)     at least 0, and 1 from step `steps` on
/// decay(t)    = 1 | 1 - t | (1 + cos(pi t)) / 2                 constant | linear | cosine
/// lr(i)       = lr * warmup(i) * (final_lr + (1 - final_lr) * decay(progress(i)))
/// ```
///
/// A rate that decays stays from step `steps` on at what it is there.
///
/// It has no state, so a run that goes on at step `i` has the rate of that step.
/// [`TrainingState`](super::TrainingState) saves it to refuse another one.
///
/// Loshchilov, Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017, arXiv 1608.03983 (the
/// cosine); Goyal et al., "Accurate, large minibatch SGD", 2017, arXiv 1706.02677 (warm-up).
///
/// # Example
/// ```
/// use candle_dropout::training::LrSchedule;
///
/// # fn main() -> candle_core::Result<()> {
/// let schedule = LrSchedule::cosine(1., 14)?.with_warmup(4).with_final_lr(0.1)?;
/// assert_eq!([0, 1, 3, 4].map(|step| schedule.at(step)), [0.25, 0.5, 1., 1.]);
/// assert!((schedule.at(9) - 0.55).abs() < 1e-12); // half-way
/// assert!((schedule.at(14) - 0.1).abs() < 1e-12); // and so from here on
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LrSchedule {
    decay: LrDecay,
    lr: f64,
    warmup_steps: usize,
    steps: usize,
    final_lr: f64,
}

impl LrSchedule {
    /// `lr` at every step.
    ///
    /// # Errors
    /// `lr` is negative or no number.
    pub fn constant(lr: f64) -> Result<Self> {
        Self::new(LrDecay::Constant, lr, 1)
    }

    /// `lr` that falls on a straight line, to 0 at step `steps`.
    ///
    /// # Errors
    /// `lr` is negative or no number, or `steps` is 0.
    pub fn linear(lr: f64, steps: usize) -> Result<Self> {
        Self::new(LrDecay::Linear, lr, steps)
    }

    /// `lr` that falls on half a wave of a cosine, to 0 at step `steps`.
    ///
    /// # Errors
    /// `lr` is negative or no number, or `steps` is 0.
    pub fn cosine(lr: f64, steps: usize) -> Result<Self> {
        Self::new(LrDecay::Cosine, lr, steps)
    }

    fn new(decay: LrDecay, lr: f64, steps: usize) -> Result<Self> {
        if !(lr.is_finite() && lr >= 0.) {
            bail!(
                "{NAME}: lr: expected a finite number of at least 0, got {lr}; give the full rate, such as 3e-4"
            )
        }
        if steps == 0 {
            bail!("{NAME}: steps: expected at least 1, got 0; a rate that stays has `constant`")
        }
        Ok(Self { decay, lr, warmup_steps: 0, steps, final_lr: 0. })
    }

    /// Rises to the full rate over the first `steps` steps, and falls over the others. Where these are all
    /// steps or more, it only rises, up to the last rate at step `steps`.
    pub fn with_warmup(self, steps: usize) -> Self {
        Self { warmup_steps: steps, ..self }
    }

    /// Falls to this part of the full rate instead of to 0.
    ///
    /// # Errors
    /// `final_lr` is no number from 0 to 1.
    pub fn with_final_lr(self, final_lr: f64) -> Result<Self> {
        if !(0. ..=1.).contains(&final_lr) {
            bail!(
                "{NAME}: final_lr: expected a part of the full rate from 0 to 1, got {final_lr}; \
                 divide the last rate by the full one"
            )
        }
        Ok(Self { final_lr, ..self })
    }

    /// The learning rate of step `step`; steps count from 0, and have the last rate after the last one.
    pub fn at(&self, step: usize) -> f64 {
        let step = match self.decay {
            LrDecay::Constant => step,
            LrDecay::Linear | LrDecay::Cosine => step.min(self.steps),
        };
        let warmup = ((step as f64 + 1.) / self.warmup_steps.max(1) as f64).min(1.);
        // Where warm-up takes all steps, there is none to fall in.
        let progress = match self.steps.saturating_sub(self.warmup_steps) {
            _ if step >= self.steps => 1.,
            falling => step.saturating_sub(self.warmup_steps) as f64 / falling.max(1) as f64,
        };
        let decay = match self.decay {
            LrDecay::Constant => 1.,
            LrDecay::Linear => 1. - progress,
            LrDecay::Cosine => 0.5 * (1. + (PI * progress).cos()),
        };
        self.lr * warmup * (self.final_lr + (1. - self.final_lr) * decay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_rise_then_fall_and_then_stay() -> Result<()> {
        let close = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-15, "{got}");
        let linear = LrSchedule::linear(8., 12)?.with_warmup(4).with_final_lr(0.5)?;
        for (step, rate) in [(0, 2.), (3, 8.), (4, 8.), (8, 6.), (12, 4.), (usize::MAX, 4.)] {
            close(linear.at(step), rate);
        }
        let cosine = LrSchedule::cosine(1., 4)?;
        for (step, rate) in [(0, 1.), (1, 0.5 + 0.5f64.sqrt() / 2.), (2, 0.5), (4, 0.), (5, 0.)] {
            close(cosine.at(step), rate);
        }
        // Warm-up over all steps, and over more than there are.
        for (warmup, before, last) in [(4, 8., 4.), (5, 6.4, 4.), (10, 3.2, 2.)] {
            let linear = LrSchedule::linear(8., 4)?.with_warmup(warmup).with_final_lr(0.5)?;
            for (step, rate) in [(3, before), (4, last), (5, last), (99, last)] {
                close(linear.at(step), rate);
            }
        }
        let constant = LrSchedule::constant(3.)?.with_warmup(3);
        for (step, rate) in [(0, 1.), (1, 2.), (2, 3.), (1000, 3.)] {
            close(constant.at(step), rate);
        }
        Ok(())
    }

    #[test]
    fn a_rate_never_leaves_its_bounds_and_never_rises_after_warm_up() -> Result<()> {
        for schedule in [LrSchedule::linear(2., 9)?, LrSchedule::cosine(2., 9)?] {
            for (warmup, final_lr) in [(0, 0.), (1, 1.), (5, 0.3), (9, 0.1), (20, 0.), (20, 1.)] {
                let schedule = schedule.with_warmup(warmup).with_final_lr(final_lr)?;
                let rates: Vec<f64> = (0..30).map(|step| schedule.at(step)).collect();
                assert!(rates.iter().all(|rate| (0. ..=2.).contains(rate)), "{schedule:?}");
                let (rising, falling) = rates.split_at(warmup.min(9));
                assert!(rising.is_sorted() && falling.is_sorted_by(|a, b| a >= b), "{schedule:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn errors_name_argument_expected_and_got() -> Result<()> {
        let error = |result: Result<LrSchedule>| result.map_err(|error| error.to_string()).err();
        for (result, part) in [
            (LrSchedule::constant(f64::NAN), "lr: expected a finite number of at least 0, got NaN"),
            (LrSchedule::linear(-1., 3), "got -1"),
            (LrSchedule::cosine(1., 0), "steps: expected at least 1, got 0"),
            (LrSchedule::constant(1.)?.with_final_lr(1.5), "from 0 to 1, got 1.5"),
            (LrSchedule::constant(1.)?.with_final_lr(f64::NAN), "from 0 to 1, got NaN"),
        ] {
            let message = error(result).unwrap_or_default();
            assert!(message.starts_with("lr schedule: ") && message.contains(part), "{message}");
        }
        Ok(())
    }
}
