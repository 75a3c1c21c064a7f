//! `y = dropout(softmax(scale * scores + mask))`, or with keys dropped before the softmax.

pub(super) mod args;
pub(super) mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor, bail};

pub use args::{AttentionMask, ScoreArgs};

use crate::check::{check_alike, check_dtype};
use crate::composed::composes;
use crate::graph::{Backward, detached, node, run_pass};
use crate::mask::{DropMask, MaskArgs};
use args::sum_to_shape;

const NAME: &str = "softmax_dropout";

/// Attention probabilities from scores: scale, mask, softmax and dropout in one pass over memory.
///
/// ```text
/// t = scale * scores + mask          P = softmax(t) over the last dimension
/// y = keep ? P * drop_scale : 0
/// dP = keep ? dy * drop_scale : 0    dt = P * (dP - Σ P dP)    dscores = scale * dt    dmask = Σ dt
/// ```
///
/// # Shapes
/// `scores` of shape `[.., Sq, Sk]`, strided or not; `y` and the drop mask have its shape. A causal
/// mask is aligned to the bottom right: query `i` sees the keys up to `i + Sk - Sq`. An additive mask
/// is broadcast over `scores`.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for scores and additive mask. The softmax is computed in
/// f32 (f64 for f64) whatever the dtype, and rounded once.
///
/// # Randomness
/// `y` is `dropout(softmax(..), drop)` with the same mask, bit for bit. Backward stores neither mask nor
/// softmax: it computes both again from the scores.
///
/// A row with every key masked gives zeros and zero gradients. A key of probability 0 passes nothing on,
/// whatever the gradient that arrives there.
///
/// # Errors
/// `scores` is no float tensor, or f64 off the CPU; it has fewer than two dimensions with a causal mask;
/// `scale` is not finite as an f32; the additive mask has another dtype or device or does not
/// broadcast; the window of `drop` does not fit `scores`.
///
/// Vaswani et al., "Attention is all you need", 2017, arXiv 1706.03762 (eq. 1, with the dropout on the
/// weights of its reference implementation).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::DropMask;
/// use candle_dropout::functional::{AttentionMask, softmax_dropout};
///
/// # fn main() -> candle_core::Result<()> {
/// let scores = Tensor::new(&[[1f32, 5.], [2., 2.]], &Device::Cpu)?;
/// let y = softmax_dropout(&scores, 1., &AttentionMask::Causal, &DropMask::none())?;
/// assert_eq!(y.to_vec2::<f32>()?, [[1., 0.], [0.5, 0.5]]);
/// # Ok(())
/// # }
/// ```
pub fn softmax_dropout(
    scores: &Tensor,
    scale: f64,
    mask: &AttentionMask,
    drop: &DropMask,
) -> Result<Tensor> {
    probabilities(scores, scale, mask, drop, false)
}

/// Attention probabilities with DropKey: keys are dropped before the softmax, not weights behind it.
///
/// ```text
/// t = keep ? scale * scores + mask : -inf          y = softmax(t) over the last dimension
/// dt = y * (dy - Σ y dy)          dscores = scale * dt          dmask = Σ dt
/// ```
///
/// What a query keeps sums to 1 as it is, so nothing is scaled by `1 / keep_p`. In evaluation, with
/// [`DropMask::none`], both ops are one. For an attention that holds no scores set
/// [`AttentionConfig::drop_key`](super::AttentionConfig::drop_key).
///
/// # Shapes
/// Those of [`softmax_dropout`]: each query of each head drops keys of its own.
///
/// # Dtypes
/// Those of [`softmax_dropout`].
///
/// # Randomness
/// The mask is that of `dropout(scores, drop)`, bit for bit, and so that of [`softmax_dropout`].
///
/// A row with every key masked or dropped gives zeros and zero gradients. What stands in a dropped score, infinite or
/// NaN, reaches nothing, and its gradient is an exact 0.
///
/// # Errors
/// Those of [`softmax_dropout`].
///
/// Li, Hu, Nie, Han, Jiang, Guo, Liu, "DropKey for Vision Transformer", CVPR 2023, arXiv 2208.02646 (algorithm 1).
///
/// # Example
/// ```
/// use candle_core::{D, DType, Device, Tensor};
/// use candle_dropout::functional::{AttentionMask, softmax_drop_key};
/// use candle_dropout::{DropMask, MaskKey};
///
/// # fn main() -> candle_core::Result<()> {
/// let scores = Tensor::zeros((3, 64), DType::F32, &Device::Cpu)?;
/// let drop = DropMask::new(0.5, MaskKey::new(42))?;
/// let y = softmax_drop_key(&scores, 1., &AttentionMask::None, &drop)?;
/// let sums = y.sum(D::Minus1)?.to_vec1::<f32>()?;
/// assert!(sums.iter().all(|sum| (sum - 1.).abs() < 1e-6));
/// # Ok(())
/// # }
/// ```
pub fn softmax_drop_key(
    scores: &Tensor,
    scale: f64,
    mask: &AttentionMask,
    drop: &DropMask,
) -> Result<Tensor> {
    probabilities(scores, scale, mask, drop, true)
}

