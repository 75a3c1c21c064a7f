//! `y = residual + (keep ? (x + bias) * scale : 0)`.

pub(super) mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor};

use super::{column_sums, dropout};
use crate::check::{check_bias, check_dtype, check_same};
use crate::composed::composes;
use crate::graph::{Backward, node, run_pass};
use crate::mask::{DropMask, MaskArgs};

const NAME: &str = "dropout_add";

/// Adds the dropout of a (biased) branch to its residual stream, in one pass over memory.
///
/// ```text
/// y = residual + (keep ? (x + bias) * scale : 0)
/// dx = keep ? dy * scale : 0          dresidual = dy          dbias = sum of dx over all rows
/// ```
///
/// # Shapes
/// `x` and `residual` of one shape `[.., C]`, strided or not; `bias` of shape `[C]`. `y` has the shape
/// of `x`, and so has the mask.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all tensors. Halves are computed in f32 and rounded
/// once.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone and equal those of [`dropout`](super::dropout()) with the
/// same `drop`: `dropout_add(x, residual, None, drop)` is `residual + dropout(x, drop)`, bit for bit in
/// f32. Where the branch is dropped, the bare residual remains, whatever `x` holds (a residual of -0
/// too, which the sum would turn into 0).
///
/// # Errors
/// A tensor is no float tensor, or f64 off the CPU; shapes, dtypes or devices differ; the window of `drop`
/// does not fit `x`.
///
/// The bias-dropout-add of Megatron-LM: Shoeybi, Patwary, Puri, LeGresley, Casper, Catanzaro, 2019,
/// arXiv 1909.08053.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey};
/// use candle_dropout::functional::dropout_add;
///
/// # fn main() -> candle_core::Result<()> {
/// let branch = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?;
/// let stream = Tensor::new(&[10f32, 20., 30., 40.], &Device::Cpu)?;
/// let y = dropout_add(&branch, &stream, None, &DropMask::new(0.5, MaskKey::new(3))?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [10., 24., 36., 48.]);
/// # Ok(())
/// # }
/// ```
pub fn dropout_add(
    x: &Tensor,
    residual: &Tensor,
    bias: Option<&Tensor>,
    drop: &DropMask,
) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    check_same(NAME, "residual", residual, "x", x)?;
    if let Some(repeats) = drop.repeats(NAME, x.dims(), Some(0))? {
        return repeats.each(|part| {
            dropout_add(&part.of("x", x)?, &part.of("residual", residual)?, bias, &part.drop)
        });
    }
    let mask = drop.args(NAME, x.dims())?;
    if let Some(bias) = bias {
        check_bias(NAME, bias, x)?;
    }
    if composes(x.device()) {
        return composed::dropout_add(&mask, x, Some(residual), bias);
    }
    let (x, residual) = (x.contiguous()?, residual.contiguous()?);
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let y = run_pass!(NAME, x, fwd(&mask, &x, &residual, bias.as_ref()))?;
    let inputs = [Some(&x), Some(&residual), bias.as_ref()];
    node(NAME, inputs, (y, x.shape()), move |back| gradients(mask, back))
}

/// `dx`, `dresidual` and `dbias`, for every op that adds a dropout to a residual stream; `dbias` from dy itself
/// and so without the rounding of dx.
pub(super) fn gradients(mask: MaskArgs, back: Backward<'_, 3>) -> Result<[Option<Tensor>; 3]> {
    let dy = back.dy.contiguous()?;
    let dx = back.of(0, || dropout::dx(mask, &dy))?;
    let dbias = back.of(2, || column_sums::sums(mask, &dy))?;
    Ok([dx, Some(dy), dbias])
}
