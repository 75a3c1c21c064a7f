use candle_core::{Result, Tensor};

use crate::composed::{Keep, wide};
use crate::mask::MaskArgs;

pub(super) fn dropout(mask: &MaskArgs, x: &Tensor) -> Result<Tensor> {
    Keep::new(mask, x.dims(), x.device())?.drop(&wide(x)?)?.to_dtype(x.dtype())
}
