//! `candle_nn::attention::varlen`: refuses what tracks a gradient.

use candle_core::{Result, Tensor};

use super::refuse_packed;

/// [`candle_nn::attention::varlen::flash_attn_varlen_unfused`] for tensors that track no gradient.
///
/// # Errors
/// A tensor tracks a gradient, of which candle's loses the part that goes through the softmax, without a word: see
/// [`functional::attention`](crate::functional::attention()). Those of candle's.
#[allow(clippy::too_many_arguments)] // candle's
pub fn flash_attn_varlen_unfused(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    refuse_packed("flash_attn_varlen_unfused", q, k, v, alibi_slopes)?;
    candle_nn::attention::varlen::flash_attn_varlen_unfused(
        q,
        k,
        v,
        alibi_slopes,
        seqlens_q,
        seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
    )
}
