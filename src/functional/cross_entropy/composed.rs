use candle_core::{D, DType, Result, Tensor};

use super::CrossEntropyArgs;
use crate::composed::{row_max, scalar, select, unmoved_by, wide};

/// `targets` are i64. Nobody waits for the device: as on CUDA, loss and gradient of a row are NaN where its target is
/// neither a class nor ignored.
pub(super) fn cross_entropy(
    args: &CrossEntropyArgs,
    logits: &Tensor,
    targets: &Tensor,
) -> Result<Tensor> {
    let (rows, classes) = (args.rows as usize, args.classes as usize);
    let logits = wide(logits)?;
    if rows == 0 {
        return unmoved_by([Some(&logits)], &scalar(0., &logits)?);
    }
    let (logits, targets) = (logits.reshape((rows, classes))?, targets.flatten_all()?);
    let counts = match args.ignored() {
        Some(ignored) => targets.ne(ignored)?,
        None => Tensor::ones(rows, DType::U8, targets.device())?,
    };
    let is_class = (targets.ge(0i64)? * targets.lt(args.classes as i64)?)?;
    let target = is_class.where_cond(&targets, &targets.zeros_like()?)?;
    // Ignored rows count nothing whatever they hold.
    let logits = match args.ignored() {
        Some(_) => select(&counts.unsqueeze(1)?, &logits, 0.)?,
        None => logits,
    };
    // From differences of logits alone, so that what they have in common loses no digits.
    let max = row_max(&logits)?;
    let below_max = logits.broadcast_sub(&max)?;
    let log_sum = below_max.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let mut losses = log_sum.squeeze(1)?;
    if args.uniform != 0. {
        losses = (losses - (below_max.sum(D::Minus1)? * args.uniform)?)?;
    }
    // Of a target that counts nothing a difference that is infinite would count as NaN.
    if args.peak != 0. {
        let of_target = below_max.gather(&target.unsqueeze(1)?, 1)?.squeeze(1)?;
        losses = (losses - (of_target * args.peak)?)?;
    }
    if args.z_loss != 0. {
        losses = (losses + ((max + log_sum)?.squeeze(1)?.sqr()? * args.z_loss)?)?;
    }
    let one = scalar(1., &losses)?.broadcast_as(rows)?;
    let losses = (losses * select(&is_class, &one, f64::NAN)?)?;
    let total = select(&counts, &losses, 0.)?.sum_all()?;
    if !args.averages() {
        return Ok(total);
    }
    let count = counts.to_dtype(total.dtype())?.sum_all()?.maximum(1.)?;
    total / count
}
