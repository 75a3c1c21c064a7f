//! The naive formulas of `gaussian`.

use candle_core::{Result, Tensor};

/// `a + scale * b * z`; without b, 1 stands for it.
pub fn formula(a: &Tensor, b: Option<&Tensor>, z: &Tensor, scale: f64) -> Result<Tensor> {
    let noise = (z.to_dtype(a.dtype())? * scale)?;
    match b {
        Some(b) => a + (b * noise)?,
        None => a + noise,
    }
}
