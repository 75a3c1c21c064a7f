//! The naive formula of `activation_dropout`.

use candle_core::{D, Result, Tensor};
use candle_dropout::Activation;

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
    let halves = || u.chunk(2, D::Minus1);
    let a = match activation {
        Activation::GeluTanh => gelu(&u)?,
        Activation::GeluErf => {
            (&u * ((&u * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.)?)?.affine(0.5, 0.)?
        }
        Activation::Silu => u.silu()?,
        // Candle's own has the slope 1 at 0.
        Activation::Relu => (&u * u.gt(0.)?.to_dtype(u.dtype())?)?,
        Activation::SwiGlu => (halves()?[0].silu()? * &halves()?[1])?,
        Activation::GeGlu => (gelu(&halves()?[0])? * &halves()?[1])?,
    };
    dropout::formula(&a, keep, drop_scale)
}

/// The tanh form; the gradient of candle's own is that of constants rounded to six digits.
fn gelu(u: &Tensor) -> Result<Tensor> {
    let w = (u * u.sqr()?.affine(0.044715, 1.)?)?.affine(std::f64::consts::FRAC_2_PI.sqrt(), 0.)?;
    (u * (w.tanh()? + 1.)?)?.affine(0.5, 0.)
}
