use candle_core::{Result, Tensor};

use crate::composed::{times, unmoved_by, wide};
use crate::mask::MaskArgs;

/// `a + scale * b * z`; the noise is a constant, drawn on the host.
pub(super) fn sum(z: &MaskArgs, scale: f64, a: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    if a.elem_count() == 0 {
        return unmoved_by([b], a);
    }
    let (wide_a, dims) = (wide(a)?, a.dims());
    let z = Tensor::from_vec(z.normals(dims), dims, a.device())?.to_dtype(wide_a.dtype())?;
    let z = times(&z, scale)?;
    let noise = match b {
        Some(b) => (wide(b)? * z)?,
        None => z,
    };
    (wide_a + noise)?.to_dtype(a.dtype())
}
