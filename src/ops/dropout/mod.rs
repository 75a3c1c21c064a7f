//! `y = keep ? x * scale : 0`.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use crate::elem::check_dtype;
use crate::mask::{DropMask, MaskArgs};

const NAME: &str = "dropout";

/// Zeroes elements at random and scales the others, so that the expectation stays.
///
/// ```text
/// y = keep ? x * scale : 0            dx = keep ? dy * scale : 0
/// ```
///
/// # Shapes
/// `x` of any shape, strided or not; `y` has its shape, and so has the mask.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU. Halves are computed in f32 and rounded once.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone; no mask is stored, backward draws it again. What is
/// dropped becomes an exact 0 by selection: a dropped infinity or NaN vanishes. With
/// [`DropMask::none`] nothing is launched and `x` itself is returned.
///
/// # Errors
/// `x` is no float tensor, or f64 on CUDA; the window of `drop` does not fit `x`.
///
/// Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: a simple way to prevent neural
/// networks from overfitting", JMLR 15, 2014 (eq. 4-6, inverted form).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey, dropout};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?;
/// let y = dropout(&x, &DropMask::new(0.5, MaskKey::new(3))?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [0., 4., 6., 8.]);
/// # Ok(())
/// # }
/// ```
pub fn dropout(x: &Tensor, drop: &DropMask) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    let mask = drop.args(NAME, x.dims())?;
    if drop.is_none() {
        return Ok(x.clone());
    }
    x.contiguous()?.apply_op1(Dropout { mask })
}

/// The op; its backward pass is the op itself, applied to the gradient.
struct Dropout {
    mask: MaskArgs,
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((cpu::fwd(&self.mask, x, layout)?, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        Ok((cuda::fwd(&self.mask, x, layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        dx(&self.mask, &dy.contiguous()?).map(Some)
    }
}

/// The gradient of what is dropped, from a contiguous `dy`: for every op that ends in a dropout.
pub(super) fn dx(mask: &MaskArgs, dy: &Tensor) -> Result<Tensor> {
    if mask.keeps_all() { Ok(dy.clone()) } else { dy.apply_op1(Dropout { mask: *mask }) }
}
