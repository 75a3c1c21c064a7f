use candle_core::{Result, Tensor};

use super::args::{Groups, Values};
use crate::composed::{select, times, wide};

pub(super) fn broadcast_dropout(
    groups: &Groups,
    values: Values,
    x: &Tensor,
    ids: Option<&Tensor>,
) -> Result<Tensor> {
    let kept = kept(groups, x, ids)?;
    let wide = times(&wide(x)?.reshape((groups.rows, groups.cols))?, values.scale)?;
    let shifted = if values.shift == 0. { wide } else { (wide + values.shift)? };
    select(&kept, &shifted, values.fill)?.reshape(x.shape())?.to_dtype(x.dtype())
}

/// 1 where an element of the tensor as `[rows, cols]` is kept, u8, perhaps to be broadcast over its columns.
fn kept(groups: &Groups, x: &Tensor, ids: Option<&Tensor>) -> Result<Tensor> {
    let Groups { mask, rows, cols, mask_cols, .. } = *groups;
    let (keep, dims) = match (mask_cols, ids) {
        (None, _) => (mask.keep(&[rows, cols]), (rows, cols)),
        (Some(mask_cols), None) => (mask.keep(&[rows / mask_cols.max(1), mask_cols]), (rows, 1)),
        (Some(_), Some(ids)) => {
            let ids = ids.flatten_all()?.to_vec1::<u32>()?;
            (ids.iter().map(|id| mask.keep_at(0, *id as usize)).collect(), (rows, 1))
        }
    };
    Tensor::from_vec(keep, dims, x.device())
}
