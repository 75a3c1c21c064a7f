use candle_core::{Result, Tensor};

use super::Size;
use crate::composed::biased;

/// `[rows, outputs]`
pub(super) fn linear(
    size: Size,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let y = x.reshape((size.rows, size.inputs))?.matmul(weight)?;
    // The gradient of a bias is a sum over all rows: not one of halves.
    if bias.is_some() { biased(&y, bias)?.to_dtype(y.dtype()) } else { Ok(y) }
}
