use candle_core::{Result, Tensor};

use crate::composed::{Keep, unmoved_by};
use crate::mask::MaskArgs;

pub(super) fn zoneout(mask: &MaskArgs, new: &Tensor, old: &Tensor) -> Result<Tensor> {
    if mask.keeps_all() {
        return unmoved_by([Some(old)], new);
    }
    Keep::new(mask, new.dims(), new.device())?.select(new, old)
}
