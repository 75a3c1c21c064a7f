//! The naive formula of `dropout`.

use candle_core::{Result, Tensor};

/// `keep ? x * drop_scale : 0`.
pub fn formula(x: &Tensor, keep: &Tensor, drop_scale: f64) -> Result<Tensor> {
    let kept = (x * drop_scale)?;
    keep.where_cond(&kept, &kept.zeros_like()?)
}