/// Either op.
fn probabilities(
    scores: &Tensor,
    scale: f64,
    mask: &AttentionMask,
    drop: &DropMask,
    drop_key: bool,
) -> Result<Tensor> {
    let op = if drop_key { "softmax_drop_key" } else { NAME };
    check_dtype(op, "scores", scores)?;
    if !(scale as f32).is_finite() {
        bail!("{op}: scale: expected a finite f32, got {scale}; the usual one is 1/sqrt(D)")
    }
    if let Some(repeats) = drop.repeats(op, scores.dims(), Some(0))? {
        return repeats.each(|part| {
            let mask = match mask {
                AttentionMask::Additive(additive) => {
                    AttentionMask::Additive(part.of_broadcast("mask", additive, scores.rank())?)
                }
                mask => mask.clone(),
            };
            probabilities(&part.of("scores", scores)?, scale, &mask, &part.drop, drop_key)
        });
    }
    let mut drop = drop.args(op, scores.dims())?;
    let mut args = ScoreArgs::new(op, scores.dims(), scale, mask)?;
    if drop_key {
        (drop, args) = (drop.unscaled(), args.dropping_keys());
    }
    let scores = scores.contiguous()?;
    let additive = match mask {
        AttentionMask::None | AttentionMask::Causal => None,
        AttentionMask::Additive(additive) => {
            check_alike(op, "mask", additive, "scores", &scores)?;
            Some(additive.contiguous()?)
        }
    };
    if composes(scores.device()) {
        return composed::softmax_dropout(&drop, &args, &scores, mask);
    }
    let y = run_pass!(op, scores, fwd(&drop, &args, &scores, additive.as_ref()))?;
    let again = (scores.detach(), additive.as_ref().map(Tensor::detach));
    node(op, [Some(&scores), additive.as_ref()], (y, scores.shape()), move |back| {
        gradients(&drop, &args, &again.0, again.1.as_ref(), back)
    })
}

/// `dscores` and `dmask`.
fn gradients(
    drop: &MaskArgs,
    args: &ScoreArgs,
    scores: &Tensor,
    additive: Option<&Tensor>,
    back: Backward<'_, 2>,
) -> Result<[Option<Tensor>; 2]> {
    if drop.drops_all() {
        let dadditive = additive.filter(|_| back.wants(1)).map(Tensor::zeros_like).transpose()?;
        return Ok([back.of(0, || scores.zeros_like())?, dadditive]);
    }
    let dy = back.dy.contiguous()?;
    let grad = |args: &ScoreArgs| -> Result<Tensor> {
        let grad = run_pass!(NAME, dy, bwd(drop, args, scores, additive, &dy))?;
        Ok(detached(grad, scores.shape()))
    };
    let Some(additive) = additive.filter(|_| back.wants(1)) else {
        return Ok([Some(grad(args)?), None]);
    };
    // The mask is added after the scaling, so its gradient is that of unscaled scores.
    let dt = grad(&args.with_unit_gradient())?;
    let dadditive = sum_to_shape(&dt, additive.dims())?;
    Ok([back.of(0, || dt * args.scale())?, Some(dadditive)])
}
