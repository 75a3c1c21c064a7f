use candle_core::{Result, Tensor};

use super::Places;
use crate::composed::{unmoved_by, wide};

/// The kept samples.
pub(super) fn gather(of_kept: &Tensor, x: &Tensor) -> Result<Tensor> {
    x.index_select(of_kept, 0)
}

/// `residual`, and where a sample was kept what the branch made of it.
pub(super) fn scatter_add(
    places: &Places,
    scale: f32,
    branch: &Tensor,
    residual: &Tensor,
) -> Result<Tensor> {
    let dtype = residual.dtype();
    let Some(of_kept) = &places.of_kept else {
        return unmoved_by([Some(branch)], residual);
    };
    let kept = (wide(branch)? * f64::from(scale))?;
    wide(residual)?.index_add(of_kept, &kept, 0)?.to_dtype(dtype)
}
