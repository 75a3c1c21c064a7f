//! What has no gradient in candle-nn, and no replacement under its name: an error where a gradient would be lost, candle's
//! result where none is.
#![allow(deprecated)] // run_flash_attn_cpu of `cpu_flash_attention`

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::nn;
use candle_dropout::nn::attention::{AttnMask, cpu_flash};
use cases::{bits, random};

use crate::fails;

/// The names of all that is tested here.
pub const TESTED: [&str; 9] = [
    "ScatteredKvCache",
    "flash_attn",
    "flash_attn_varlen_cpu",
    "flash_attn_varlen_unfused",
    "moe_gemm",
    "moe_gemm_gguf",
    "run_causal_attn_cpu",
    "run_flash_attn_cpu",
    "sdpa",
];

type Call = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

/// Attention of `[B, S, H, D]`: the name, ours, candle's.
const BATCHED: [(&str, Call, Call); 4] = [
    (
        "flash_attn",
        |q, k, v| nn::attention::flash_attn::<f32>(q, k, v, 0.5, AttnMask::causal(), None, None),
        |q, k, v| {
            candle_nn::attention::flash_attn::<f32>(q, k, v, 0.5, AttnMask::causal(), None, None)
        },
    ),
    (
        "run_causal_attn_cpu",
        |q, k, v| cpu_flash::causal::run_causal_attn_cpu::<f32>(q, k, v, 0.5, 0, None, None),
        |q, k, v| {
            let run = candle_nn::attention::cpu_flash::causal::run_causal_attn_cpu::<f32>;
            run(q, k, v, 0.5, 0, None, None)
        },
    ),
    (
        "run_flash_attn_cpu",
        |q, k, v| cpu_flash::standard::run_flash_attn_cpu::<f32>(q, k, v, None, 0.5, None, None),
        |q, k, v| {
            let run = candle_nn::attention::cpu_flash::standard::run_flash_attn_cpu::<f32>;
            run(q, k, v, None, 0.5, None, None)
        },
    ),
    (
        "flash_attn",
        |q, k, v| {
            nn::cpu_flash_attention::run_flash_attn_cpu::<f32>(q, k, v, None, 0.5, None, None)
        },
        |q, k, v| {
            candle_nn::cpu_flash_attention::run_flash_attn_cpu::<f32>(
                q, k, v, None, 0.5, None, None,
            )
        },
    ),
];

/// Two packed sequences of 2 and 3.
macro_rules! packed {
    ($path:path) => {
        |q, k, v| {
            let lengths = Tensor::new(&[2u32, 3], q.device())?;
            $path(q, k, v, None, &lengths, &lengths, 3, 3, 0.5, true, None, None)
        }
    };
}

const PACKED: [(&str, Call, Call); 4] = [
    (
        "flash_attn_varlen_cpu",
        packed!(nn::attention::flash_attn_varlen_cpu),
        packed!(candle_nn::attention::flash_attn_varlen_cpu),
    ),
    (
        "flash_attn_varlen_cpu",
        packed!(cpu_flash::varlen::flash_attn_varlen_cpu),
        packed!(candle_nn::attention::flash_attn_varlen_cpu),
    ),
    (
        "flash_attn_varlen_unfused",
        packed!(nn::attention::flash_attn_varlen_unfused),
        packed!(candle_nn::attention::flash_attn_varlen_unfused),
    ),
    (
        "flash_attn_varlen_unfused",
        packed!(nn::varlen_attention::flash_attn_varlen_unfused),
        packed!(candle_nn::attention::flash_attn_varlen_unfused),
    ),
];

