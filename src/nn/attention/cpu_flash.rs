//! `candle_nn::attention::cpu_flash`: each function copies what it reads, so each refuses what tracks a gradient.

use candle_core::{DType, Result, Tensor, WithDType};
use half::{bf16, f16};

use super::{AttnMask, refuse_batched};
use crate::check::unsupported_dtype;

/// `$call` with `$E` the type that `$T` is: candle's functions are generic over a bound that this crate does not name.
macro_rules! for_float_type {
    ($op:expr, $T:ty, |$E:ident| $call:expr) => {
        match <$T as WithDType>::DTYPE {
            DType::F32 => {
                type $E = f32;
                $call
            }
            DType::F64 => {
                type $E = f64;
                $call
            }
            DType::F16 => {
                type $E = f16;
                $call
            }
            DType::BF16 => {
                type $E = bf16;
                $call
            }
            dtype => Err(unsupported_dtype($op, "T", dtype)),
        }
    };
}

/// [`candle_nn::attention::flash_attn`] for tensors that track no gradient: `[B, S, H, D]` to `[B, H, S, D]`.
///
/// # Errors
/// A tensor tracks a gradient, which candle's would end without a word: see
/// [`functional::attention`](crate::functional::attention()), which takes `[B, H, S, D]`. Those of candle's.
pub fn flash_attn<T: WithDType>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    attn_mask: AttnMask,
    max_bias: Option<f32>,
    softcap: Option<f32>,
) -> Result<Tensor> {
    const NAME: &str = "flash_attn";
    let mask = match &attn_mask {
        AttnMask::Mask(mask) => Some(mask),
        AttnMask::None | AttnMask::Causal { .. } => None,
    };
    refuse_batched(NAME, q, k, v, mask)?;
    for_float_type!(NAME, T, |E| {
        let flash_attn = candle_nn::attention::flash_attn::<E>;
        flash_attn(q, k, v, softmax_scale, attn_mask, max_bias, softcap)
    })
}

/// `candle_nn::attention::cpu_flash::causal`.
pub mod causal {
    use super::*;
    pub use candle_nn::attention::cpu_flash::causal::*;

    /// [`candle_nn::attention::cpu_flash::causal::run_causal_attn_cpu`] for tensors that track no gradient.
    ///
    /// # Errors
    /// Those of [`flash_attn`], and those of candle's.
    pub fn run_causal_attn_cpu<T: WithDType>(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        softmax_scale: f32,
        kv_offset: usize,
        max_bias: Option<f32>,
        softcap: Option<f32>,
    ) -> Result<Tensor> {
        const NAME: &str = "run_causal_attn_cpu";
        refuse_batched(NAME, q, k, v, None)?;
        for_float_type!(NAME, T, |E| {
            let run = candle_nn::attention::cpu_flash::causal::run_causal_attn_cpu::<E>;
            run(q, k, v, softmax_scale, kv_offset, max_bias, softcap)
        })
    }
}

/// `candle_nn::attention::cpu_flash::standard`.
pub mod standard {
    use super::*;

    /// [`candle_nn::attention::cpu_flash::standard::run_flash_attn_cpu`] for tensors that track no gradient.
    ///
    /// # Errors
    /// Those of [`flash_attn`], and those of candle's.
    pub fn run_flash_attn_cpu<T: WithDType>(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: Option<&Tensor>,
        softmax_scale: f32,
        max_bias: Option<f32>,
        softcap: Option<f32>,
    ) -> Result<Tensor> {
        refuse_batched("run_flash_attn_cpu", q, k, v, mask)?;
        let run = candle_nn::attention::cpu_flash::standard::run_flash_attn_cpu::<T>;
        run(q, k, v, mask, softmax_scale, max_bias, softcap)
    }
}

/// `candle_nn::attention::cpu_flash::varlen`.
pub mod varlen {
    use super::super::refuse_packed;
    use super::*;

    /// [`candle_nn::attention::cpu_flash::varlen::flash_attn_varlen_cpu`] for tensors that track no gradient.
    ///
    /// # Errors
    /// A tensor tracks a gradient, which candle's would end without a word: see
    /// [`functional::attention`](crate::functional::attention()). Those of candle's.
    #[allow(clippy::too_many_arguments)] // candle's
    pub fn flash_attn_varlen_cpu(
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
        window_left: Option<usize>,
        window_right: Option<usize>,
    ) -> Result<Tensor> {
        refuse_packed("flash_attn_varlen_cpu", q, k, v, alibi_slopes)?;
        candle_nn::attention::cpu_flash::varlen::flash_attn_varlen_cpu(
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
            window_left,
            window_right,
        )
    }
}
