//! The functions that the model is made of, as a table: here this crate's fused ops, in `unfused.rs` the
//! same maths from candle's own.

use candle_core::{Module, Result, Tensor};

use crate::layers::Rope;
use crate::mask::DropMask;
use crate::ops::{
    Activation, AttentionMask, Norm, StochasticDepth, activation_dropout, drop_path_add, dropout,
    dropout_add_norm, linear, softmax_dropout,
};

/// The residual stream and its norm, `[B, T, C]` each.
pub(super) type Stream = (Tensor, Tensor);

/// What differs between a model of fused ops and one of candle's. Both draw the same masks.
#[derive(Debug)]
pub(super) struct Functions {
    /// `x W + b`, `[B, T, in] -> [B, T, out]`; `W [in, out]`.
    pub(super) linear: fn(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor>,
    /// Queries or keys `[B, H, T, D]`, turned to their positions from `start` on.
    pub(super) rotate: fn(rope: &Rope, x: &Tensor, start: usize) -> Result<Tensor>,
    /// Whether attention is one op, and not one of its weights between two products.
    pub(super) flash: bool,
    /// `dropout(softmax(scale scores + causal mask))`, `[B, H, T, S]`.
    pub(super) weights: fn(scores: &Tensor, scale: f64, drop: &DropMask) -> Result<Tensor>,
    /// `act(h + bias)`, `[B, T, I]`; `h` is `[B, T, I]`, or `[B, T, 2 I]` of gate and values.
    pub(super) activate: fn(h: &Tensor, bias: Option<&Tensor>, act: Activation) -> Result<Tensor>,
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
    flash: true,
    weights: |scores, scale, drop| softmax_dropout(scores, scale, &AttentionMask::Causal, drop),
    activate: |h, bias, act| activation_dropout(h, bias, act, &DropMask::none()),
    embed: |e, norm, drop| dropout_add_norm(e, None, None, norm, drop),
    residual,
};

/// Fused, with scores of attention that are kept in memory.
pub(super) const MATERIALISED: Functions = Functions { flash: false, ..FUSED };

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
