//! `candle_nn::ops`, with functions that have a gradient, and a finite one.

use candle_core::shape::Dim;
use candle_core::{D, DType, Result, Tensor};
pub use candle_nn::ops::*;

use super::refuse_tracked;
use crate::check::has_passes;
use crate::composed::wide;
use crate::functional::{Activation, AttentionMask, activation_dropout, softmax_dropout};
use crate::mask::DropMask;

#[doc(inline)]
pub use crate::functional::{layer_norm, rms_norm};
#[doc(inline)]
pub use crate::layers::Dropout;

/// Drops with a key of the process-wide generator, in the place of [`candle_nn::ops::dropout`], which keeps the mask
/// for backward and cannot be seeded.
///
/// The mask follows from [`set_seed`](crate::set_seed) and the number of keys drawn before; a model that is trained
/// beside others has a generator of its own, see [`Dropout::with_generator`]. A `drop_p` of 1 drops everything.
///
/// # Errors
/// `drop_p` is no probability, or `xs` is refused by [`functional::dropout`](crate::functional::dropout()).
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::nn::ops::dropout;
///
/// # fn main() -> candle_core::Result<()> {
/// let y = dropout(&Tensor::ones(8, DType::F32, &Device::Cpu)?, 0.5)?;
/// assert!(y.to_vec1::<f32>()?.iter().all(|y| [0., 2.].contains(y)));
/// # Ok(())
/// # }
/// ```
pub fn dropout(xs: &Tensor, drop_p: f32) -> Result<Tensor> {
    Dropout::new(drop_p).forward(xs, true)
}

/// The softmax over any dimension, in the place of [`candle_nn::ops::softmax`].
///
/// ```text
/// y = exp(x - max x) / Σ exp(x - max x)          dx = y * (dy - Σ y dy)
/// ```
///
/// One pass over memory each way, and a copy each way for a dimension that is not the last; candle's takes five
/// forward and rounds after each.
///
/// # Shapes
/// Any with a dimension `dim`, strided or not; `y` has the shape of `xs` and is contiguous.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU; halves are computed in f32 and rounded once. Others are left to candle's.
///
/// A row of negative infinities gives zeros, where candle's gives NaN.
///
/// # Errors
/// `xs` has no dimension `dim`, or is no float tensor.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::nn::ops::softmax;
///
/// # fn main() -> candle_core::Result<()> {
/// let xs = Tensor::new(&[[1f32, 5.], [1., 5.]], &Device::Cpu)?;
/// assert_eq!(softmax(&xs, 0)?.to_vec2::<f32>()?, [[0.5, 0.5], [0.5, 0.5]]);
/// # Ok(())
/// # }
/// ```
pub fn softmax<D: Dim>(xs: &Tensor, dim: D) -> Result<Tensor> {
    let dim = dim.to_index(xs.shape(), "softmax")?;
    if !has_passes(xs) {
        return candle_nn::ops::softmax(xs, dim);
    }
    let last = xs.rank() - 1;
    if dim == last {
        return softmax_last_dim(xs);
    }
    softmax_last_dim(&xs.transpose(dim, last)?)?.transpose(dim, last)?.contiguous()
}

/// [`softmax`] over the last dimension, in the place of [`candle_nn::ops::softmax_last_dim`], which ends the graph
/// without a word.
///
/// # Errors
/// `xs` has no dimension, or is no float tensor.
pub fn softmax_last_dim(xs: &Tensor) -> Result<Tensor> {
    if !has_passes(xs) {
        return candle_nn::ops::softmax(xs, D::Minus1);
    }
    D::Minus1.to_index(xs.shape(), "softmax_last_dim")?;
    softmax_dropout(xs, 1., &AttentionMask::None, &DropMask::none())
}

/// The logarithm of [`softmax`], in the place of [`candle_nn::ops::log_softmax`], whose sum of exponentials overflows
/// in f16 above 65,504 equal classes, and loses its digits long before.
///
/// # Dtypes
/// Any float dtype; halves are computed in f32 and rounded once.
///
/// # Errors
/// `xs` has no dimension `d`, or is no float tensor.
pub fn log_softmax<D: Dim>(xs: &Tensor, d: D) -> Result<Tensor> {
    candle_nn::ops::log_softmax(&wide(xs)?, d)?.to_dtype(xs.dtype())
}