#[test]
fn attention_for_inference_refuses_what_tracks_a_gradient() -> Result<()> {
    let calls = BATCHED.into_iter().map(|call| (vec![1, 5, 2, 4], "[B, H, S, D]", call));
    let packed = PACKED.into_iter().map(|call| (vec![5, 2, 4], "key_lengths", call));
    for (dims, layout, (name, ours, candles)) in calls.chain(packed) {
        let [q, k, v] = [1, 2, 3].map(|seed| random(&dims, DType::F32, seed));
        let qkv = [q?, k?, v?];
        let [q, k, v] = &qkv;
        assert_eq!(bits(&ours(q, k, v)?)?, bits(&candles(q, k, v)?)?, "{name}");
        for (at, arg) in ["q", "k", "v"].iter().enumerate() {
            let var = Var::from_tensor(&qkv[at])?;
            // What is made from a variable tracks its gradient, too.
            for tracked in [var.as_tensor().clone(), (var.as_tensor() * 2.)?] {
                let mut args = qkv.clone();
                args[at] = tracked;
                let [q, k, v] = &args;
                let expected =
                    format!("{name}: {arg}: expected a constant, got a tensor that tracks");
                let remedy = "use candle_dropout::functional::attention, which takes";
                fails(ours(q, k, v), &[&expected, remedy, layout, "detach()"]);
            }
        }
    }
    Ok(())
}

#[test]
fn flash_attn_takes_every_float_type_that_candles_takes() -> Result<()> {
    fn check<T: candle_core::WithDType + num_traits_free::Same>() -> Result<()> {
        let x = random(&[1, 3, 2, 4], T::DTYPE, 1)?;
        let ours = nn::attention::flash_attn::<T>(&x, &x, &x, 0.5, AttnMask::None, None, None)?;
        assert_eq!(bits(&ours)?, bits(&T::candles(&x)?)?);
        Ok(())
    }
    check::<f32>()?;
    check::<f64>()?;
    check::<half::f16>()?;
    check::<half::bf16>()?;
    let x = random(&[1, 3, 2, 4], DType::F32, 1)?;
    fails(
        nn::attention::flash_attn::<u32>(&x, &x, &x, 0.5, AttnMask::None, None, None),
        &["flash_attn: T: expected dtype f32, f64, f16 or bf16, got U32"],
    );
    Ok(())
}

/// Candle's call for each type, whose bound is of a crate that is none of ours.
mod num_traits_free {
    use super::*;

    pub trait Same {
        fn candles(x: &Tensor) -> Result<Tensor>;
    }

    macro_rules! same {
        ($($type:ty),*) => {$(
            impl Same for $type {
                fn candles(x: &Tensor) -> Result<Tensor> {
                    candle_nn::attention::flash_attn::<$type>(x, x, x, 0.5, AttnMask::None, None, None)
                }
            }
        )*};
    }
    same!(f32, f64, half::f16, half::bf16);
}

#[test]
fn a_mask_that_tracks_a_gradient_is_refused() -> Result<()> {
    let x = random(&[1, 5, 2, 4], DType::F32, 1)?;
    let mask = Var::zeros((5, 5), DType::F32, &Device::Cpu)?;
    let attn_mask = AttnMask::Mask(mask.as_tensor().clone());
    let y = nn::attention::flash_attn::<f32>(&x, &x, &x, 0.5, attn_mask, None, None);
    fails(y, &["flash_attn: mask: expected a constant", "softmax_dropout"]);
    let y = nn::ops::sdpa(&x, &x, &x, Some(&mask), false, 0.5, 1.);
    fails(y, &["sdpa: mask: expected a constant", "softmax_dropout"]);
    Ok(())
}

