use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::site::{Site, module_methods, rate_methods};
use crate::functional::broadcast_dropout;
use crate::mask::{DropMask, MaskGenerator};

/// A layer that drops whole channels of `[N, C, ..]` or, without a batch, of `[C, ..]`, with `$n` dimensions of space.
macro_rules! spatial {
    ($(#[$meta:meta])* $Layer:ident, $name:literal, $module:ident, $n:literal, $shape:literal) => {
        mod $module {
            use super::*;

            const NAME: &str = $name;

            $(#[$meta])*
            #[derive(Clone, Debug)]
            pub struct $Layer(Site);

            impl $Layer {
                /// A layer that drops each channel of each sample with probability `drop_p`.
                ///
                /// # Errors
                /// `drop_p` is no probability.
                pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
                    Site::new(drop_p, generator).checked(NAME).map(Self)
                }

                /// The mask of this call, of shape `[N, C]` or, without a batch, `[C]`.
                ///
                /// # Errors
                /// The rate is no probability.
                pub fn next_mask(&self, train: bool) -> Result<DropMask> {
                    self.0.next_mask(NAME, train)
                }

                /// Drops channels if `train` is true.
                ///
                /// # Errors
                /// The rate is no probability; `xs` has another rank, or is refused by [`broadcast_dropout`].
                pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
                    channels(NAME, xs, $n, $shape)?;
                    broadcast_dropout(xs, space(xs, $n), &self.next_mask(train)?)
                }
            }

            rate_methods!($Layer, 0);

            module_methods!($Layer);
        }
        pub use $module::$Layer;
    };
}

spatial! {
    /// Drops whole channels of sequences, [`broadcast_dropout`] with the mask `[N, C]`.
    ///
    /// # Shapes
    /// `[N, C, L]` or, without a batch, `[C, L]`; PyTorch's `Dropout1d` and Keras' `SpatialDropout1D` (whose channels
    /// are the last dimension).
    ///
    /// # Dtypes
    /// f32, f16, bf16, and f64 on the CPU.
    ///
    /// Tompson, Goroshin, Jain, LeCun, Bregler, "Efficient object localization using convolutional networks", 2015,
    /// arXiv 1411.4280.
    ///
    /// # Example
    /// ```
    /// use std::sync::Arc;
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_dropout::{Dropout1d, MaskGenerator};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let layer = Dropout1d::new(0.5, Arc::new(MaskGenerator::new(42)))?;
    /// let x = Tensor::ones((10, 4, 2), DType::F32, &Device::Cpu)?;
    /// let sums = layer.forward(&x, true)?.sum(2)?.flatten_all()?.to_vec1::<f32>()?;
    /// assert!(sums.iter().all(|sum| [0., 4.].contains(sum)), "a channel as a whole");
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "SpatialDropout1D")]
    Dropout1d, "dropout1d", one, 1, "[N, C, L] or [C, L]"
}

spatial! {
    /// Drops whole channels of images, [`broadcast_dropout`] with the mask `[N, C]`.
    ///
    /// # Shapes
    /// `[N, C, H, W]` or, without a batch, `[C, H, W]`; PyTorch's `Dropout2d`, which as of version 2 reads three
    /// dimensions as `[N, C, L]` and warns that it will change: take [`Dropout1d`] for those.
    ///
    /// # Dtypes
    /// f32, f16, bf16, and f64 on the CPU.
    ///
    /// Tompson, Goroshin, Jain, LeCun, Bregler, "Efficient object localization using convolutional networks", 2015,
    /// arXiv 1411.4280.
    ///
    /// # Example
    /// ```
    /// use std::sync::Arc;
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_dropout::{Dropout2d, MaskGenerator};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let layer = Dropout2d::new(0.5, Arc::new(MaskGenerator::new(42)))?;
    /// let x = Tensor::ones((10, 4, 2, 2), DType::F32, &Device::Cpu)?;
    /// let sums = layer.forward(&x, true)?.sum((2, 3))?.flatten_all()?.to_vec1::<f32>()?;
    /// assert!(sums.iter().all(|sum| [0., 8.].contains(sum)), "a channel as a whole");
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "SpatialDropout2D")]
    Dropout2d, "dropout2d", two, 2, "[N, C, H, W] or [C, H, W]"
}

spatial! {
    /// Drops whole channels of volumes, [`broadcast_dropout`] with the mask `[N, C]`.
    ///
    /// # Shapes
    /// `[N, C, D, H, W]` or, without a batch, `[C, D, H, W]`; PyTorch's `Dropout3d`.
    ///
    /// # Dtypes
    /// f32, f16, bf16, and f64 on the CPU.
    ///
    /// Tompson, Goroshin, Jain, LeCun, Bregler, "Efficient object localization using convolutional networks", 2015,
    /// arXiv 1411.4280.
    ///
    /// # Example
    /// ```
    /// use std::sync::Arc;
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_dropout::{Dropout3d, MaskGenerator};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let layer = Dropout3d::new(0.5, Arc::new(MaskGenerator::new(42)))?;
    /// let x = Tensor::ones((10, 4, 2, 2, 2), DType::F32, &Device::Cpu)?;
    /// let sums = layer.forward(&x, true)?.sum((2, 3, 4))?.flatten_all()?.to_vec1::<f32>()?;
    /// assert!(sums.iter().all(|sum| [0., 16.].contains(sum)), "a channel as a whole");
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "SpatialDropout3D")]
    Dropout3d, "dropout3d", three, 3, "[N, C, D, H, W] or [C, D, H, W]"
}

/// Checks that `xs` has channels, `n` dimensions of space, and perhaps a batch.
pub(super) fn channels(layer: &str, xs: &Tensor, n: usize, shape: &str) -> Result<()> {
    if xs.rank() != n + 1 && xs.rank() != n + 2 {
        bail!("{layer}: xs: expected {shape}, got {:?}; reshape it", xs.dims())
    }
    Ok(())
}

/// The last `n` dimensions.
fn space(xs: &Tensor, n: usize) -> Vec<usize> {
    (xs.rank() - n..xs.rank()).collect()
}
