//! The naive formula of `softmax_dropout`.

use candle_core::{D, Device, Result, Tensor};
use candle_dropout::AttentionMask;

use crate::dropout;

/// `keep ? softmax(scale * scores + mask) * drop_scale : 0`, with zeros in rows of which every key is
/// masked.
pub fn formula(
    scores: &Tensor,
    scale: f64,
    mask: &AttentionMask,
    keep: &Tensor,
    drop_scale: f64,
) -> Result<Tensor> {
    if scores.rank() == 0 {
        let (row, keep) = (scores.unsqueeze(0)?, keep.unsqueeze(0)?);
        return formula(&row, scale, mask, &keep, drop_scale)?.squeeze(0);
    }
    let scaled = (scores * scale)?;
    let t = match mask {
        AttentionMask::None => scaled,
        AttentionMask::Additive(additive) => scaled.broadcast_add(additive)?,
        AttentionMask::Causal => {
            let masked = scaled.ones_like()?.affine(0., f64::NEG_INFINITY)?;
            let visible = causal(scaled.dim(D::Minus2)?, scaled.dim(D::Minus1)?, scores.device())?;
            visible.broadcast_as(scaled.shape())?.where_cond(&scaled, &masked)?
        }
    };
    dropout::formula(&softmax(&t)?, keep, drop_scale)
}

/// Over the last dimension, with zeros in rows of which every element is -inf.
pub fn softmax(t: &Tensor) -> Result<Tensor> {
    let max = t.max_keepdim(D::Minus1)?.detach();
    let max = max.eq(f64::NEG_INFINITY)?.where_cond(&max.zeros_like()?, &max)?;
    let e = t.broadcast_sub(&max)?.exp()?;
    let sum = e.sum_keepdim(D::Minus1)?;
    let sum = sum.eq(0.)?.where_cond(&sum.ones_like()?, &sum)?;
    e.broadcast_div(&sum)
}

/// 1 where query `i` sees key `j`: `j <= i + keys - queries`.
fn causal(queries: usize, keys: usize, device: &Device) -> Result<Tensor> {
    let visible = |i: usize, j: usize| u8::from(j + queries <= i + keys);
    let visible: Vec<_> =
        (0..queries).flat_map(|i| (0..keys).map(move |j| visible(i, j))).collect();
    Tensor::from_vec(visible, (queries, keys), device)
}
