use std::sync::Arc;

use candle_core::Result;

use crate::mask::{DropMask, MaskGenerator, MaskState, Rate};

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
    /// `None`: the process-wide one.
    generator: Option<Arc<MaskGenerator>>,
}

impl Site {
    /// A site that draws from a generator shared within one model.
    pub(super) fn new(drop_p: f32, generator: Arc<MaskGenerator>) -> Self {
        Self { drop_p, generator: Some(generator) }
    }

    /// A site that draws from the process-wide generator.
    pub(super) fn process_wide(drop_p: f32) -> Self {
        Self { drop_p, generator: None }
    }

    /// The same site, or an error if its rate is no probability: for layers that say so when they
    /// are made.
    pub(super) fn checked(self) -> Result<Self> {
        Rate::new(self.drop_p)?;
        Ok(self)
    }

    /// The drop probability.
    pub(super) fn drop_p(&self) -> f32 {
        self.drop_p
    }

    /// The mask of one call: exactly one key if `train`, whatever the rate, else none. The rate is
    /// checked either way, before a key is drawn.
    pub(super) fn next_mask(&self, train: bool) -> Result<DropMask> {
        let rate = Rate::new(self.drop_p)?;
        let generator = self.generator.as_deref().unwrap_or(&DEFAULT_GENERATOR);
        Ok(if train { DropMask::with_rate(rate, generator.next_key()) } else { DropMask::none() })
    }
}
