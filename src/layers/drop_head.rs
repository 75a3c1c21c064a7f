use std::sync::Arc;

use candle_core::{D, Result, Tensor, bail};

use super::site::{Site, module_methods, rate_methods};
use crate::functional::broadcast_dropout;
use crate::mask::{DropMask, MaskGenerator};

/// Drops whole heads of attention, sample by sample: [`broadcast_dropout`] with the mask `[B, H]`.
///
/// What is kept is scaled by the inverse of the realised probability of keeping, as everywhere here; the paper divides
/// by the share of heads that happened to be kept. The paper's schedule of the rate, high at first, low in the middle
/// and high again, is the caller's, through [`following`](Self::following) or [`set_drop_p`](Self::set_drop_p).
///
/// # Shapes
/// `[B, H, S, D]`, what comes out of the heads before they are put together.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU.
///
/// Zhou, Ge, Wei, Zhou, Xu, "Scheduled DropHead: a regularization method for Transformer models", 2020, arXiv
/// 2004.13342.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{DropHead, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = DropHead::new(0.5, Arc::new(MaskGenerator::new(42)))?;
/// let y = layer.forward(&Tensor::ones((2, 8, 3, 4), DType::F32, &Device::Cpu)?, true)?;
/// let sums = y.sum((2, 3))?.flatten_all()?.to_vec1::<f32>()?;
/// assert!(sums.iter().all(|sum| [0., 24.].contains(sum)), "a head as a whole");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DropHead(Site);

const NAME: &str = "drop_head";

impl DropHead {
    /// A layer that drops each head of each sample with probability `drop_p`.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        Site::new(drop_p, generator).checked(NAME).map(Self)
    }

    /// The mask of this call, of shape `[B, H]`.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.0.next_mask(NAME, train)
    }

    /// Drops heads if `train` is true.
    ///
    /// # Errors
    /// The rate is no probability; `xs` has not four dimensions, or is refused by [`broadcast_dropout`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        if xs.rank() != 4 {
            bail!("{NAME}: xs: expected [B, H, S, D], got {:?}; reshape it", xs.dims())
        }
        broadcast_dropout(xs, (D::Minus2, D::Minus1), &self.next_mask(train)?)
    }
}

rate_methods!(DropHead, 0);

module_methods!(DropHead);
