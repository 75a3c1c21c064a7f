//! The naive formula of `dropout_add_norm`.

use candle_core::{Result, Tensor};
use candle_dropout::functional::Norm;

use crate::{dropout, dropout_add, norm};

/// `z = residual + (keep ? (x + bias) * drop_scale : 0)` and its norm.
pub fn formula(
    x: &Tensor,
    residual: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &Norm,
    keep: &Tensor,
    drop_scale: f64,
) -> Result<(Tensor, Tensor)> {
    let z = match (residual, bias) {
        (Some(residual), bias) => dropout_add::formula(x, residual, bias, keep, drop_scale)?,
        (None, Some(bias)) => {
            dropout::formula(&x.broadcast_add(bias)?.reshape(x.shape())?, keep, drop_scale)?
        }
        (None, None) => dropout::formula(x, keep, drop_scale)?,
    };
    let n = norm::formula(&z, norm)?;
    Ok((z, n))
}
