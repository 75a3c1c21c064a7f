use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::site::{Site, module_methods, rate_methods};
use crate::functional::alpha_dropout;
use crate::mask::{DropMask, MaskGenerator};

/// Dropout for networks of SELU: [`alpha_dropout`], which keeps mean 0 and variance 1; PyTorch's and Keras'
/// `AlphaDropout`.
///
/// # Shapes
/// Any.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU.
///
/// Klambauer, Unterthiner, Mayr, Hochreiter, "Self-normalizing neural networks", 2017, arXiv 1706.02515.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{AlphaDropout, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = AlphaDropout::new(0.2, Arc::new(MaskGenerator::new(42)))?;
/// let x = Tensor::randn(0f32, 1., 100_000, &Device::Cpu)?;
/// let y = layer.forward(&x, true)?;
/// assert!(y.mean_all()?.to_scalar::<f32>()?.abs() < 0.02);
/// assert!((y.var(0)?.to_scalar::<f32>()? - 1.).abs() < 0.03);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct AlphaDropout(Site);

const NAME: &str = "alpha_dropout";

impl AlphaDropout {
    /// A layer that drops each element with probability `drop_p`.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        Site::new(drop_p, generator).checked(NAME).map(Self)
    }

    /// The mask of this call, of the shape of the input.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.0.next_mask(NAME, train)
    }

    /// Drops elements if `train` is true.
    ///
    /// # Errors
    /// The rate is no probability, or `xs` is refused by [`alpha_dropout`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        alpha_dropout(xs, (), &self.next_mask(train)?)
    }
}

rate_methods!(AlphaDropout, 0);

module_methods!(AlphaDropout);
