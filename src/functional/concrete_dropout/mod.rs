//! `y = x (1 - z) / (1 - p)`, `z = sigmoid((logit p + logit u) / temperature)`.

mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{DType, Result, Tensor, bail};

pub(crate) use composed::bounded;

use crate::check::{check_device, check_dtype};
use crate::composed::{composes, unmoved_by};
use crate::graph::{detached, node, run_pass};
use crate::mask::DropMask;

const NAME: &str = "concrete_dropout";

/// Logits of rates beyond this and its negative count as it: rates within 1e-26 of 0 and 1. So `1 / (1 - p)` is
/// finite in f32. `MAX_LOGIT` of `kernels/concrete_dropout.cu`.
const MAX_LOGIT: f64 = 60.;

/// Dropout at a rate that learns: the mask is relaxed to numbers between 0 and 1, through which the logit of the rate
/// gets a gradient.
///
/// ```text
/// p = sigmoid(logit_p)
/// z = sigmoid((logit_p + ln u - ln(1 - u)) / temperature)           u uniform on (0, 1), one for each element
/// y = x (1 - z) / (1 - p)
/// dx = dy (1 - z) / (1 - p)
/// dlogit_p = sum over all of dy y (p - z / temperature)
/// ```
///
/// `z` is the share of an element that is dropped: more than half of it with probability `p`, whatever the
/// temperature, and nearly all or nothing where that is small. The authors' code has 0.1. As in that code, the
/// expectation of `(1 - z) / (1 - p)` is 1 in the limit of temperature 0 only.
///
/// # Shapes
/// `x` of any shape, strided or not; `y` has its shape, and so have the draws. `logit_p` has one element.
///
/// # Dtypes
/// `x` in f32, f16, bf16, and f64 on the CPU; `logit_p` in any of them, whatever `x` has. Halves are computed in f32
/// and rounded once; the sum over all elements is taken in f64 over sums in f32, in an order that depends on the shape
/// (on CUDA on the number of multiprocessors, too) and not on threads. A `logit_p` beyond 60 or -60 counts as that,
/// with the gradient there.
///
/// # Randomness
/// `u` is `(w + 1/2) / 2^32` with the wide draws `w` of key and window of `drop`, whose rate is not asked; with
/// [`DropMask::none`] `y` is `x`, and a `logit_p` that tracks a gradient gets 0. Nothing is stored but `x`: backward draws again. No element vanishes by
/// selection: an infinity or NaN stays one.
///
/// # Errors
/// `x` or `logit_p` is no float tensor, or f64 off the CPU; `logit_p` has more elements or none, or lies on another
/// device; `temperature` is no positive number; the window of `drop` does not fit `x`.
///
/// Gal, Hron, Kendall, "Concrete dropout", 2017, arXiv 1705.07832 (section 3, with `1 - p` kept apart as in the
/// authors' code); Maddison, Mnih, Teh, "The concrete distribution", 2016, arXiv 1611.00712.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_dropout::{DropMask, MaskKey};
/// use candle_dropout::functional::concrete_dropout;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::ones(1000, candle_core::DType::F32, &Device::Cpu)?;
/// let logit_p = Var::new(&[0f32], &Device::Cpu)?; // p = 1/2
/// let y = concrete_dropout(&x, &logit_p, 0.1, &DropMask::new(0.5, MaskKey::new(3))?)?;
/// let dropped = y.lt(1.)?.to_dtype(candle_core::DType::F32)?.mean_all()?.to_scalar::<f32>()?;
/// assert!((dropped - 0.5).abs() < 0.07);
/// assert!(y.sum_all()?.backward()?.get(&logit_p).is_some());
/// # Ok(())
/// # }
/// ```
pub fn concrete_dropout(
    x: &Tensor,
    logit_p: &Tensor,
    temperature: f64,
    drop: &DropMask,
) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    check_dtype(NAME, "logit_p", logit_p)?;
    check_device(NAME, "logit_p", logit_p, "x", x.device())?;
    if logit_p.elem_count() != 1 {
        bail!(
            "{NAME}: logit_p: expected one element, the rate of all of x, got shape {:?}; call this for each \
             part of x that has a rate of its own",
            logit_p.dims()
        )
    }
    let inverse_temperature = inverse(NAME, temperature)?;
    if let Some(repeats) = drop.repeats(NAME, x.dims(), Some(0))? {
        return repeats
            .each(|part| concrete_dropout(&part.of("x", x)?, logit_p, temperature, &part.drop));
    }
    let mask = drop.args(NAME, x.dims())?;
    mask.check_wide(NAME, x.dims())?;
    if drop.is_none() {
        return if logit_p.track_op() { unmoved_by([Some(logit_p)], x) } else { Ok(x.clone()) };
    }
    // The type that is computed in; candle converts the gradient back.
    let real = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let logit_p = logit_p.to_dtype(real)?.reshape(())?;
    if composes(x.device()) {
        return composed::concrete_dropout(&mask, inverse_temperature, x, &logit_p);
    }
    let x = x.contiguous()?;
    let y = run_pass!(NAME, x, fwd(&mask, inverse_temperature, &x, &logit_p))?;
    let (x_again, logit_p_again) = (x.detach(), logit_p.detach());
    node(NAME, [Some(&x), Some(&logit_p)], (y, x.shape()), move |back| {
        let (x, logit_p, dy) = (&x_again, &logit_p_again, back.dy.contiguous()?);
        let (dx, dlogit_p) = run_pass!(NAME, x, bwd(&mask, inverse_temperature, x, logit_p, &dy))?;
        Ok([Some(detached(dx, x.shape())), Some(detached(dlogit_p, ()))])
    })
}

/// `1 / temperature`, or an error of `op` if it is no positive number. In f32, as CUDA takes it.
pub(crate) fn inverse(op: &str, temperature: f64) -> Result<f64> {
    let inverse = temperature.recip();
    let in_f32 = inverse as f32;
    if !(in_f32.is_normal() && in_f32 > 0.) {
        bail!(
            "{op}: temperature: expected a positive number, got {temperature}; the usual one is 0.1"
        )
    }
    Ok(inverse)
}
