//! `candle_nn::loss`, with a cross entropy in one pass and a binary one that is finite for any logit.

use candle_core::{DType, Result, Tensor, bail};
pub use candle_nn::loss::*;

use crate::check::has_passes;
use crate::composed::wide;
use crate::functional::{self, CrossEntropyConfig};

/// The mean cross entropy of logits and classes, in the place of [`candle_nn::loss::cross_entropy`].
///
/// ```text
/// loss = mean over the rows of (log Σ_j exp(inp_j) - inp_target)
/// ```
///
/// It is [`functional::cross_entropy`](crate::functional::cross_entropy()) with its defaults, in the dtype of the
/// logits: one pass over them instead of eight, computed in f32 for halves. Targets of -100 count nothing, as in
/// PyTorch; candle refuses them.
///
/// # Shapes
/// `inp` `[N, C]`, strided or not, and `target` `[N]`; the loss is a scalar.
///
/// # Dtypes
/// `inp` in f32, f16, bf16, and f64 on the CPU, others are left to candle's; `target` in any integer dtype. The loss
/// has the dtype of `inp`.
///
/// # Errors
/// `inp` is no matrix, `target` has not one class for each row, or no integer dtype. On the CPU also: a target that
/// is no class; u32 and u8 have no number that candle's would have passed over.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::nn::loss::cross_entropy;
///
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[0f32, 0.], [7., 7.]], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &Tensor::new(&[1u32, 0], &Device::Cpu)?)?;
/// assert_eq!(loss.to_scalar::<f32>()?, std::f32::consts::LN_2);
/// # Ok(())
/// # }
/// ```
pub fn cross_entropy(inp: &Tensor, target: &Tensor) -> Result<Tensor> {
    if inp.rank() != 2 {
        bail!(
            "cross_entropy: inp: expected [N, C], got {:?}; flatten all but the classes",
            inp.dims()
        )
    }
    if !has_passes(inp) {
        return candle_nn::loss::cross_entropy(inp, target);
    }
    let target = match target.dtype() {
        DType::U8 | DType::I16 | DType::I32 => target.to_dtype(DType::I64)?,
        _ => target.clone(),
    };
    let config = CrossEntropyConfig::default();
    functional::cross_entropy(inp, &target, &config)?.to_dtype(inp.dtype())
}

/// The mean binary cross entropy of logits, in the place of
/// [`candle_nn::loss::binary_cross_entropy_with_logit`], whose loss and gradients are NaN as soon as a sigmoid
/// rounds to 0 or 1, in f32 above a logit of 17.
///
/// ```text
/// loss = mean of (max(x, 0) - x * target + log(1 + exp(-|x|)))
/// ```
///
/// # Shapes
/// `inp` and `target` of one shape; the loss is a scalar.
///
/// # Dtypes
/// Any float dtype, one for both; halves are computed in f32. The loss has that dtype.
///
/// # Errors
/// Shapes, dtypes or devices differ.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::nn::loss::binary_cross_entropy_with_logit;
///
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[100f32, -50.], &Device::Cpu)?;
/// let target = Tensor::new(&[1f32, 1.], &Device::Cpu)?;
/// assert_eq!(binary_cross_entropy_with_logit(&logits, &target)?.to_scalar::<f32>()?, 25.);
/// # Ok(())
/// # }
/// ```
pub fn binary_cross_entropy_with_logit(inp: &Tensor, target: &Tensor) -> Result<Tensor> {
    if target.dims() != inp.dims() || target.dtype() != inp.dtype() {
        bail!(
            "binary_cross_entropy_with_logit: target: expected {:?} of {:?} like inp, got {:?} of {:?}; \
             reshape it, or convert it with to_dtype",
            inp.dims(),
            inp.dtype(),
            target.dims(),
            target.dtype()
        )
    }
    let (x, target) = (wide(inp)?, wide(target)?);
    let log = (x.abs()?.neg()?.exp()? + 1.)?.log()?;
    ((x.relu()? - (&x * target)?)? + log)?.mean_all()?.to_dtype(inp.dtype())
}
