use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::site::{Site, module_methods, rate_methods};
use crate::functional::broadcast_dropout;
use crate::mask::{DropMask, MaskGenerator};

/// Dropout whose mask has any shape that broadcasts over the input: Keras' `Dropout(rate, noise_shape)`.
///
/// # Shapes
/// `xs` of as many dimensions as `noise_shape` has entries. `Some(1)` shares the mask over that dimension, whatever
/// its size; `None` does not, nor does another number, which the size then has to be. The mask has the shape of what
/// is not shared; see [`broadcast_dropout`].
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{BroadcastDropout, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let generator = Arc::new(MaskGenerator::new(42));
/// let layer = BroadcastDropout::new(0.5, &[None, Some(1), None], generator)?;
/// let y = layer.forward(&Tensor::ones((20, 3, 10), DType::F32, &Device::Cpu)?, true)?;
/// let steps = y.to_vec3::<f32>()?;
/// assert!(steps.iter().all(|steps| steps[0] == steps[1] && steps[0] == steps[2]));
/// # Ok(())
/// # }
/// ```
#[doc(alias = "noise_shape")]
#[doc(alias = "broadcast_dims")]
#[derive(Clone, Debug)]
pub struct BroadcastDropout {
    site: Site,
    noise_shape: Vec<Option<usize>>,
}

const NAME: &str = "broadcast_dropout";

impl BroadcastDropout {
    /// A layer that drops each group with probability `drop_p`.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn new(
        drop_p: impl Into<f64>,
        noise_shape: &[Option<usize>],
        generator: Arc<MaskGenerator>,
    ) -> Result<Self> {
        let site = Site::new(drop_p, generator).checked(NAME)?;
        Ok(Self { site, noise_shape: noise_shape.to_vec() })
    }

    /// The mask of this call; its shape is that of what is not shared.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.site.next_mask(NAME, train)
    }

    /// Drops groups if `train` is true.
    ///
    /// # Errors
    /// The rate is no probability; `noise_shape` does not broadcast to `xs`; `xs` is refused by [`broadcast_dropout`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let fits = |(noise, size): (&Option<usize>, &usize)| {
            noise.is_none_or(|noise| noise == 1 || noise == *size)
        };
        let (noise_shape, dims) = (&self.noise_shape, xs.dims());
        if noise_shape.len() != dims.len() || !noise_shape.iter().zip(dims).all(fits) {
            bail!(
                "{NAME}: xs: expected a shape that the noise shape {noise_shape:?} broadcasts to, got {dims:?}; give \
                 an entry for each dimension: None, 1 where it is shared, or its size"
            )
        }
        let shared: Vec<usize> = (0..dims.len()).filter(|d| noise_shape[*d] == Some(1)).collect();
        broadcast_dropout(xs, shared, &self.next_mask(train)?)
    }
}

rate_methods!(BroadcastDropout, site);

module_methods!(BroadcastDropout);
