use std::sync::Arc;

use candle_core::{D, Result, Tensor, bail};

use super::site::{Site, module_methods, rate_methods};
use crate::functional::broadcast_dropout;
use crate::mask::{DropMask, MaskGenerator};

/// Drops whole tokens: all features of a position, [`broadcast_dropout`] with the mask `[B, T]`.
///
/// [`EmbeddingDropout`](crate::EmbeddingDropout) drops words, wherever they occur; this one positions.
///
/// # Shapes
/// `[.., T, C]`; the mask has the shape `[.., T]`.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU.
///
/// Dai, Le, "Semi-supervised sequence learning", 2015, arXiv 1511.01432 (word dropout); Iyyer, Manjunatha, Boyd-Graber,
/// Daumé III, "Deep unordered composition rivals syntactic methods for text classification", ACL 2015 (section 2.2.1,
/// there without a scale).
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{MaskGenerator, TokenDropout};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = TokenDropout::new(0.5, Arc::new(MaskGenerator::new(42)))?;
/// let y = layer.forward(&Tensor::ones((2, 16, 3), DType::F32, &Device::Cpu)?, true)?;
/// let tokens = y.flatten(0, 1)?.to_vec2::<f32>()?;
/// assert!(tokens.iter().all(|token| [[0.; 3], [2.; 3]].contains(&[token[0], token[1], token[2]])));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct TokenDropout(Site);

const NAME: &str = "token_dropout";

impl TokenDropout {
    /// A layer that drops each token with probability `drop_p`.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        Site::new(drop_p, generator).checked(NAME).map(Self)
    }

    /// The mask of this call, of shape `[.., T]`.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.0.next_mask(NAME, train)
    }

    /// Drops tokens if `train` is true.
    ///
    /// # Errors
    /// The rate is no probability; `xs` has fewer than two dimensions, or is refused by [`broadcast_dropout`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        if xs.rank() < 2 {
            bail!("{NAME}: xs: expected [.., T, C], got {:?}; unsqueeze it", xs.dims())
        }
        broadcast_dropout(xs, D::Minus1, &self.next_mask(train)?)
    }
}

rate_methods!(TokenDropout, 0);

module_methods!(TokenDropout);
