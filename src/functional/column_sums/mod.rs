//! `y[c] = Σ_rows (keep ? x * scale : 0)`.

mod args;
mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor};

pub use args::ColumnSumsGrids;

use super::dropout;
use crate::check::{check_dtype, rows_cols};
use crate::composed::composes;
use crate::graph::{node, run_pass};
use crate::mask::{DropMask, MaskArgs};

const NAME: &str = "column_sums";

/// The sum of each column of what a dropout leaves: the gradient of a bias, without the tensor in between.
///
/// ```text
/// y[c] = sum over all rows of (keep ? x * scale : 0)
/// dx = keep ? dy[c] * scale : 0
/// ```
///
/// # Shapes
/// `x` of shape `[.., C]`, strided or not, and the mask of the same; `y` of shape `[C]`. A scalar is a row of
/// one column.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU. Sums are taken in f32 (f64 for f64), in an order that depends on the
/// shape alone, and rounded once.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone and equal those of [`dropout`](super::dropout()) on `x`;
/// [`DropMask::none`] sums all. What is dropped adds an exact 0, whatever it is.
///
/// # Errors
/// `x` is no float tensor, or f64 off the CPU; the window of `drop` does not fit `x`.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::DropMask;
/// use candle_dropout::functional::column_sums;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// assert_eq!(column_sums(&x, &DropMask::none())?.to_vec1::<f32>()?, [4., 6.]);
/// # Ok(())
/// # }
/// ```
pub fn column_sums(x: &Tensor, drop: &DropMask) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    let mask = drop.args(NAME, x.dims())?;
    if composes(x.device()) {
        return composed::column_sums(&mask, x);
    }
    sums(mask, &x.contiguous()?)
}

/// The sums of a contiguous `x`: for every op that adds a bias.
pub(super) fn sums(mask: MaskArgs, x: &Tensor) -> Result<Tensor> {
    let ((rows, cols), shape) = (rows_cols(x.dims()), x.shape().clone());
    let y = run_pass!(NAME, x, fwd(&mask, x))?;
    node(NAME, [Some(x)], (y, cols), move |back| {
        let dy = back.dy.broadcast_as((rows, cols))?.contiguous()?.reshape(&shape)?;
        Ok([Some(dropout::dx(mask, &dy)?)])
    })
}
