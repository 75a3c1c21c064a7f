use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::site::{Site, module_methods, rate_methods};
use crate::functional::dropout;
use crate::mask::{DropMask, MaskGenerator};

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
/// let layer = Dropout::with_generator(0.5, Arc::new(MaskGenerator::new(42)))?;
/// let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
/// let y = layer.forward(&x, true)?;
/// assert!(y.flatten_all()?.to_vec1::<f32>()?.iter().all(|y| [0., 2.].contains(y)));
/// assert_eq!(layer.forward(&x, false)?.to_vec2::<f32>()?, [[1.; 3]; 2]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Dropout(Site);

const NAME: &str = "dropout";

impl Dropout {
    /// A layer that draws from the process-wide generator; see [`set_seed`](crate::set_seed). Candle's signature has
    /// no place for an error: a rate that is no probability is one of every call.
    pub fn new(drop_p: impl Into<f64>) -> Self {
        Self(Site::process_wide(drop_p))
    }

    /// A layer that draws from a generator shared within one model.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn with_generator(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        Site::new(drop_p, generator).checked(NAME).map(Self)
    }

    /// The mask of this call: for fused ops that apply the dropout themselves. It is for one site: two ops that
    /// take the same mask drop the same elements.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.0.next_mask(NAME, train)
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

rate_methods!(Dropout, 0);

module_methods!(Dropout);
