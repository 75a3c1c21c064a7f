//! The naive formula of `cross_entropy`.

use candle_core::{D, DType, Result, Tensor};
use candle_dropout::CrossEntropyConfig;

/// Mean of `-(1 - eps) log p[target] - eps / V Σ log p` over the rows whose target is not ignored, with
/// `p = softmax(logits)`.
pub fn formula(logits: &Tensor, targets: &Tensor, config: &CrossEntropyConfig) -> Result<Tensor> {
    let (rows, classes) = (targets.elem_count(), logits.dim(D::Minus1)?);
    let (logits, targets) = (logits.reshape((rows, classes))?, targets.flatten_all()?);
    let targets = targets.to_dtype(DType::I64)?;
    let counts = match config.ignore_index {
        Some(ignored) => targets.ne(ignored)?,
        None => targets.ones_like()?.to_dtype(DType::U8)?,
    };
    let classes_only = counts.where_cond(&targets, &targets.zeros_like()?)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let log_p = shifted.broadcast_sub(&log_sum)?;
    let of_target = log_p.gather(&classes_only.unsqueeze(1)?, 1)?.squeeze(1)?;
    let eps = config.label_smoothing;
    let losses = ((of_target * (eps - 1.))? - (log_p.mean(D::Minus1)? * eps)?)?;
    let losses = counts.where_cond(&losses, &losses.zeros_like()?)?;
    let count = counts.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
    // Candle ends the graph at a multiplication by 0.
    let mean = losses.sum_all()?.affine(1. / count.max(1.), 0.)?;
    mean.to_dtype(if logits.dtype() == DType::F64 { DType::F64 } else { DType::F32 })
}
