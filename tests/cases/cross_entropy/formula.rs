//! The naive formula of `cross_entropy`.

use candle_core::{D, DType, Result, Tensor};
use candle_dropout::functional::{CrossEntropyConfig, Reduction};

/// Mean or sum of `-(1 - eps) log p[target] - eps / V Σ log p + z lse²` over the rows whose target is not ignored,
/// with `p = softmax(logits)`.
pub fn formula(logits: &Tensor, targets: &Tensor, config: &CrossEntropyConfig) -> Result<Tensor> {
    let (rows, classes) = (targets.elem_count(), logits.dim(D::Minus1)?);
    let (logits, targets) = (logits.reshape((rows, classes))?, targets.flatten_all()?);
    let targets = targets.to_dtype(DType::I64)?;
    let counts = match config.ignore_index {
        Some(ignored) => targets.ne(ignored)?,
        None => targets.ones_like()?.to_dtype(DType::U8)?,
    };
    let classes_only = counts.where_cond(&targets, &targets.zeros_like()?)?;
    let max = logits.max_keepdim(D::Minus1)?.detach();
    let shifted = logits.broadcast_sub(&max)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let log_p = shifted.broadcast_sub(&log_sum)?;
    let of_target = log_p.gather(&classes_only.unsqueeze(1)?, 1)?.squeeze(1)?;
    let eps = config.label_smoothing;
    let losses = ((of_target * (eps - 1.))? - (log_p.mean(D::Minus1)? * eps)?)?;
    let losses = match config.z_loss {
        0. => losses,
        z => (losses + ((max + &log_sum)?.squeeze(1)?.sqr()? * z)?)?,
    };
    let losses = counts.where_cond(&losses, &losses.zeros_like()?)?;
    let count = counts.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
    // Candle ends the graph at a multiplication by 0.
    let row_weight = match config.reduction {
        Reduction::Mean => 1. / count.max(1.),
        Reduction::Sum => 1.,
    };
    losses.sum_all()?.affine(row_weight, 0.)?.to_dtype(if logits.dtype() == DType::F64 {
        DType::F64
    } else {
        DType::F32
    })
}
