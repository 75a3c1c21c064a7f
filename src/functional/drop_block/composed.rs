use candle_core::{Result, Tensor};

use super::{DropBlockArgs, cpu, scale};
use crate::composed::{select, wide};
use crate::mask::MaskArgs;

/// `dims` is the shape of the mask, with one channel where they share it.
pub(super) fn drop_block(
    mask: &MaskArgs,
    args: &DropBlockArgs,
    dims: [usize; 4],
    x: &Tensor,
    dropped: Option<&Tensor>,
) -> Result<Tensor> {
    let kept = Tensor::from_vec(cpu::kept(mask, args, dims[0] * dims[1]), &dims, x.device())?;
    select(&kept, &(wide(x)? * scale(args, dropped)?)?, 0.)?.to_dtype(x.dtype())
}
