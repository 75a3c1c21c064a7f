//! `candle_nn::cpu_flash_attention`: refuses what tracks a gradient.

use candle_core::{Result, Tensor, WithDType};

use super::attention::{AttnMask, flash_attn};

/// [`flash_attn`] with an additive mask or none, under its old name.
///
/// # Errors
/// Those of [`flash_attn`].
#[deprecated(note = "use `attention::{flash_attn, AttnMask}`, as candle-nn does since 0.9.2")]
pub fn run_flash_attn_cpu<T: WithDType>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    softmax_scale: f32,
    max_bias: Option<f32>,
    softcap: Option<f32>,
) -> Result<Tensor> {
    let attn_mask = mask.map_or(AttnMask::None, |mask| AttnMask::Mask(mask.clone()));
    flash_attn::<T>(q, k, v, softmax_scale, attn_mask, max_bias, softcap)
}
