use candle_core::{Result, Tensor};

use crate::functional::dropout_add::composed::dropout_add;
use crate::functional::norm::Norm;
use crate::mask::MaskArgs;

pub(super) fn dropout_add_norm(
    mask: &MaskArgs,
    x: &Tensor,
    residual: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &Norm,
) -> Result<(Tensor, Tensor)> {
    let z = dropout_add(mask, x, residual, bias)?;
    let n = norm.composed(&z)?;
    Ok((z, n))
}
