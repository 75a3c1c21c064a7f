//! The naive formulas of `softmax_dropout` and of `softmax_drop_key`.

use candle_core::{D, Device, Result, Tensor};
use candle_dropout::functional::AttentionMask;

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
    let t = inputs(scores, scale, mask)?;
    dropout::formula(&softmax(&t)?.reshape(scores.shape())?, keep, drop_scale)
}

/// `softmax(keep ? scale * scores + mask : -inf)`, with zeros in rows of which every key is masked or dropped.
pub fn drop_key_formula(
    scores: &Tensor,
    scale: f64,
    mask: &AttentionMask,
    keep: &Tensor,
) -> Result<Tensor> {
    let t = inputs(scores, scale, mask)?;
    softmax(&drop_keys(&t, &keep.reshape(t.shape())?)?)?.reshape(scores.shape())
}

/// `keep ? t : -inf`
pub fn drop_keys(t: &Tensor, keep: &Tensor) -> Result<Tensor> {
    keep.where_cond(t, &t.ones_like()?.affine(0., f64::NEG_INFINITY)?)
}

/// `scale * scores + mask`; a scalar is a row of one key.
fn inputs(scores: &Tensor, scale: f64, mask: &AttentionMask) -> Result<Tensor> {
    let scaled = if scores.rank() == 0 { scores.unsqueeze(0)? } else { scores.clone() };
    let scaled = (scaled * scale)?;
    match mask {
        AttentionMask::None => Ok(scaled),
        AttentionMask::Additive(additive) => scaled.broadcast_add(additive),
        AttentionMask::Causal => {
            let visible = causal(scaled.dim(D::Minus2)?, scaled.dim(D::Minus1)?, scores.device())?;
            drop_keys(&scaled, &visible.broadcast_as(scaled.shape())?)
        }
    }
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
