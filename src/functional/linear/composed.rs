use candle_core::{Result, Tensor};

use crate::composed::biased;

/// From a matrix x.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.matmul(weight)?;
    // The gradient of a bias is a sum over all rows: not one of halves.
    if bias.is_some() { biased(&y, bias)?.to_dtype(y.dtype()) } else { Ok(y) }
}
