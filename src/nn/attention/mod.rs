//! `candle_nn::attention`: its functions for inference, which refuse what tracks a gradient.

pub mod cpu_flash;
pub mod varlen;

use candle_core::{Result, Tensor};
pub use candle_nn::attention::*;

use super::refuse_tracked;

pub use cpu_flash::flash_attn;
pub use cpu_flash::varlen::flash_attn_varlen_cpu;
pub use varlen::flash_attn_varlen_unfused;

/// Checks queries, keys and values of one sequence a batch entry.
fn refuse_batched(
    op: &str,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
) -> Result<()> {
    let instead = "use candle_dropout::functional::attention, which takes [B, H, S, D]: transpose(1, 2) of what is \
                   given here; an additive mask is softmax_dropout's";
    refuse_tracked(op, [("q", Some(q)), ("k", Some(k)), ("v", Some(v)), ("mask", mask)], instead)
}

/// Checks queries, keys and values that are packed without padding.
fn refuse_packed(
    op: &str,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi: Option<&Tensor>,
) -> Result<()> {
    let instead = "use candle_dropout::functional::attention, which takes [B, H, S, D] with padding and the lengths \
                   as key_lengths";
    let args = [("q", Some(q)), ("k", Some(k)), ("v", Some(v)), ("alibi_slopes", alibi)];
    refuse_tracked(op, args, instead)
}
