//! `loss = mean over rows of -Σ q log softmax(logits)`.

mod args;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{DType, Result, Storage, Tensor, bail};

pub use args::{CrossEntropyArgs, CrossEntropyConfig};

use crate::check::{check_device, check_dtype};
use crate::graph::{detached, node, run_pass};

const NAME: &str = "cross_entropy";

/// Mean cross entropy of logits and target classes, with label smoothing: one pass over the logits
/// forward, one backward, and no softmax in memory.
///
/// ```text
/// lse  = log Σ_j exp(logits_j)                 q_j = (1 - eps) * [j == target] + eps / V
/// loss = mean of (lse - Σ_j q_j logits_j)      over the rows that are not ignored
/// dlogits_j = (exp(logits_j - lse) - q_j) * dloss / count
/// ```
///
/// # Shapes
/// `logits` `[.., V]`, strided or not, and `targets` `[..]`, one class below `V` for each row; the
/// loss is a scalar. What is kept for backward is one number a row.
///
/// # Dtypes
/// `logits` in f32, f16, bf16, and f64 on the CPU; `targets` in u32 or i64. The loss is an f32
/// whatever the logits are (f64 for f64): exponentials and their sums are taken in f32 and the
/// losses of the rows are added in f64, always in the same order.
///
/// # Randomness
/// None; the same loss for any number of threads.
///
/// If every row is ignored, the loss is 0 and so is every gradient (PyTorch gives NaN there, which
/// one empty micro-batch then spreads over all weights).
///
/// # Errors
/// `logits` is no float tensor, or f64 on CUDA, or a scalar, or has no classes; `targets` has
/// another shape, dtype or device than said above; `label_smoothing` is no number from 0 to 1. On
/// the CPU also: a target that is neither a class nor ignored. On CUDA nobody waits for the device
/// to find that out: the loss and the gradient of such a row are NaN.
///
/// Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception architecture for computer
/// vision", 2016, arXiv 1512.00567 (section 7, label smoothing).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{CrossEntropyConfig, cross_entropy};
///
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[0f32, 0.], [0., 0.], [7., 5.]], &Device::Cpu)?;
/// let targets = Tensor::new(&[1i64, 0, -100], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &targets, &CrossEntropyConfig::default())?;
/// assert_eq!(loss.to_scalar::<f32>()?, std::f32::consts::LN_2);
/// # Ok(())
/// # }
/// ```
pub fn cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    config: &CrossEntropyConfig,
) -> Result<Tensor> {
    check_dtype(NAME, "logits", logits)?;
    let Some((&classes, rows)) = logits.dims().split_last() else {
        bail!("{NAME}: logits: expected [.., V], got a scalar; unsqueeze it")
    };
    if targets.dims() != rows {
        bail!(
            "{NAME}: targets: expected shape {rows:?}, one class for each row of logits {:?}, got {:?}; \
             reshape both to the same rows",
            logits.dims(),
            targets.dims()
        )
    }
    if !matches!(targets.dtype(), DType::U32 | DType::I64) {
        bail!(
            "{NAME}: targets: expected dtype u32 or i64, got {:?}; convert it with to_dtype",
            targets.dtype()
        )
    }
    check_device(NAME, "targets", targets, "logits", logits.device())?;
    if classes == 0 && targets.elem_count() > 0 {
        bail!("{NAME}: logits: expected at least one class, got {:?}", logits.dims())
    }
    if !(0. ..=1.).contains(&config.label_smoothing) {
        bail!(
            "{NAME}: label_smoothing: expected a number from 0 to 1, got {}; the usual one is 0.1",
            config.label_smoothing
        )
    }
    let args = CrossEntropyArgs::new(targets.elem_count(), classes, config);
    let targets = targets.to_dtype(DType::I64)?.contiguous()?.detach();
    let logits = logits.contiguous()?;
    let Forward { loss, lse, inverse_count } =
        run_pass!(NAME, logits, fwd(&args, &logits, &targets))?;
    let kept = Kept {
        lse: detached(lse, targets.elem_count()),
        inverse_count: detached(inverse_count, ()),
    };
    let logits_again = logits.detach();
    node(NAME, [Some(&logits)], (loss, ()), move |back| {
        let (logits, dloss) = (&logits_again, back.dy.contiguous()?);
        let dlogits = run_pass!(NAME, logits, bwd(&args, logits, &targets, &kept, &dloss))?;
        Ok([Some(detached(dlogits, logits.shape()))])
    })
}

/// What forward leaves for backward.
struct Kept {
    /// Of each row, in the type that is computed in.
    lse: Tensor,
    /// A scalar: 1 over the number of rows that count, or 0.
    inverse_count: Tensor,
}

/// What a forward pass computes.
struct Forward {
    loss: Storage,
    lse: Storage,
    inverse_count: Storage,
}
