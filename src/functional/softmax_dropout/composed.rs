use candle_core::{D, Result, Tensor};

use super::{AttentionMask, ScoreArgs};
use crate::composed::{Keep, replace, row_max, select, times, unmoved_by, wide};
use crate::mask::MaskArgs;

pub(super) fn softmax_dropout(
    drop: &MaskArgs,
    args: &ScoreArgs,
    scores: &Tensor,
    mask: &AttentionMask,
) -> Result<Tensor> {
    let (dtype, shape) = (scores.dtype(), scores.shape());
    if shape.elem_count() == 0 || drop.drops_all() {
        let mask = match mask {
            AttentionMask::Additive(mask) => Some(mask),
            AttentionMask::None | AttentionMask::Causal => None,
        };
        return unmoved_by([Some(scores), mask], &scores.zeros_like()?);
    }
    let t = times(&wide(scores)?, args.scale())?;
    let t = match mask {
        AttentionMask::None => t,
        AttentionMask::Additive(mask) => t.broadcast_add(&wide(mask)?)?,
        AttentionMask::Causal => {
            let (queries, keys) = (t.dim(D::Minus2)?, t.dim(D::Minus1)?);
            let seen = (0..queries).flat_map(|query| {
                let visible = args.visible(query, keys);
                (0..keys).map(move |key| u8::from(key < visible))
            });
            let seen = Tensor::from_vec(seen.collect::<Vec<_>>(), (queries, keys), t.device())?;
            select(&seen, &t, f64::NEG_INFINITY)?
        }
    };
    let keep = Keep::new(drop, shape.dims(), t.device())?;
    let t = if args.drops_keys() { keep.or(&t, f64::NEG_INFINITY)? } else { t };
    let t = if t.rank() == 0 { t.reshape(1)? } else { t };
    let p = softmax(&t)?.reshape(shape)?;
    keep.drop(&p)?.to_dtype(dtype)
}

/// Over the last dimension; zeros in a row of -inf alone.
pub(in crate::functional) fn softmax(t: &Tensor) -> Result<Tensor> {
    let e = t.broadcast_sub(&row_max(t)?)?.exp()?;
    let sum = e.sum_keepdim(D::Minus1)?;
    let sum = replace(&sum.eq(0.)?, &sum, 1.)?;
    let p = e.broadcast_div(&sum)?;
    // A key of probability 0 passes nothing on, by selection: its gradient may be infinite.
    replace(&p.eq(0.)?, &p, 0.)
}