/// `x sigmoid(x)`, in one pass each way: see [`Activation::Silu`].
///
/// # Errors
/// `xs` is no float tensor.
pub fn silu(xs: &Tensor) -> Result<Tensor> {
    activation(xs, Activation::Silu, candle_nn::ops::silu)
}

/// `silu(u) v` of the halves `u` and `v` of the last dimension, in one pass each way: see [`Activation::SwiGlu`].
///
/// # Errors
/// `xs` is no float tensor, or its last dimension is odd.
pub fn swiglu(xs: &Tensor) -> Result<Tensor> {
    activation(xs, Activation::SwiGlu, candle_nn::ops::swiglu)
}

/// `1 / (1 + e^-x)`, in one pass each way: see [`Activation::Sigmoid`].
///
/// # Errors
/// `xs` is no float tensor.
pub fn sigmoid(xs: &Tensor) -> Result<Tensor> {
    activation(xs, Activation::Sigmoid, candle_nn::ops::sigmoid)
}

/// An activation of this crate, or candle's where there are no passes.
pub(super) fn activation(
    xs: &Tensor,
    activation: Activation,
    otherwise: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    if !has_passes(xs) {
        return otherwise(xs);
    }
    activation_dropout(xs, None, activation, &DropMask::none())
}

/// `x tanh(log(1 + e^x))`, in the place of [`candle_nn::ops::mish`], whose gradient is NaN where `e^x` is infinite:
/// above 88 in f32, above 11 in f16.
///
/// # Dtypes
/// Any float dtype.
///
/// # Errors
/// `xs` is no float tensor.
///
/// Misra, "Mish: a self regularized non-monotonic activation function", 2019, arXiv 1908.08681.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::nn::ops::mish;
///
/// # fn main() -> candle_core::Result<()> {
/// let y = mish(&Tensor::new(&[0f32, 1000.], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [0., 1000.]);
/// # Ok(())
/// # }
/// ```
pub fn mish(xs: &Tensor) -> Result<Tensor> {
    // 1 - tanh(log(1 + e^x)) is less than 2 e^-2x: here half a unit in the last place of 1, or less, as e^x still
    // is a number.
    let saturated = if xs.dtype() == DType::F64 { 20. } else { 11. };
    let softplus = (xs.minimum(saturated)?.exp()? + 1.)?.log()?;
    xs * softplus.tanh()?
}

/// `gamma * (x > 0 ? x : alpha * (e^x - 1))`, in the place of [`candle_nn::ops::selu`], whose gradient is NaN where
/// `e^x` is infinite, and which takes f32 alone.
///
/// # Dtypes
/// Any float dtype.
///
/// # Errors
/// `xs` is no float tensor.
///
/// Klambauer et al., "Self-normalizing neural networks", 2017, arXiv 1706.02515 (eq. 2).
pub fn selu(xs: &Tensor, alpha: f32, gamma: f32) -> Result<Tensor> {
    xs.elu(f64::from(alpha))? * f64::from(gamma)
}

/// [`candle_nn::ops::sdpa`] for tensors that track no gradient.
///
/// # Errors
/// A tensor tracks a gradient, which candle's would end without a word: see
/// [`functional::attention`](crate::functional::attention()), which takes the same layout. Those of candle's, which
/// has no CPU path.
pub fn sdpa(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    do_causal: bool,
    scale: f32,
    softcapping: f32,
) -> Result<Tensor> {
    let instead = "use candle_dropout::functional::attention, which takes the same [B, H, S, D]; an additive mask \
                   is softmax_dropout's";
    refuse_tracked(
        "sdpa",
        [("q", Some(q)), ("k", Some(k)), ("v", Some(v)), ("mask", mask)],
        instead,
    )?;
    candle_nn::ops::sdpa(q, k, v, mask, do_causal, scale, softcapping)
}
