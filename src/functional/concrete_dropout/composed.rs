use candle_core::{DType, Result, Tensor};
use candle_nn::ops::sigmoid;

use super::MAX_LOGIT;
use crate::composed::{unmoved_by, wide};
use crate::mask::MaskArgs;

/// `logit_p` is a scalar in the dtype that is computed in.
pub(super) fn concrete_dropout(
    mask: &MaskArgs,
    inverse_temperature: f64,
    x: &Tensor,
    logit_p: &Tensor,
) -> Result<Tensor> {
    if x.elem_count() == 0 {
        return unmoved_by([Some(x), Some(logit_p)], &x.zeros_like()?);
    }
    let logit_u = |word: u32| ((f64::from(word) + 0.5) / (f64::from(!word) + 0.5)).ln();
    // In f32, for Metal knows no f64.
    let words = mask.wide_words(x.dims()).into_iter();
    let logit_u = match logit_p.dtype() {
        DType::F64 => Tensor::from_iter(words.map(logit_u), x.device())?,
        _ => Tensor::from_iter(words.map(|word| logit_u(word) as f32), x.device())?,
    };
    let logit_p = bounded(logit_p)?;
    let logit_z = (logit_u.reshape(x.dims())?.broadcast_add(&logit_p)? * inverse_temperature)?;
    let keep = sigmoid(&logit_z.neg()?)?;
    let y = (wide(x)? * keep)?.broadcast_mul(&(logit_p.exp()? + 1.)?)?;
    y.to_dtype(x.dtype())
}

/// `logit_p`, and where it is beyond a bound that bound with the gradient there.
pub(crate) fn bounded(logit_p: &Tensor) -> Result<Tensor> {
    let constant = logit_p.detach();
    // A zero that has the gradient first: far beyond the bound a sum would lose what is added.
    (logit_p - &constant)? + constant.clamp(-MAX_LOGIT, MAX_LOGIT)?
}
