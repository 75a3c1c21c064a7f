//! The naive formula of `linear`.

use candle_core::{Result, Tensor};

/// `x · weight + bias`.
pub fn formula(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.broadcast_matmul(weight)?;
    bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
}
