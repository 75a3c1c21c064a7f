//! Fused dropout for [candle](https://github.com/huggingface/candle): CUDA kernels, a CPU path that draws
//! the very same masks, gradients that arrive, and no stored masks.
//!
//! - Ops: [`dropout`], [`dropout_add`], [`column_sums`], [`dropout_add_norm`], [`activation_dropout`],
//!   [`softmax_dropout`], [`attention()`], [`attention_qkv`], [`drop_path_add`], [`drop_path_kept`]. Each
//!   takes a [`DropMask`], which says what is dropped. [`linear`], [`rope()`] and [`cross_entropy()`] take
//!   none.
//! - Layers: [`Dropout`], [`DropPath`] and [`MultiHeadAttention`] draw masks from a [`MaskGenerator`], one
//!   key a call, and only in training; [`LayerNorm`], [`RmsNorm`] and [`Rope`] draw none.
//! - A model: [`Transformer`] in the style of GPT-2 or LLaMA; [`pretrained_var_builder`] loads published
//!   weights, [`seeded_var_builder`] makes repeatable ones.
//!
//! # Features
//! None by default: everything runs on the CPU. `cuda` adds the kernels: it needs nvcc, but no GPU, to build,
//! and NVIDIA's driver to run.
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
//! use candle_dropout::{DropMask, MaskGenerator, dropout_add};
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
mod cpu;
mod cuda;
mod graph;
mod input;
mod layers;
mod mask;
pub mod ops;
mod transformer;
mod vars;

pub use candle_nn::LayerNormConfig;
#[doc(hidden)]
pub use cuda::sizes;
pub use layers::{
    DropPath, Dropout, LayerNorm, MultiHeadAttention, MultiHeadAttentionConfig, RmsNorm, Rope,
    RopeConfig, RopeScaling, layer_norm, layer_norm_no_bias, rms_norm, set_seed,
};
#[doc(hidden)]
pub use mask::MaskArgs;
pub use mask::{DropMask, MaskGenerator, MaskKey, MaskState, Rate};
pub use ops::*;
pub use transformer::{Architecture, GenerationConfig, Transformer, TransformerConfig};
pub use vars::{pretrained_var_builder, seeded_var_builder};

/// The examples of the README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Those of the page on models.
#[cfg(doctest)]
#[doc = include_str!("../docs/models.md")]
struct Models;
