//! The naive formula of `column_sums`.

use candle_core::{Result, Tensor};

use crate::dropout;

/// `sum over all rows of (keep ? x * drop_scale : 0)`.
pub fn formula(x: &Tensor, keep: &Tensor, drop_scale: f64) -> Result<Tensor> {
    let cols = x.dims().last().copied().unwrap_or(1);
    dropout::formula(x, keep, drop_scale)?.reshape(((), cols))?.sum(0)
}