/// Candle has neither on the CPU: without a gradient its own error comes through, which for products of experts is
/// another one in a build with CUDA.
#[test]
fn sdpa_and_expert_products_refuse_what_tracks_a_gradient() -> Result<()> {
    let cpu = &Device::Cpu;
    let x = random(&[1, 2, 5, 4], DType::F32, 1)?;
    let var = Var::from_tensor(&x)?;
    let sdpa = |q: &Tensor, v: &Tensor| nn::ops::sdpa(q, &x, v, None, true, 0.5, 1.);
    fails(
        sdpa(&var, &x),
        &["sdpa: q: expected a constant", "functional::attention, which takes the same"],
    );
    fails(sdpa(&x, &var), &["sdpa: v: expected a constant"]);
    fails(sdpa(&x, &x), &["no cpu impl"]);

    let (rows, ids) = (x.reshape((10, 4))?, Tensor::zeros(10, DType::U32, cpu)?);
    let moe =
        |rows: &Tensor, top: Option<Tensor>| nn::moe::moe_gemm(rows, &x, &top, &ids, &ids, 1, true);
    let tracked = (var.reshape((10, 4))?, Some(var.flatten_all()?));
    fails(moe(&tracked.0, None), &["moe_gemm: input: expected a constant", "index_select"]);
    fails(moe(&rows, tracked.1.clone()), &["moe_gemm: topk_weights: expected a constant"]);
    let candles = candle_nn::moe::moe_gemm(&rows, &x, &None, &ids, &ids, 1, true);
    fails(moe(&rows, None), &[&first_line(candles)]);
    let weights = QTensor::quantize(&random(&[4, 32], DType::F32, 2)?, GgmlDType::Q8_0)?;
    let gguf = |rows: &Tensor| {
        nn::moe::moe_gemm_gguf(rows, &weights, &None, &ids, &ids, 1, true, DType::F32)
    };
    fails(gguf(&tracked.0), &["moe_gemm_gguf: input: expected a constant", "index_select"]);
    let candles =
        candle_nn::moe::moe_gemm_gguf(&rows, &weights, &None, &ids, &ids, 1, true, DType::F32);
    fails(gguf(&rows), &[&first_line(candles)]);
    Ok(())
}

fn first_line(candles: Result<Tensor>) -> String {
    let text = candles.expect_err("candle has none on the CPU").to_string();
    text.lines().next().unwrap_or_default().to_string()
}

#[test]
fn a_scattered_cache_refuses_what_tracks_a_gradient() -> Result<()> {
    let x = random(&[2, 3, 1, 4], DType::F32, 1)?;
    let mut ours = nn::kv_cache::ScatteredCacheBuilder::new(2, 5, DType::F32, &Device::Cpu)?;
    let mut candles =
        candle_nn::kv_cache::ScatteredCacheBuilder::new(2, 5, DType::F32, &Device::Cpu)?;
    let (mut cache, mut theirs) = (ours.make_cache(3, 4)?, candles.make_cache(3, 4)?);
    for step in 0..7 {
        let mask = [true, step % 2 == 0];
        let places = ours.indices_and_mask(1, &mask)?;
        let (k, v) = cache.append(&x, &(&x * f64::from(step))?, &places)?;
        let places = candles.indices_and_mask(1, &mask)?;
        let (their_k, their_v) = theirs.append(&x, &(&x * f64::from(step))?, &places)?;
        assert_eq!((bits(&k)?, bits(&v)?), (bits(&their_k)?, bits(&their_v)?));
        assert_eq!(ours.positions(), candles.positions());
    }
    let (places, var) = (ours.indices_and_mask(1, &[true; 2])?, Var::from_tensor(&x)?);
    let got = ["scattered_kv_cache: k: expected a constant", "RotatingKvCache"];
    fails(cache.append(&var, &x, &places).map(|(k, _)| k), &got);
    // Keys that fill the cache are what is returned, gradient and all.
    for positions in [5, 6] {
        let var = Var::from_tensor(&random(&[2, 3, positions, 4], DType::F32, 2)?)?;
        let places = ours.indices_and_mask(positions, &[true; 2])?;
        let (k, v) = cache.append(&var, &var, &places)?;
        let grads = (k + v)?.sum_all()?.backward()?;
        let twos = Tensor::full(2f32, var.dims(), &Device::Cpu)?;
        assert_eq!(bits(grads.get(&var).expect("a gradient"))?, bits(&twos)?);
    }
    Ok(())
}
