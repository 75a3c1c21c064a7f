use candle_core::{D, DType, Result, Tensor, bail};

use crate::check::{check_dtype, check_same};
use crate::composed::{log_softmax, select, wide};
use crate::functional::{CrossEntropyConfig, Reduction, cross_entropy};

const NAME: &str = "r_drop";

/// Runs a model twice on a batch, with different masks, as one forward of the batch beside itself: for
/// [`r_drop_loss`].
///
/// A mask that samples share (of weights, of a whole batch) is the same in both; all others differ.
///
/// # Errors
/// `x` is a scalar; the model fails, or does not return twice as many samples.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::Dropout;
/// use candle_dropout::training::r_drop_forward;
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = Dropout::new(0.5);
/// let x = Tensor::ones((4, 16), DType::F32, &Device::Cpu)?;
/// let [first, second] = r_drop_forward(&x, |xs| layer.forward(xs, true))?;
/// assert_ne!(first.to_vec2::<f32>()?, second.to_vec2::<f32>()?);
/// # Ok(())
/// # }
/// ```
pub fn r_drop_forward(
    x: &Tensor,
    model: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<[Tensor; 2]> {
    let Some(&samples) = x.dims().first() else {
        bail!("{NAME}: x: expected a batch [B, ..], got a scalar; unsqueeze(0) it")
    };
    let y = model(&Tensor::cat(&[x, x], 0)?)?;
    if y.dims().first() != Some(&(2 * samples)) {
        bail!(
            "{NAME}: model: expected results for twice {samples} samples in the first dimension, got {:?}; keep the \
             batch there",
            y.dims()
        )
    }
    Ok([y.narrow(0, 0, samples)?, y.narrow(0, samples, samples)?])
}

/// The loss of R-Drop: cross entropy of two passes over the same batch, and how far their distributions are from one
/// another.
///
/// ```text
/// loss = (CE(p) + CE(q)) / 2 + alpha * (KL(p || q) + KL(q || p)) / 2          p, q = softmax(logits), softmax(others)
///
/// KL(p || q) + KL(q || p) = Σ_c (p_c - q_c) (log p_c - log q_c)
/// ```
///
/// each the mean over the targets that are not ignored, or their sum, as `config` says. This is the form of the authors' code; the paper's eq. 4 has the
/// sum of both cross entropies, so its loss with `alpha` is twice this one with `alpha / 2`. From 1 to 5 are the
/// paper's values, by task.
///
/// # Shapes
/// `logits`, those of the first pass, and `others`, of the second, `[.., V]`; `targets` `[..]`, as
/// [`cross_entropy`] takes them. The loss is a scalar.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for both logits. The loss is an f32 (f64 for f64), and so is what it is
/// computed in. Logits are finite: a class that is hidden by -inf has no divergence that is a number.
///
/// # Errors
/// Those of [`cross_entropy`]; shapes, dtypes or devices of the logits differ; `alpha` is negative or no finite number.
///
/// Liang et al., "R-Drop: regularized dropout for neural networks", 2021, arXiv 2106.14448 (eq. 1-4).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::functional::{CrossEntropyConfig, cross_entropy};
/// use candle_dropout::training::r_drop_loss;
///
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[0f32, 1.], [2., 0.]], &Device::Cpu)?;
/// let targets = Tensor::new(&[1u32, 0], &Device::Cpu)?;
/// let config = CrossEntropyConfig::default();
/// let loss = r_drop_loss(&logits, &logits, &targets, 5., &config)?; // passes that agree
/// let ce = cross_entropy(&logits, &targets, &config)?;
/// assert!((loss - ce)?.to_scalar::<f32>()?.abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn r_drop_loss(
    logits: &Tensor,
    others: &Tensor,
    targets: &Tensor,
    alpha: f64,
    config: &CrossEntropyConfig,
) -> Result<Tensor> {
    check_dtype(NAME, "logits", logits)?;
    check_same(NAME, "others", others, "logits", logits)?;
    if !(alpha.is_finite() && alpha >= 0.) {
        bail!(
            "{NAME}: alpha: expected a finite number of at least 0, got {alpha}; the paper's are 1 to 5"
        )
    }
    let ce = |logits| cross_entropy(logits, targets, config);
    let ce = ((ce(logits)? + ce(others)?)? / 2.)?;
    if alpha == 0. || logits.elem_count() == 0 {
        return Ok(ce);
    }
    ce + (divergence([logits, others], targets, config)? * (alpha / 2.))?
}

/// `KL(p || q) + KL(q || p)` of the rows that count, their mean or sum.
fn divergence(
    logits: [&Tensor; 2],
    targets: &Tensor,
    config: &CrossEntropyConfig,
) -> Result<Tensor> {
    let targets = targets.to_dtype(DType::I64)?;
    let counts = match config.ignore_index {
        Some(ignored) => targets.ne(ignored)?,
        None => targets.ones_like()?.to_dtype(DType::U8)?,
    };
    // Ignored rows count nothing whatever they hold.
    let of_rows = counts.unsqueeze(D::Minus1)?;
    let log_probs = |logits: &Tensor| log_softmax(&select(&of_rows, &wide(logits)?, 0.)?);
    let [first, second] = [log_probs(logits[0])?, log_probs(logits[1])?];
    let total = ((first.exp()? - second.exp()?)? * (first - second)?)?.sum_all()?;
    match config.reduction {
        Reduction::Sum => Ok(total),
        Reduction::Mean => {
            let count = counts.to_dtype(DType::F32)?.sum_all()?.maximum(1.)?;
            &total / count.to_dtype(total.dtype())?
        }
    }
}
