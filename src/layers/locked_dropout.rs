use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::site::{Site, module_methods, rate_methods};
use crate::functional::broadcast_dropout;
use crate::mask::{DropMask, MaskGenerator};

/// Locked (variational) dropout: drops the same columns at each step of time, [`broadcast_dropout`] with the mask
/// `[B, C]`.
///
/// # Shapes
/// `[B, T, C]` or, where [`with_time_first`](Self::with_time_first) says so, `[T, B, C]` as in AWD-LSTM's
/// `LockedDropout`; Keras' `Dropout` with `noise_shape` `(B, 1, C)`. The mask is the same for both.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU.
///
/// Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", 2016, arXiv
/// 1512.05287; Merity, Keskar, Socher, "Regularizing and optimizing LSTM language models", 2017, arXiv 1708.02182
/// (section 4.2).
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{LockedDropout, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = LockedDropout::new(0.5, Arc::new(MaskGenerator::new(42)))?;
/// let y = layer.forward(&Tensor::ones((2, 3, 8), DType::F32, &Device::Cpu)?, true)?;
/// let steps = y.to_vec3::<f32>()?;
/// assert!(steps.iter().all(|sequence| sequence.iter().all(|step| *step == sequence[0])));
/// assert_ne!(steps[0][0], steps[1][0], "another mask for each sequence");
/// # Ok(())
/// # }
/// ```
#[doc(alias = "VariationalDropout")]
#[doc(alias = "RNNDropout")]
#[derive(Clone, Debug)]
pub struct LockedDropout {
    site: Site,
    time: usize,
}

const NAME: &str = "locked_dropout";

impl LockedDropout {
    /// A layer that drops each column of each sequence with probability `drop_p`, at all steps or at none.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        Ok(Self { site: Site::new(drop_p, generator).checked(NAME)?, time: 1 })
    }

    /// The same layer for `[T, B, C]`.
    pub fn with_time_first(self) -> Self {
        Self { time: 0, ..self }
    }

    /// The mask of this call, of shape `[B, C]`.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.site.next_mask(NAME, train)
    }

    /// Drops columns if `train` is true.
    ///
    /// # Errors
    /// The rate is no probability; `xs` has not three dimensions, or is refused by [`broadcast_dropout`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        if xs.rank() != 3 {
            let expected = if self.time == 1 { "[B, T, C]" } else { "[T, B, C]" };
            bail!("{NAME}: xs: expected {expected}, got {:?}; reshape it", xs.dims())
        }
        let drop = self.next_mask(train)?;
        if self.time == 0 && drop.is_repeated() {
            // The same mask, `[B, C]`, with the batch where its repetitions are.
            return broadcast_dropout(&xs.transpose(0, 1)?, 1, &drop)?.transpose(0, 1);
        }
        broadcast_dropout(xs, self.time, &drop)
    }
}

rate_methods!(LockedDropout, site);

module_methods!(LockedDropout);
