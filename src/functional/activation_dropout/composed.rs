use candle_core::{D, Result, Tensor};
use candle_nn::ops::sigmoid;

use super::Activation;
use crate::composed::{Keep, biased, replace, unmoved_by};
use crate::mask::MaskArgs;

pub(super) fn activation_dropout(
    mask: &MaskArgs,
    activation: Activation,
    x: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (u, dtype) = (biased(x, bias)?, x.dtype());
    if u.elem_count() == 0 {
        let y = Tensor::zeros(activation.shape(x.dims()), dtype, x.device())?;
        return unmoved_by([Some(x), bias], &y);
    }
    if !activation.is_gated() {
        return activated(mask, activation, &u, None)?.to_dtype(dtype);
    }
    let cols = u.dim(D::Minus1)? / 2;
    let (u, v) = (u.narrow(D::Minus1, 0, cols)?, u.narrow(D::Minus1, cols, cols)?);
    activated(mask, activation, &u, Some(&v))?.to_dtype(dtype)
}

pub(super) fn glu_dropout(
    mask: &MaskArgs,
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
) -> Result<Tensor> {
    if gate.elem_count() == 0 {
        return unmoved_by([Some(gate), Some(up)], &gate.zeros_like()?);
    }
    let (u, v) = (biased(gate, None)?, biased(up, None)?);
    activated(mask, activation, &u, Some(&v))?.to_dtype(gate.dtype())
}

/// The dropout of `act(u)`, or of `act(u) * v`, in the dtype of `u`.
fn activated(
    mask: &MaskArgs,
    activation: Activation,
    u: &Tensor,
    v: Option<&Tensor>,
) -> Result<Tensor> {
    let keep = Keep::new(mask, u.dims(), u.device())?;
    // What is dropped shall vanish from the gradient, too, whatever its slope is.
    let gate = function(activation, &keep.or_zero(u)?)?;
    match v {
        Some(v) => keep.drop(&(gate * keep.or_zero(v)?)?),
        None => keep.drop(&gate),
    }
}

/// An activation, or the gate of a gated one.
fn function(activation: Activation, u: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::GeluTanh | Activation::GeGlu => {
            let twice = 2. * std::f64::consts::FRAC_2_PI.sqrt();
            // From 30 on the sigmoid is flat, and the square may be infinite.
            let square = u.sqr()?.minimum(900.)?;
            u * sigmoid(&(u * square.affine(0.044715 * twice, twice)?)?)?
        }
        Activation::GeluErf | Activation::GeGluErf => {
            let cdf = (u * std::f64::consts::FRAC_1_SQRT_2)?.erf()?.affine(0.5, 0.5)?;
            u * cdf
        }
        Activation::Silu | Activation::SwiGlu => u * sigmoid(u)?,
        Activation::Relu | Activation::ReGlu => relu(u),
        Activation::QuickGelu | Activation::QuickGeGlu => u * sigmoid(&(u * 1.702)?)?,
        Activation::Relu2 | Activation::Relu2Glu => relu(u)?.sqr(),
        Activation::Tanh | Activation::TanhGlu => u.tanh(),
        Activation::Sigmoid | Activation::Glu => sigmoid(u),
    }
}

/// With the slope 0 at 0, where candle's own has 1; a NaN stays one.
fn relu(u: &Tensor) -> Result<Tensor> {
    replace(&u.le(0.)?, u, 0.)
}
