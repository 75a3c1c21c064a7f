//! The naive formula of `drop_block`.

use candle_core::{DType, Result, Tensor};
use candle_dropout::functional::DropBlockConfig;

/// 1 where a block is dropped, over all planes of a mask of seeds `[.., H, W]`: seeds widened by the maximum over
/// windows, as timm has it.
pub fn dropped(config: &DropBlockConfig, keep: &Tensor) -> Result<Tensor> {
    let (height, width) = (keep.dims()[keep.rank() - 2], keep.dims()[keep.rank() - 1]);
    let mut seeds = keep.eq(0u8)?.to_dtype(DType::F32)?.reshape(((), 1, height, width))?;
    let blocks = [height, width].map(|size| config.block_size.min(size));
    if !config.fast {
        let [bh, bw] = blocks;
        let inside = Tensor::ones((height - bh + 1, width - bw + 1), DType::F32, keep.device())?;
        let inside = inside.pad_with_zeros(0, bh / 2, (bh - 1) / 2)?;
        seeds = seeds.broadcast_mul(&inside.pad_with_zeros(1, bw / 2, (bw - 1) / 2)?)?;
    }
    // A window around an element reaches from (b - 1) / 2 before it to b / 2 behind it.
    for (axis, block) in [2, 3].into_iter().zip(blocks) {
        seeds = seeds.pad_with_zeros(axis, (block - 1) / 2, block / 2)?;
    }
    seeds.max_pool2d_with_stride((blocks[0], blocks[1]), (1, 1))?.reshape(keep.shape())
}

/// `dropped ? 0 : x * elements / kept`, or without that factor.
pub fn formula(x: &Tensor, config: &DropBlockConfig, keep: &Tensor) -> Result<Tensor> {
    if keep.elem_count() == 0 {
        return Ok(x.clone());
    }
    let kept = dropped(config, keep)?.eq(0f32)?;
    let count = kept.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
    let scaled = config.scale_by_keep && count > 0.;
    let scaled = (x * if scaled { keep.elem_count() as f64 / count } else { 1. })?;
    let kept = if config.couple_channels { kept.unsqueeze(1)? } else { kept };
    kept.broadcast_as(x.shape())?.where_cond(&scaled, &scaled.zeros_like()?)
}
