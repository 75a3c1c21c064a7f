use std::sync::Arc;

use candle_core::{ModuleT, Result, Tensor};

use crate::{DropMask, MaskGenerator, MaskState, dropout};

/// Serves [`Dropout::new`], which has no generator of its own.
static DEFAULT_GENERATOR: MaskGenerator = MaskGenerator::new(0);

/// Restarts the process-wide generator that [`Dropout::new`] draws from.
///
/// A model that is trained beside others owns a generator instead ([`Dropout::with_generator`]).
pub fn set_seed(seed: u64) {
    DEFAULT_GENERATOR.restore(MaskState { seed, counter: 0 });
}

/// Dropout as a layer; a drop-in for `candle_nn::Dropout`.
///
/// In training it draws one key a call, whatever the rate, and applies [`dropout`]; in evaluation
/// it is the identity and draws none.
///
/// # Shapes
/// Any; see [`dropout`].
///
/// # Errors
/// `forward` fails, in training and in evaluation, if the rate is no probability; see
/// [`DropMask::new`] and [`dropout`].
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{Dropout, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = Dropout::with_generator(0.5, Arc::new(MaskGenerator::new(42)));
/// let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
/// let y = layer.forward(&x, true)?;
/// assert!(y.flatten_all()?.to_vec1::<f32>()?.iter().all(|y| [0., 2.].contains(y)));
/// assert_eq!(layer.forward(&x, false)?.to_vec2::<f32>()?, [[1.; 3]; 2]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Dropout {
    drop_p: f32,
    generator: Option<Arc<MaskGenerator>>,
}

impl Dropout {
    /// A layer that draws from the process-wide generator; see [`set_seed`].
    pub fn new(drop_p: f32) -> Self {
        Self { drop_p, generator: None }
    }

    /// A layer that draws from a generator shared within one model.
    pub fn with_generator(drop_p: f32, generator: Arc<MaskGenerator>) -> Self {
        Self { drop_p, generator: Some(generator) }
    }

    /// The mask of this call: for fused ops that apply the dropout themselves.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        let generator = self.generator.as_deref().unwrap_or(&DEFAULT_GENERATOR);
        next_mask(self.drop_p, generator, train)
    }

    /// Applies dropout if `train` is true.
    ///
    /// # Errors
    /// The rate is no probability, or `xs` is refused by [`dropout`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let drop = self.next_mask(train)?;
        if train { dropout(xs, &drop) } else { Ok(xs.clone()) }
    }
}

impl ModuleT for Dropout {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        self.forward(xs, train)
    }
}

/// The mask of one call of a dropout site: exactly one key if `train`, whatever the rate, else
/// none. The rate is checked either way, before a key is drawn.
pub(super) fn next_mask(drop_p: f32, generator: &MaskGenerator, train: bool) -> Result<DropMask> {
    let rate = crate::Rate::new(drop_p)?;
    Ok(if train { DropMask::with_rate(rate, generator.next_key()) } else { DropMask::none() })
}
