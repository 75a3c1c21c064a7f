use std::sync::Arc;

use candle_core::{Error, Result, bail};

use super::rate_schedule::ScheduledRate;
use crate::mask::{DropMask, MaskGenerator, MaskState, Rate, next_repeated};

/// Serves sites that have no generator of their own.
static DEFAULT_GENERATOR: MaskGenerator = MaskGenerator::new(0);

/// Restarts the process-wide generator that [`Dropout::new`](super::Dropout::new) draws from.
///
/// A model that is trained beside others owns a generator instead
/// ([`Dropout::with_generator`](super::Dropout::with_generator)).
pub fn set_seed(seed: u64) {
    DEFAULT_GENERATOR.restore(MaskState { seed, counter: 0 });
}

/// A dropout site: the rate at one place of a model, and where its keys come from.
#[derive(Clone, Debug)]
pub(super) struct Site {
    drop_p: f32,
    /// What it follows instead.
    scheduled: Option<ScheduledRate>,
    /// `None`: the process-wide one.
    generator: Option<Arc<MaskGenerator>>,
}

impl Site {
    /// A site that draws from a generator shared within one model.
    pub(super) fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Self {
        Self { drop_p: drop_p.into() as f32, scheduled: None, generator: Some(generator) }
    }

    /// A site that draws from the process-wide generator.
    pub(super) fn process_wide(drop_p: impl Into<f64>) -> Self {
        Self { drop_p: drop_p.into() as f32, scheduled: None, generator: None }
    }

    /// The same site, or an error that names `layer` if its rate is no probability: for layers that say so when
    /// they are made.
    pub(super) fn checked(self, layer: &str) -> Result<Self> {
        self.rate(layer)?;
        Ok(self)
    }

    /// The drop probability, at this step if it follows a schedule.
    pub(super) fn drop_p(&self) -> f32 {
        self.scheduled.as_ref().map_or(self.drop_p, ScheduledRate::drop_p)
    }

    /// The same site, whose rate is that of a schedule.
    pub(super) fn following(self, rate: &ScheduledRate) -> Self {
        Self { scheduled: Some(rate.clone()), ..self }
    }

    /// Changes the drop probability, if it is one.
    pub(super) fn set_drop_p(&mut self, layer: &str, drop_p: impl Into<f64>) -> Result<()> {
        if self.scheduled.is_some() {
            bail!(
                "{layer}: drop_p: expected a layer with a rate of its own, got one that follows a schedule; set the \
                 step of its clock"
            )
        }
        let drop_p = drop_p.into() as f32;
        *self = Self { drop_p, ..self.clone() }.checked(layer)?;
        Ok(())
    }

    /// The mask of one call: exactly one key if `train`, whatever the rate, else none. The rate is
    /// checked either way, before a key is drawn. In the passes of a [`McDropout`](super::McDropout) the key is
    /// one of its own, and the generator stays where it is.
    pub(super) fn next_mask(&self, layer: &str, train: bool) -> Result<DropMask> {
        let rate = self.rate(layer)?;
        if !train {
            return Ok(DropMask::none());
        }
        let generator = self.generator.as_deref().unwrap_or(&DEFAULT_GENERATOR);
        let next = || DropMask::with_rate(rate, generator.next_key());
        Ok(next_repeated(rate).unwrap_or_else(next))
    }

    /// The realised rate.
    pub(super) fn rate(&self, layer: &str) -> Result<Rate> {
        probability(layer, self.drop_p())
    }
}

/// The rate of a drop probability, or an error that names `layer`.
pub(super) fn probability(layer: &str, drop_p: f32) -> Result<Rate> {
    Rate::new(drop_p).map_err(|error| Error::Msg(format!("{layer}: {error}")))
}

/// What the errors of a layer begin with: its name and, where it has one, the path of its variables.
pub(super) fn name_at(layer: &str, path: &str) -> String {
    if path.is_empty() { layer.to_string() } else { format!("{layer} {path}") }
}

/// `impl Layer { drop_p, set_drop_p, following }`, for a layer whose field `$site` is its [`Site`]; `NAME` is what its errors
/// begin with.
macro_rules! rate_methods {
    ($Layer:ident, $site:tt) => {
        impl $Layer {
            /// The drop probability, at this step if the layer follows a schedule.
            pub fn drop_p(&self) -> f32 {
                self.$site.drop_p()
            }

            /// Changes the drop probability; an f64 is rounded to f32.
            ///
            /// # Errors
            /// `drop_p` is no probability, or the layer follows a schedule; it keeps the rate that it had.
            pub fn set_drop_p(&mut self, drop_p: impl Into<f64>) -> candle_core::Result<()> {
                self.$site.set_drop_p(NAME, drop_p)
            }

            /// The same layer, whose rate is that of a schedule at each step.
            pub fn following(mut self, rate: &$crate::layers::ScheduledRate) -> Self {
                self.$site = self.$site.following(rate);
                self
            }
        }
    };
}
pub(super) use rate_methods;

/// `impl ModuleT for Layer` and `impl Layer { switched }`, for a layer with `forward(&self, xs, train)`.
macro_rules! module_methods {
    ($Layer:ident) => {
        impl $Layer {
            /// The same layer, bound to a switch that says whether it trains: a `Module`.
            pub fn switched(
                self,
                mode: &$crate::layers::TrainMode,
            ) -> $crate::layers::Switched<Self> {
                $crate::layers::Switched::new(self, mode)
            }
        }

        impl candle_core::ModuleT for $Layer {
            fn forward_t(
                &self,
                xs: &candle_core::Tensor,
                train: bool,
            ) -> candle_core::Result<candle_core::Tensor> {
                self.forward(xs, train)
            }
        }
    };
}
pub(super) use module_methods;
