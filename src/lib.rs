//! Fused dropout for [candle](https://github.com/huggingface/candle): CUDA kernels, a CPU path that draws
//! the very same masks, gradients that arrive, and no stored masks.
//!
//! | where | what there is |
//! |---|---|
//! | [`functional`] | the ops; those that drop take a [`DropMask`], which says what is dropped |
//! | [`nn`] | all of `candle_nn`, with what loses gradients or time there replaced: one changed `use` line mends a model |
//! | [`training`] | `AdamW`, clipping, max-norm, schedules, accumulation, checks of gradients, and a state that is saved whole |
//! | layers, here | the family of dropout, from [`Dropout`] to [`McDropout`], and [`MultiHeadAttention`] draw masks from a [`MaskGenerator`], one key a call and site, and only in training; `docs/layers.md` in the repository has them all; [`LayerNorm`], [`RmsNorm`] and [`Rope`] draw none |
//! | rates, here | [`RateSchedule`] by a [`RateClock`], which layers follow |
//! | a switch, here | [`TrainMode`], for models whose `forward` takes no `train` |
//! | [`prelude`] | what models hold, under names that clash with none of candle's |
//! | a model, here | [`Transformer`] in the style of GPT-2 or LLaMA; [`pretrained_var_builder`] loads published weights, [`seeded_var_builder`] makes repeatable ones |
//!
//! `docs/getting-started.md` in the repository leads from an empty folder to a model that trains.
//!
//! # Features
//! | feature | what it changes |
//! |---|---|
//! | `avx512`, by default | AVX-512 in matrix products on the CPU, candle's and those of `linear`, where the CPU has it; for all of the program that takes this crate, since all of it multiplies through one `gemm`. `default-features = false` leaves that to others; what else this crate computes uses AVX-512 either way |
//! | `cuda` | adds the kernels: the same functions then take tensors on CUDA, too, in f32, f16 and bf16. No item is added. It needs nvcc (CUDA 12 or later), but no GPU, to build, and NVIDIA's driver to run; it turns on the `cuda` of candle-core and candle-nn |
//!
//! Without `cuda` everything runs on the CPU, and a tensor on CUDA is an error that says so; these pages are the
//! same. On Metal, for which there are no kernels, every op is composed of candle's differentiable ops, with the same
//! masks: tested on the CPU alone.
//!
//! # Threads
//! No result depends on the number of threads. On CUDA, candle's `Device::new_cuda` computes on a stream of
//! the calling host thread, and nothing orders the streams of two: keep what belongs to one model on one
//! thread, or have the thread that computed a tensor call `device.synchronize()` before it hands it over.
//! `docs/training.md` in the repository has the whole story.
//!
//! # The mask law
//! One pure function of a key and a coordinate decides what is dropped: the last dimension of a tensor
//! is its column, the others flattened are its row, and a 16-bit draw of Philox4x32-7 at that coordinate
//! is compared with a threshold. So a mask is the same on CPU and CUDA, forward and backward, in a fused
//! op and in its unfused form, in a whole tensor and in its shards ([`DropMask::window`]); nobody stores
//! one, and the sixteen bytes of a [`MaskState`] resume or replay a run. `docs/mask-law.md` in the
//! repository is the whole contract.
//!
//! # Example
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_dropout::{DropMask, MaskGenerator};
//! use candle_dropout::functional::dropout_add;
//!
//! # fn main() -> candle_core::Result<()> {
//! let generator = MaskGenerator::new(42);
//! let stream = Tensor::randn(0f32, 1., (4, 16), &Device::Cpu)?;
//! let drop = DropMask::new(0.1, generator.next_key())?; // one key for each site and step
//! let stream = dropout_add(&stream.gelu()?, &stream, None, &drop)?; // stream + dropout(branch)
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

mod check;
mod composed;
mod cpu;
mod cuda;
pub mod functional;
mod graph;
mod input;
mod layers;
mod mask;
pub mod nn;
pub mod prelude;
pub mod training;
mod transformer;
mod vars;

#[doc(hidden)]
pub use composed::{Composing, compose};
#[doc(hidden)]
pub use cuda::sizes;
#[doc(inline)]
pub use layers::{
    AlphaDropout, BroadcastDropout, ClassicDropout, ConcreteDropout, ConcreteDropoutConfig, Cutout,
    DropBlock2d, DropConnectConv2d, DropConnectLinear, DropHead, DropPath, Dropout, Dropout1d,
    Dropout2d, Dropout3d, EmbeddingDropout, EvalGuard, FeatureAlphaDropout, GaussianDropout,
    GaussianNoise, Gru, LayerDrop, LayerNorm, LockedDropout, LoraConfig, LoraLinear, Lstm, MaskPer,
    McDropout, McPrediction, MultiHeadAttention, MultiHeadAttentionConfig, MultiSampleDropout,
    RateClock, RateSchedule, RecurrentDropout, RecurrentMasks, RmsNorm, Rope, RopeConfig,
    RopeScaling, ScheduledRate, Switched, TokenDropout, TrainMode, VariationalConv2d,
    VariationalLinear, Zoneout, kl_weight, set_seed,
};
#[doc(hidden)]
pub use mask::MaskArgs;
#[doc(inline)]
pub use mask::{DropMask, MaskGenerator, MaskKey, MaskState, NoiseKey, Rate};
#[doc(inline)]
pub use transformer::{
    Architecture, GenerationConfig, Transformer, TransformerConfig, TransformerRates,
};
#[doc(inline)]
pub use vars::{check_pretrained_vars, pretrained_var_builder, seeded_var_builder};

/// The examples of the README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Those of the first steps.
#[cfg(doctest)]
#[doc = include_str!("../docs/getting-started.md")]
struct GettingStarted;

/// Those of the page on models.
#[cfg(doctest)]
#[doc = include_str!("../docs/models.md")]
struct Models;

/// Those of the page on training.
#[cfg(doctest)]
#[doc = include_str!("../docs/training.md")]
struct Training;
