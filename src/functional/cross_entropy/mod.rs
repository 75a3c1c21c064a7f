//! `loss = mean or sum over rows of -Σ q log softmax(logits)`.

mod args;
mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{DType, Result, Storage, Tensor, bail};

pub use args::{CrossEntropyArgs, CrossEntropyConfig, Reduction};

use crate::check::{check_device, check_dtype};
use crate::composed::composes;
use crate::graph::{detached, node, run_pass};

const NAME: &str = "cross_entropy";

/// Cross entropy of logits and target classes, with label smoothing and z-loss: one pass over the logits
/// forward, one backward, and no softmax in memory.
///
/// ```text
/// lse  = log Σ_j exp(logits_j)                 q_j = (1 - eps) * [j == target] + eps / V
/// loss = mean or sum of (lse - Σ_j q_j logits_j + z * lse²)      over the rows that are not ignored
/// dlogits_j = ((1 + 2 z lse) * exp(logits_j - lse) - q_j) * dloss * w
/// ```
///
/// where `w` is 1 over the number of those rows for the mean, and 1 for the sum; see [`CrossEntropyConfig`].
/// Of `lse` maximum and sum are kept apart, since logits far from 0 would leave its logarithm no digits: what
/// logits have in common changes no loss but that of z, and no gradient.
///
/// # Shapes
/// `logits` `[.., V]`, strided or not, and `targets` `[..]`, one class below `V` for each row; the
/// loss is a scalar. What is kept for backward is two numbers a row.
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
/// `logits` is no float tensor, or f64 off the CPU, or a scalar, or has no classes; `targets` has
/// another shape, dtype or device than said above; `label_smoothing` is no number from 0 to 1, or `z_loss`
/// none from 0 on. On the CPU also: a target that is neither a class nor ignored. On other devices nobody waits to
/// find that out: the loss and the gradient of such a row are NaN.
///
/// Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception architecture for computer
/// vision", 2016, arXiv 1512.00567 (section 7, label smoothing); Chowdhery et al., "PaLM", 2022, arXiv
/// 2204.02311 (section 5, z-loss).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::functional::{CrossEntropyConfig, cross_entropy};
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
    check_targets(targets)?;
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
    // In f32, as CUDA takes it.
    if !((config.z_loss as f32).is_finite() && config.z_loss >= 0.) {
        bail!(
            "{NAME}: z_loss: expected a finite number of at least 0, got {}; the usual one is 1e-4",
            config.z_loss
        )
    }
    let args = CrossEntropyArgs::new(targets.elem_count(), classes, config);
    let targets = targets.to_dtype(DType::I64)?.contiguous()?.detach();
    if composes(logits.device()) {
        return composed::cross_entropy(&args, logits, &targets);
    }
    let logits = logits.contiguous()?;
    let Forward { loss, statistics, row_weight } =
        run_pass!(NAME, logits, fwd(&args, &logits, &targets))?;
    let kept = Kept {
        statistics: detached(statistics, (targets.elem_count(), 2)),
        row_weight: detached(row_weight, ()),
    };
    let logits_again = logits.detach();
    node(NAME, [Some(&logits)], (loss, ()), move |back| {
        let (logits, dloss) = (&logits_again, back.dy.contiguous()?);
        let dlogits = run_pass!(NAME, logits, bwd(&args, logits, &targets, &kept, &dloss))?;
        Ok([Some(detached(dlogits, logits.shape()))])
    })
}

/// How many `targets` count in [`cross_entropy`]: those that are not ignored.
///
/// What sums over micro-batches are divided by, so that every token weighs alike. On CUDA the host waits for it:
/// count where the targets are made, before they are moved.
///
/// # Errors
/// `targets` is not u32 or i64.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_dropout::functional::{CrossEntropyConfig, Reduction, counted_targets, cross_entropy};
///
/// # fn main() -> candle_core::Result<()> {
/// let config = CrossEntropyConfig { reduction: Reduction::Sum, ..Default::default() };
/// let targets = Tensor::new(&[[0i64, 1, 1], [1, -100, -100]], &Device::Cpu)?; // two micro-batches
/// let logits = Var::zeros((2, 3, 2), candle_core::DType::F32, &Device::Cpu)?;
/// let count = counted_targets(&targets, &config)?;
/// let mut loss = 0.;
/// for i in 0..2 {
///     let sum = cross_entropy(&logits.get(i)?, &targets.get(i)?, &config)?;
///     let part = (sum / count.max(1) as f64)?; // and its gradients, added to those before
///     loss += part.to_scalar::<f32>()?;
/// }
/// assert_eq!((count, loss), (4, std::f32::consts::LN_2));
/// # Ok(())
/// # }
/// ```
pub fn counted_targets(targets: &Tensor, config: &CrossEntropyConfig) -> Result<usize> {
    check_targets(targets)?;
    let Some(ignored) = config.ignore_index else { return Ok(targets.elem_count()) };
    let counts = targets.to_dtype(DType::I64)?.ne(ignored)?.to_dtype(DType::U32)?;
    Ok(counts.sum_all()?.to_scalar::<u32>()? as usize)
}

fn check_targets(targets: &Tensor) -> Result<()> {
    if matches!(targets.dtype(), DType::U32 | DType::I64) {
        return Ok(());
    }
    bail!(
        "{NAME}: targets: expected dtype u32 or i64, got {:?}; convert it with to_dtype",
        targets.dtype()
    )
}

/// What forward leaves for backward, in the type that is computed in.
struct Kept {
    /// Of each row the maximum, and the sum of the exponentials of what logits are below it.
    statistics: Tensor,
    /// A scalar: what the loss of a row counts.
    row_weight: Tensor,
}

/// What a forward pass computes.
struct Forward {
    loss: Storage,
    statistics: Storage,
    row_weight: Storage,
}
