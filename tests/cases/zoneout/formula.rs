//! The naive formula of `zoneout`.

use candle_core::{Result, Tensor};

/// `keep ? new : old`.
pub fn formula(new: &Tensor, old: &Tensor, keep: &Tensor) -> Result<Tensor> {
    keep.where_cond(new, old)
}
