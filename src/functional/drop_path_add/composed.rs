use candle_core::{Result, Tensor};

use crate::composed::{Keep, unmoved_by, wide};
use crate::mask::MaskArgs;

pub(super) fn drop_path_add(
    mask: &MaskArgs,
    samples: usize,
    x: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    if x.elem_count() == 0 {
        return unmoved_by([residual], x);
    }
    let (keep, branch) = (Keep::of_samples(mask, samples, x)?, wide(x)?);
    keep.add(&branch, residual)?.to_dtype(x.dtype())
}
