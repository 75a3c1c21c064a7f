use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor, bail};

use super::{CrossEntropyArgs, Forward, Kept, NAME};
use crate::cpu::{
    Element, Real, filled, filled_per_row, for_float_dtype, lane_max, lane_sum, storage, vectorized,
};
use crate::input::Input;

pub(super) fn fwd(args: &CrossEntropyArgs, logits: &Tensor, targets: &Tensor) -> Result<Forward> {
    let (rows, classes) = (args.rows as usize, args.classes as usize);
    let (logits, targets) = (Input::new(NAME, logits), Input::new(NAME, targets));
    let targets = targets.slice::<i64>()?;
    let is_class = |target: i64| usize::try_from(target).is_ok_and(|target| target < classes);
    let wrong = |target: &i64| !is_class(*target) && !args.ignores(*target);
    if let Some(at) = targets.iter().position(wrong) {
        bail!(
            "{NAME}: targets: expected classes below V = {classes} or ignore_index, got {} in row {at}; \
             was the text encoded for another vocabulary?",
            targets[at]
        )
    }
    for_float_dtype!(logits, |E| {
        let logits = logits.slice::<E>()?;
        let part = |start: usize, results: &mut [_]| {
            let logits = &logits[start * classes..][..results.len() * classes];
            rows_fwd(args, logits, &targets[start..][..results.len()], results)
        };
        // SAFETY: `rows_fwd` writes the result of every row.
        let results = unsafe { filled_per_row(rows, classes, part) };
        let count = targets.iter().filter(|target| !args.ignores(**target)).count();
        Ok(mean(&results, count))
    })
}

/// From the log-sum-exp and the loss of each row.
fn mean<R: Real>(results: &[(R, R)], count: usize) -> Forward {
    // In the order of the rows, whatever threads computed them.
    let total: f64 = results.iter().fold(0., |total, (_, loss)| total + loss.to_f64());
    let inverse_count = if count == 0 { 0. } else { 1. / count as f64 };
    let scalar = |x: f64| Storage::Cpu(R::storage(vec![R::from_f64(x)]));
    Forward {
        loss: scalar(total * inverse_count),
        lse: Storage::Cpu(R::storage(results.iter().map(|(lse, _)| *lse).collect())),
        inverse_count: scalar(inverse_count),
    }
}

pub(super) fn bwd(
    args: &CrossEntropyArgs,
    logits: &Tensor,
    targets: &Tensor,
    kept: &Kept,
    dloss: &Tensor,
) -> Result<Storage> {
    let classes = args.classes as usize;
    let [logits, targets, lse, inverse_count, dloss] =
        [logits, targets, &kept.lse, &kept.inverse_count, dloss].map(|x| Input::new(NAME, x));
    let targets = targets.slice::<i64>()?;
    for_float_dtype!(logits, |E| {
        type R = <E as Element>::Real;
        let (logits, lse) = (logits.slice::<E>()?, lse.reals::<R>()?);
        let scale = dloss.reals::<R>()?[0] * inverse_count.reals::<R>()?[0];
        let part = |start: usize, dlogits: &mut [_]| {
            let (logits, row) = (&logits[start..][..dlogits.len()], start / classes);
            rows_bwd(args, scale, logits, &targets[row..], &lse[row..], dlogits)
        };
        // SAFETY: chunks are whole rows, and `rows_bwd` writes every row of `dlogits`.
        let dlogits = unsafe { filled::<E>(logits.len(), classes, part) };
        Ok(storage(dlogits))
    })
}

vectorized! {
    /// The log-sum-exp and the loss of each row.
    fn rows_fwd<E: Element>(
        args: &CrossEntropyArgs,
        logits: &[E],
        targets: &[i64],
        results: &mut [MaybeUninit<(E::Real, E::Real)>],
    ) {
        let (zero, classes) = (E::Real::ZERO, args.classes as usize);
        let rows = logits.chunks_exact(classes).zip(targets);
        for ((logits, target), result) in rows.zip(results) {
            if args.ignores(*target) {
                result.write((zero, zero));
                continue;
            }
            let of_target: E::Real = logits[*target as usize].load();
            // A target at -inf has an infinite loss as it is.
            let smooths = args.uniform != 0. && of_target != E::Real::NEG_INFINITY;
            let RowSums { max, exponentials, above_target } =
                row_sums(logits, smooths.then_some(of_target));
            let log_sum = exponentials.ln();
            // From differences of logits alone, so that what they have in common loses no digits.
            let loss = log_sum + (max - of_target);
            let smoothing = E::Real::from_f64(args.uniform) * above_target;
            result.write((max + log_sum, loss - smoothing));
        }
    }
}

vectorized! {
    /// `dlogits` of each row.
    fn rows_bwd<E: Element>(
        args: &CrossEntropyArgs,
        scale: E::Real,
        logits: &[E],
        targets: &[i64],
        lse: &[E::Real],
        dlogits: &mut [MaybeUninit<E>],
    ) {
        let classes = args.classes as usize;
        let (uniform, peak) = (E::Real::from_f64(args.uniform), E::Real::from_f64(args.peak));
        let rows = logits.chunks_exact(classes).zip(dlogits.chunks_exact_mut(classes));
        for ((logits, dlogits), (target, lse)) in rows.zip(targets.iter().zip(lse)) {
            if args.ignores(*target) {
                dlogits.fill(MaybeUninit::new(E::ZERO));
                continue;
            }
            for (logit, dlogit) in logits.iter().zip(&mut *dlogits) {
                let p = (logit.load() - *lse).exp_of_nonpositive();
                dlogit.write(E::store((p - uniform) * scale));
            }
            let target = *target as usize;
            let p = (logits[target].load() - *lse).exp_of_nonpositive();
            dlogits[target].write(E::store((p - uniform - peak) * scale));
        }
    }
}

/// What the loss of a row is made of.
struct RowSums<R> {
    max: R,
    /// Of `exp(logit - max)`.
    exponentials: R,
    /// Of `logit - target's`, if asked for.
    above_target: R,
}

/// One pass over a row: block by block, each of which stays in the first-level cache while its maximum
/// and then its exponentials are taken; a larger maximum rescales what came before.
#[inline(always)]
fn row_sums<E: Element>(row: &[E], of_target: Option<E::Real>) -> RowSums<E::Real> {
    const BLOCK: usize = 1024;
    let zero = E::Real::ZERO;
    let mut sums = RowSums { max: E::Real::NEG_INFINITY, exponentials: zero, above_target: zero };
    let mut block = [zero; BLOCK];
    for row in row.chunks(BLOCK) {
        let block = &mut block[..row.len()];
        for (x, logit) in block.iter_mut().zip(row) {
            *x = logit.load();
        }
        if let Some(of_target) = of_target {
            sums.above_target += lane_sum(block.len(), |j| block[j] - of_target);
        }
        let max = lane_max(block);
        if max > sums.max {
            let shrunk = (sums.max - max).exp_of_nonpositive(); // 0 before the first maximum
            sums.exponentials = sums.exponentials * shrunk;
            sums.max = max;
        }
        // With every logit at -inf so far, 0 stands in for the maximum: the exponentials are 0 then.
        let shift = if sums.max == E::Real::NEG_INFINITY { zero } else { sums.max };
        for x in block.iter_mut() {
            *x = (*x - shift).exp_of_nonpositive();
        }
        sums.exponentials += lane_sum(block.len(), |j| block[j]);
    }
    sums
}
