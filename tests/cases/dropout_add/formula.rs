//! The naive formula of `dropout_add`.

use candle_core::{Result, Tensor};

/// `residual + (keep ? (x + bias) * drop_scale : 0)`.
pub fn formula(
    x: &Tensor,
    residual: &Tensor,
    bias: Option<&Tensor>,
    keep: &Tensor,
    drop_scale: f64,
) -> Result<Tensor> {
    let branch = match bias {
        Some(bias) if x.rank() == 0 => (x + bias.squeeze(0)?)?,
        Some(bias) => x.broadcast_add(bias)?,
        None => x.clone(),
    };
    let kept = (residual + (branch * drop_scale)?)?;
    keep.where_cond(&kept, residual)
}
