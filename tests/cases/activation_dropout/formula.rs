//! The naive formula of `activation_dropout`.

use candle_core::{D, Result, Tensor};
use candle_dropout::functional::Activation;

use crate::dropout;

/// `keep ? act(x + bias) * drop_scale : 0`.
pub fn formula(
    x: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    keep: &Tensor,
    drop_scale: f64,
) -> Result<Tensor> {
    let u = match bias {
        Some(bias) => x.broadcast_add(bias)?.reshape(x.shape())?,
        None => x.clone(),
    };
    let a = match activation {
        Activation::GeluTanh => gelu(&u)?,
        Activation::GeluErf => gelu_erf(&u)?,
        Activation::Silu => u.silu()?,
        Activation::Relu => relu(&u)?,
        Activation::QuickGelu => quick_gelu(&u)?,
        Activation::Relu2 => relu(&u)?.sqr()?,
        Activation::Tanh => u.tanh()?,
        Activation::Sigmoid => sigmoid(&u)?,
        gated => {
            let halves = u.chunk(2, D::Minus1)?;
            let (u, v) = (&halves[0], &halves[1]);
            let gate = match gated {
                Activation::SwiGlu => u.silu()?,
                Activation::GeGlu => gelu(u)?,
                Activation::GeGluErf => gelu_erf(u)?,
                Activation::ReGlu => relu(u)?,
                Activation::QuickGeGlu => quick_gelu(u)?,
                Activation::Relu2Glu => relu(u)?.sqr()?,
                Activation::TanhGlu => u.tanh()?,
                Activation::Glu => sigmoid(u)?,
                plain => candle_core::bail!("{plain:?} has no gate"),
            };
            (gate * v)?
        }
    };
    dropout::formula(&a, keep, drop_scale)
}

/// The tanh form; the gradient of candle's own is that of constants rounded to six digits.
fn gelu(u: &Tensor) -> Result<Tensor> {
    let w = (u * u.sqr()?.affine(0.044715, 1.)?)?.affine(std::f64::consts::FRAC_2_PI.sqrt(), 0.)?;
    (u * (w.tanh()? + 1.)?)?.affine(0.5, 0.)
}

fn gelu_erf(u: &Tensor) -> Result<Tensor> {
    (u * ((u * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.)?)?.affine(0.5, 0.)
}

/// Candle's own has the slope 1 at 0.
fn relu(u: &Tensor) -> Result<Tensor> {
    u * u.gt(0.)?.to_dtype(u.dtype())?
}

fn sigmoid(u: &Tensor) -> Result<Tensor> {
    (u.neg()?.exp()? + 1.)?.recip()
}

fn quick_gelu(u: &Tensor) -> Result<Tensor> {
    u * sigmoid(&(u * 1.702)?)?
}
