use candle_core::{Result, Tensor};

use crate::check::rows_cols;
use crate::composed::{Keep, wide};
use crate::mask::MaskArgs;

pub(super) fn column_sums(mask: &MaskArgs, x: &Tensor) -> Result<Tensor> {
    let kept = Keep::new(mask, x.dims(), x.device())?.drop(&wide(x)?)?;
    kept.reshape(rows_cols(x.dims()))?.sum(0)?.to_dtype(x.dtype())
}
