//! `candle_nn::moe`: its kernels have no gradient, so they refuse what tracks one.

use candle_core::quantized::QTensor;
use candle_core::{DType, Result, Tensor};
#[allow(unused_imports)] // what its feature `cutile` adds
pub use candle_nn::moe::*;

use super::refuse_tracked;

const INSTEAD: &str = "select the rows of each expert with index_select and multiply them with candle_dropout's \
                       linear layers";

/// [`candle_nn::moe::moe_gemm`] for tensors that track no gradient.
///
/// # Errors
/// A tensor tracks a gradient, which candle's would end without a word. Those of candle's, which is for CUDA alone.
pub fn moe_gemm(
    input: &Tensor,
    weights: &Tensor,
    topk_weights: &Option<Tensor>,
    sorted_token_ids: &Tensor,
    experts_ids: &Tensor,
    topk: usize,
    is_prefill: bool,
) -> Result<Tensor> {
    let args = [
        ("input", Some(input)),
        ("weights", Some(weights)),
        ("topk_weights", topk_weights.as_ref()),
    ];
    refuse_tracked("moe_gemm", args, INSTEAD)?;
    let moe_gemm = candle_nn::moe::moe_gemm;
    moe_gemm(input, weights, topk_weights, sorted_token_ids, experts_ids, topk, is_prefill)
}

/// [`candle_nn::moe::moe_gemm_gguf`] for tensors that track no gradient.
///
/// # Errors
/// A tensor tracks a gradient, which candle's would end without a word. Those of candle's, which is for CUDA alone.
#[allow(clippy::too_many_arguments)] // candle's
pub fn moe_gemm_gguf(
    input: &Tensor,
    weights: &QTensor,
    topk_weights: &Option<Tensor>,
    sorted_token_ids: &Tensor,
    experts_ids: &Tensor,
    topk: usize,
    is_prefill: bool,
    dtype: DType,
) -> Result<Tensor> {
    let args = [("input", Some(input)), ("topk_weights", topk_weights.as_ref())];
    refuse_tracked("moe_gemm_gguf", args, INSTEAD)?;
    candle_nn::moe::moe_gemm_gguf(
        input,
        weights,
        topk_weights,
        sorted_token_ids,
        experts_ids,
        topk,
        is_prefill,
        dtype,
    )
}
