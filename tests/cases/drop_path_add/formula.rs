//! The naive formula of `drop_path_add`.

use candle_core::{Result, Tensor};

use crate::dropout_add;

/// `residual[n] + (keep[n] ? x[n] * drop_scale : 0)`.
///
/// `keep` has one entry for each sample, or one for all.
pub fn formula(x: &Tensor, residual: &Tensor, keep: &Tensor, drop_scale: f64) -> Result<Tensor> {
    let mut per_sample = vec![1; x.rank()];
    if let Some(samples) = per_sample.first_mut() {
        *samples = keep.elem_count();
    }
    let keep = keep.reshape(per_sample)?.broadcast_as(x.shape())?;
    dropout_add::formula(x, residual, None, &keep, drop_scale)
}
