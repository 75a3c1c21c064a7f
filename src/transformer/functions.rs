//! The functions that the model is made of, as a table: here this crate's fused ops, in `unfused.rs` the
//! same maths from candle's own.

use candle_core::{Module, Result, Tensor};

use crate::functional::{
    Activation, AttentionMask, Norm, StochasticDepth, activation_dropout, drop_path_add, dropout,
    dropout_add_norm, glu_dropout, linear, softmax_dropout,
};
use crate::layers::Rope;
use crate::mask::DropMask;

/// The residual stream and its norm, `[B, T, C]` each.
pub(super) type Stream = (Tensor, Tensor);

/// What differs between a model of fused ops and one of candle's. Both draw the same masks.
#[derive(Debug)]
pub(super) struct Functions {
    /// `x W + b`, `[B, T, in] -> [B, T, out]`; `W [in, out]`.
    pub(super) linear: fn(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor>,
    /// Queries or keys `[B, H, T, D]`, turned to their positions from `start` on.
    pub(super) rotate: fn(rope: &Rope, x: &Tensor, start: usize) -> Result<Tensor>,
    /// The norm of what is no residual stream.
    pub(super) norm: fn(norm: &Norm, x: &Tensor) -> Result<Tensor>,
    /// Whether attention is one op, and not one of its weights between two products.
    pub(super) flash: bool,
    /// `dropout(softmax(scale scores + mask))`, `[B, H, T, S]`; the mask is causal, and hides what lies
    /// before the window.
    pub(super) weights:
        fn(scores: &Tensor, scale: f64, window: Option<usize>, drop: &DropMask) -> Result<Tensor>,
    /// `act(h + bias)`, `[B, T, I]`; `h` is `[B, T, I]`, or `[B, T, 2 I]` of gate and values.
    pub(super) activate: fn(h: &Tensor, bias: Option<&Tensor>, act: Activation) -> Result<Tensor>,
    /// The same of gate and values apart, `[B, T, I]` each.
    pub(super) gate: fn(gate: &Tensor, up: &Tensor, act: Activation) -> Result<Tensor>,
    /// `x = dropout(e)` and `norm(x)`.
    pub(super) embed: fn(e: &Tensor, norm: &Norm, drop: &DropMask) -> Result<Stream>,
    /// `z = residual + drop_path(dropout(y + bias))` and `norm(z)`.
    pub(super) residual: fn(y: &Tensor, joint: &Joint) -> Result<Stream>,
}

/// What a branch meets where it joins the residual stream.
pub(super) struct Joint<'a> {
    pub(super) bias: Option<&'a Tensor>, // [C]
    pub(super) drop: DropMask,
    pub(super) drop_path: DropMask,
    pub(super) residual: &'a Tensor, // [B, T, C]
    pub(super) norm: &'a Norm,
}

pub(super) const FUSED: Functions = Functions {
    linear,
    rotate: Rope::rotate,
    norm: Norm::forward,
    flash: true,
    weights,
    activate: |h, bias, act| activation_dropout(h, bias, act, &DropMask::none()),
    gate: |gate, up, act| glu_dropout(gate, up, act, &DropMask::none()),
    embed: |e, norm, drop| dropout_add_norm(e, None, None, norm, drop),
    residual,
};

/// Fused, with scores of attention that are kept in memory.
pub(super) const MATERIALISED: Functions = Functions { flash: false, ..FUSED };

fn weights(scores: &Tensor, scale: f64, window: Option<usize>, drop: &DropMask) -> Result<Tensor> {
    let mask = match window.filter(|window| scores.dims().last().is_some_and(|s| window < s)) {
        Some(_) => AttentionMask::Additive(hidden_keys(scores, window)?),
        None => AttentionMask::Causal,
    };
    softmax_dropout(scores, scale, &mask, drop)
}

/// `[T, S]` for scores `[B, H, T, S]`: -inf where query `i` does not see key `j`, which comes later or
/// lies before its window, else 0.
pub(super) fn hidden_keys(scores: &Tensor, window: Option<usize>) -> Result<Tensor> {
    let (_, _, t, s) = scores.dims4()?;
    let is_seen = |at: usize| {
        let (own, key) = (at / s + s - t, at % s);
        key <= own && window.is_none_or(|window| own - key < window)
    };
    let mask: Vec<f32> =
        (0..t * s).map(|at| if is_seen(at) { 0.0 } else { f32::NEG_INFINITY }).collect();
    Tensor::from_vec(mask, (t, s), scores.device())?.to_dtype(scores.dtype())
}

fn residual(y: &Tensor, joint: &Joint) -> Result<Stream> {
    let Joint { bias, drop, drop_path, residual, norm } = joint;
    if drop_path.is_none() {
        return dropout_add_norm(y, Some(residual), *bias, norm, drop);
    }
    let y = bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))?; // [B, T, C]
    let y = dropout(&y, drop)?; // [B, T, C]
    let z = drop_path_add(&y, residual, StochasticDepth::Row, drop_path)?; // [B, T, C]
    let n = norm.forward(&z)?; // [B, T, C]
    Ok((z, n))
}
