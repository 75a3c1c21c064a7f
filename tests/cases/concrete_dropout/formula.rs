//! The naive formula of `concrete_dropout`.

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::DropMask;
use candle_nn::ops::sigmoid;

/// `x (1 - z) / (1 - p)` with `z = sigmoid((logit_p + logit_u) / temperature)`.
pub fn formula(x: &Tensor, logit_p: &Tensor, temperature: f64, logit_u: &Tensor) -> Result<Tensor> {
    let logit_u = logit_u.to_dtype(x.dtype())?;
    let logit_z = (logit_u.broadcast_add(logit_p)? / temperature)?;
    // A difference from 1 would leave what is nearly dropped no digits, even in f64.
    let kept = (x * sigmoid(&logit_z.neg()?)?)?;
    kept.broadcast_div(&sigmoid(&logit_p.neg()?)?)
}

/// `ln u - ln(1 - u)` of what is drawn for a tensor of this shape, in f64.
pub fn logit_u(drop: &DropMask, dims: &[usize]) -> Result<Tensor> {
    let draws = drop.wide_draws(dims, &Device::Cpu)?.to_dtype(DType::F64)?;
    let u = ((draws + 0.5)? / 2f64.powi(32))?;
    u.log()? - u.affine(-1., 1.)?.log()?
}
