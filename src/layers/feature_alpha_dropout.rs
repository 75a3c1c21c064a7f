use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::site::{Site, module_methods, rate_methods};
use crate::functional::alpha_dropout;
use crate::mask::{DropMask, MaskGenerator};

/// [`AlphaDropout`](crate::AlphaDropout) of whole channels, with the mask `[N, C]`; PyTorch's `FeatureAlphaDropout`.
///
/// # Shapes
/// `[N, C, ..]`.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU.
///
/// Klambauer, Unterthiner, Mayr, Hochreiter, "Self-normalizing neural networks", 2017, arXiv 1706.02515; Tompson,
/// Goroshin, Jain, LeCun, Bregler, "Efficient object localization using convolutional networks", 2015, arXiv 1411.4280.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{FeatureAlphaDropout, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = FeatureAlphaDropout::new(0.5, Arc::new(MaskGenerator::new(42)))?;
/// let y = layer.forward(&Tensor::zeros((10, 4, 2, 2), DType::F32, &Device::Cpu)?, true)?;
/// let channels = y.flatten(0, 1)?.flatten(1, 2)?.to_vec2::<f32>()?;
/// assert!(channels.iter().all(|channel| channel.iter().all(|y| *y == channel[0])));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct FeatureAlphaDropout(Site);

const NAME: &str = "feature_alpha_dropout";

impl FeatureAlphaDropout {
    /// A layer that drops each channel of each sample with probability `drop_p`.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        Site::new(drop_p, generator).checked(NAME).map(Self)
    }

    /// The mask of this call, of shape `[N, C]`.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.0.next_mask(NAME, train)
    }

    /// Drops channels if `train` is true.
    ///
    /// # Errors
    /// The rate is no probability; `xs` has fewer than two dimensions, or is refused by [`alpha_dropout`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        if xs.rank() < 2 {
            bail!("{NAME}: xs: expected [N, C, ..], got {:?}; unsqueeze it", xs.dims())
        }
        let space: Vec<usize> = (2..xs.rank()).collect();
        alpha_dropout(xs, space, &self.next_mask(train)?)
    }
}

rate_methods!(FeatureAlphaDropout, 0);

module_methods!(FeatureAlphaDropout);
