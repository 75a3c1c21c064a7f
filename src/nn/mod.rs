//! All of `candle_nn`, with everything that loses gradients or time there replaced.
//!
//! Candle's norms, `softmax_last_dim`, `rope`, CPU attention and caches end the graph without a word: what stands before
//! them trains as if frozen. This module has every path of candle-nn 0.11.1, root and submodules, names, call forms,
//! weight layouts, variable names and initialisation alike, so that one changed path mends a model:
//!
//! ```
//! use candle_dropout::nn::{Activation, LayerNorm, Linear, Module, VarBuilder, layer_norm, linear, ops}; // was candle_nn
//! # use candle_core::{DType, Device, Result};
//! # fn main() -> Result<()> {
//! # let vars = candle_dropout::nn::VarMap::new();
//! # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let (norm, head): (LayerNorm, Linear) = (layer_norm(4, 1e-5, vb.pp("norm"))?, linear(4, 3, vb.pp("head"))?);
//! # let x = candle_core::Tensor::ones((2, 4), DType::F32, &Device::Cpu)?;
//! let y = ops::softmax_last_dim(&x.apply(&norm)?.apply(&head)?.apply(&Activation::Gelu)?)?;
//! # assert!(vars.all_vars().iter().all(|var| y.sqr().and_then(|y| y.backward()).is_ok_and(|g| g.get(var).is_some())));
//! # Ok(())
//! # }
//! ```
//!
//! A model that comes as a dependency, with `candle_nn` written all over it, is given another package under that name:
//! one whose whole text is `pub use candle_dropout::nn::*;`, named `candle-nn` in the manifest of the model
//! (`candle-nn = { package = "my-candle-nn", path = ".." }`).
//!
//! # What is replaced
//!
//! | path | what is better |
//! |---|---|
//! | [`LayerNorm`], [`RmsNorm`], [`layer_norm()`], [`layer_norm_no_bias`], [`rms_norm`], [`ops::layer_norm`], [`ops::rms_norm`] | have a gradient |
//! | [`ops::softmax_last_dim`], [`ops::softmax`] | have a gradient; one pass each way, over any dimension |
//! | [`rotary_emb::rope`], [`rotary_emb::rope_i`], [`rotary_emb::rope_thd`] | have a gradient, of tables, too; take strided tensors |
//! | [`Conv1d`], [`conv1d`], [`conv1d_no_bias`] | the gradient is right for more than one sequence, on the CPU |
//! | [`ConvTranspose1d`], [`conv_transpose1d`], [`conv_transpose1d_no_bias`] | have a gradient; right values without padding, on the CPU |
//! | [`kv_cache`]: all but `RawInterleavedKvCache` | what is appended keeps its gradient |
//! | [`Dropout`], [`ops::dropout`] | no stored mask; repeatable, see [`set_seed`](crate::set_seed) |
//! | [`Linear`], [`linear()`], [`linear_b`], [`linear_no_bias`] | fewer passes over memory, any rank |
//! | [`Activation`], [`ops::silu`], [`ops::sigmoid`], [`ops::swiglu`] | one pass each way, halves in f32 |
//! | [`loss::cross_entropy`] | one pass each way, halves in f32 |
//! | [`ops::mish`], [`ops::selu`], [`loss::binary_cross_entropy_with_logit`] | no NaN far from 0 |
//! | [`ops::log_softmax`] | halves in f32 |
//! | [`AdamW`] | one pass a step; moments in f32, see [`training::AdamW`](crate::training::AdamW) |
//!
//! Values are candle's up to rounding, but:
//!
//! - A row of negative infinities has a softmax of zeros instead of NaN; the gradient of ReLU at an exact 0 is 0 instead
//!   of 1; `cross_entropy` passes over targets of -100 instead of failing.
//! - `Dropout` takes a rate of 1, and refuses one that is no probability in evaluation, too. Masks are drawn from a fixed
//!   seed: without [`set_seed`](crate::set_seed) every run of a program draws the same.
//! - `Dropout::new` takes an f32, an f64 or a small integer. Where candle's f32 says which type an argument becomes, as in
//!   `Dropout::new(arg.parse()?)`, `Dropout::new(cfg.p as _)` or `Dropout::new(p.into())`, it has to be named:
//!   `arg.parse::<f32>()?`, `cfg.p as f32`, `p`.
//! - A norm takes a weight and a bias of `[C]` alone; candle's without a bias take what broadcasts.
//! - `AdamW::new` refuses a variable that is given twice, and variables on different devices.
//! - `Conv1d` and `ConvTranspose1d` refuse a stride, a dilation or groups of 0, and a kernel without length.
//!
//! Layers are made of candle's, and candle's of them, by `From`: `Linear`, `Activation`, `RmsNorm`, `Conv1d`,
//! `ConvTranspose1d`, and `LayerNorm`, which becomes candle's by `TryFrom`, since candle has no constructor for a bias
//! without a mean. Not `Dropout` and `AdamW`: candle's rate and variables are private.
//!
//! # What is refused
//!
//! Functions for inference that have no gradient, and no replacement of their form, fail if a tensor tracks one, with the
//! name of what to use instead; without a gradient they are candle's: [`ops::sdpa`], [`attention::flash_attn`] and all
//! of [`attention::cpu_flash`], [`attention::varlen`], [`cpu_flash_attention`], [`moe`], `kv_cache::ScatteredKvCache`.
//! A model that calls one and is used for inference is given weights that track nothing, as
//! `VarBuilder::from_mmaped_safetensors` reads them.
//!
//! # What is candle's
//!
//! The rest, which has gradients: embeddings, other convolutions (that of a strided `Conv2d` whose height leaves another
//! remainder than its width is an error), `BatchNorm`,
//! `GroupNorm`, recurrent layers, `PReLU`, the other losses; variables, initialisation, `SGD`. What samples or counts
//! (`gumbel_softmax`, `one_hot`) has none by nature.
//!
//! # What no module can replace
//!
//! Methods of `Tensor` are candle's wherever they are called. The gradients of these are wrong, without a word:
//!
//! | method | what is wrong | what is right |
//! |---|---|---|
//! | `conv1d`, `conv_transpose1d` | see the table above | [`Conv1d`], [`ConvTranspose1d`] |
//! | `max_pool2d` | 1 / k² of what it is, for windows of k by k | windows by `reshape`, and `max` (below) |
//! | `avg_pool2d` of a height or width that is no multiple of the window | goes to other elements | `narrow` it to whole windows first |
//! | `upsample_nearest1d`, `upsample_nearest2d` | what else `x` is used for is forgotten | of `x.copy()?`; or `reshape`, `broadcast_as`, `reshape` |
//! | `x.scatter(..)` | `x` has one where it was overwritten | `mask.where_cond(&zeros.scatter(..)?, &x)` |
//! | `scatter` to a place twice | what was overwritten has one | distinct places |
//! | `x.scatter_add(..)` | `x` has none where something was added, or an error if the source is smaller | `x + zeros.scatter_add(..)?`; `index_add` |
//!
//! ```
//! # use candle_core::{D, Device, Result, Tensor, Var};
//! /// The largest elements of windows of k by k; where two are, both have the gradient.
//! fn max_pool2d(x: &Tensor, k: usize) -> Result<Tensor> {
//!     let (n, c, h, w) = x.dims4()?;
//!     let whole = x.narrow(2, 0, h / k * k)?.narrow(3, 0, w / k * k)?;
//!     whole.reshape(&[n, c, h / k, k, w / k, k][..])?.transpose(3, 4)?.flatten_from(4)?.max(D::Minus1)
//! }
//! # fn main() -> Result<()> {
//! # let x = Var::new(&[[[[1f32, 4., 2.], [3., 2., 9.]]]], &Device::Cpu)?;
//! # let y = max_pool2d(&x, 2)?;
//! # assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [4.]);
//! # let grads = y.sum_all()?.backward()?;
//! # let grad = grads.get(&x).expect("one").flatten_all()?;
//! # assert_eq!(grad.to_vec1::<f32>()?, [0., 1., 0., 0., 0., 0.]);
//! # Ok(())
//! # }
//! ```
//!
//! These end a graph without a word: `slice_set`, `scatter_set`, `scatter_add_set` and `inplace_op1` to `inplace_op3`,
//! which write into a tensor; `detach`; `apply_op1_no_bwd` to `apply_op3_no_bwd`, and with them `quantized::QMatMul`; a
//! multiplication by the number 0; a conversion to integers and what leads there (`argmax`, `to_vec1`); `floor`, `ceil`,
//! `round`, `sign`.
//!
//! A `backward` through `conv_transpose1d`, `upsample_bilinear2d`, a pooling whose stride is not its window, or an
//! upsampling by no whole number or by another one in height than in width is an error.

