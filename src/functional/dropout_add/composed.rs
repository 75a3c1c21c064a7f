use candle_core::{Result, Tensor};

use crate::composed::{Keep, biased, unmoved_by};
use crate::mask::MaskArgs;

pub(in crate::functional) fn dropout_add(
    mask: &MaskArgs,
    x: &Tensor,
    residual: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    if x.elem_count() == 0 {
        return unmoved_by([residual, bias], x);
    }
    let (keep, branch) = (Keep::new(mask, x.dims(), x.device())?, biased(x, bias)?);
    keep.add(&branch, residual)?.to_dtype(x.dtype())
}