pub mod activation;
pub mod attention;
pub mod conv;
pub mod cpu_flash_attention;
pub mod kv_cache;
pub mod layer_norm;
pub mod linear;
pub mod loss;
pub mod moe;
pub mod ops;
pub mod optim;
pub mod rotary_emb;

use candle_core::{Result, Tensor, bail};
pub use candle_nn::*;

/// `candle_nn::varlen_attention`, an older path of [`attention::varlen`].
pub mod varlen_attention {
    pub use super::attention::varlen::*;
}

#[doc(inline)]
pub use activation::Activation;
#[doc(inline)]
pub use conv::{
    Conv1d, ConvTranspose1d, conv_transpose1d, conv_transpose1d_no_bias, conv1d, conv1d_no_bias,
};
#[doc(inline)]
pub use layer_norm::{LayerNorm, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm};
#[doc(inline)]
pub use linear::{Linear, linear, linear_b, linear_no_bias};
#[doc(inline)]
pub use ops::Dropout;
#[doc(inline)]
pub use optim::AdamW;

/// Refuses what tracks a gradient, for a function of candle's that would end the graph there without a word.
fn refuse_tracked<const N: usize>(
    op: &str,
    args: [(&str, Option<&Tensor>); N],
    instead: &str,
) -> Result<()> {
    for (arg, tensor) in args {
        if tensor.is_some_and(Tensor::track_op) {
            bail!(
                "{op}: {arg}: expected a constant, got a tensor that tracks a gradient, which would end here; \
                 {instead}, or detach() it"
            )
        }
    }
    Ok(())
}
