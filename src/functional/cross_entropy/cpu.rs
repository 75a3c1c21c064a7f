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
        Ok(total(&results, args.row_weight(count)))
    })
}

/// What forward makes of a row.
struct RowResult<R> {
    statistics: [R; 2],
    loss: R,
}

fn total<R: Real>(results: &[RowResult<R>], row_weight: f64) -> Forward {
    // In the order of the rows, whatever threads computed them.
    let total: f64 = results.iter().fold(0., |total, row| total + row.loss.to_f64());
    let storage = |x: Vec<R>| Storage::Cpu(R::storage(x));
    Forward {
        loss: storage(vec![R::from_f64(total * row_weight)]),
        statistics: storage(results.iter().flat_map(|row| row.statistics).collect()),
        row_weight: storage(vec![R::from_f64(row_weight)]),
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
    let [logits, targets, statistics, row_weight, dloss] =
        [logits, targets, &kept.statistics, &kept.row_weight, dloss].map(|x| Input::new(NAME, x));
    let targets = targets.slice::<i64>()?;
    for_float_dtype!(logits, |E| {
        type R = <E as Element>::Real;
        let (logits, statistics) = (logits.slice::<E>()?, statistics.reals::<R>()?);
        let scale = dloss.reals::<R>()?[0] * row_weight.reals::<R>()?[0];
        let part = |start: usize, dlogits: &mut [_]| {
            let (logits, row) = (&logits[start..][..dlogits.len()], start / classes);
            rows_bwd(args, scale, logits, &targets[row..], &statistics[2 * row..], dlogits)
        };
        // SAFETY: chunks are whole rows, and `rows_bwd` writes every row of `dlogits`.
        let dlogits = unsafe { filled::<E>(logits.len(), classes, part) };
        Ok(storage(dlogits))
    })
}

vectorized! {
    /// The statistics and the loss of each row.
    fn rows_fwd<E: Element>(
        args: &CrossEntropyArgs,
        logits: &[E],
        targets: &[i64],
        results: &mut [MaybeUninit<RowResult<E::Real>>],
    ) {
        let (zero, one, classes) = (E::Real::ZERO, E::Real::ONE, args.classes as usize);
        let rows = logits.chunks_exact(classes).zip(targets);
        for ((logits, target), result) in rows.zip(results) {
            if args.ignores(*target) {
                result.write(RowResult { statistics: [zero, one], loss: zero });
                continue;
            }
            let RowSums { max, exponentials, below_max } = row_sums(logits, args.uniform != 0.);
            // From differences of logits alone, so that what they have in common loses no digits, and
            // from terms of one sign.
            let log_sum = exponentials.ln();
            let mut loss = log_sum + args.uniform * below_max;
            // Of a target that counts nothing a difference that is infinite would count as NaN.
            if args.peak != 0. {
                loss += args.peak * (max.to_f64() - logits[*target as usize].load().to_f64());
            }
            if args.z_loss != 0. {
                loss += args.z_loss * (max.to_f64() + log_sum).powi(2);
            }
            let statistics = [max, E::Real::from_f64(exponentials)];
            result.write(RowResult { statistics, loss: E::Real::from_f64(loss) });
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
        statistics: &[E::Real],
        dlogits: &mut [MaybeUninit<E>],
    ) {
        let classes = args.classes as usize;
        let (uniform, peak) = (E::Real::from_f64(args.uniform), E::Real::from_f64(args.peak));
        let rows = logits.chunks_exact(classes).zip(dlogits.chunks_exact_mut(classes));
        let of_rows = targets.iter().zip(statistics.chunks_exact(2));
        for ((logits, dlogits), (target, statistics)) in rows.zip(of_rows) {
            if args.ignores(*target) {
                dlogits.fill(MaybeUninit::new(E::ZERO));
                continue;
            }
            let (max, sum) = (statistics[0], statistics[1].to_f64());
            // The probabilities, and what the z-loss adds to their gradient.
            let lse = max.to_f64() + sum.ln();
            let normaliser = E::Real::from_f64((1. + 2. * args.z_loss * lse) / sum);
            for (logit, dlogit) in logits.iter().zip(&mut *dlogits) {
                let p = (logit.load() - max).exp_of_nonpositive() * normaliser;
                dlogit.write(E::store((p - uniform) * scale));
            }
            let target = *target as usize;
            let p = (logits[target].load() - max).exp_of_nonpositive() * normaliser;
            dlogits[target].write(E::store((p - uniform - peak) * scale));
        }
    }
}

/// What the loss of a row is made of; sums of blocks are added in f64.
struct RowSums<R> {
    max: R,
    /// Of `exp(logit - max)`.
    exponentials: f64,
    /// Of `max - logit`, if asked for.
    below_max: f64,
}

/// One pass over a row: block by block, each of which stays in the first-level cache while its maximum
/// and then its exponentials are taken; a larger maximum rescales what came before.
#[inline(always)]
fn row_sums<E: Element>(row: &[E], with_below_max: bool) -> RowSums<E::Real> {
    const BLOCK: usize = 1024;
    let zero = E::Real::ZERO;
    let mut sums = RowSums { max: E::Real::NEG_INFINITY, exponentials: 0., below_max: 0. };
    let mut block = [zero; BLOCK];
    for (i, row) in row.chunks(BLOCK).enumerate() {
        let block = &mut block[..row.len()];
        for (x, logit) in block.iter_mut().zip(row) {
            *x = logit.load();
        }
        let max = lane_max(block);
        if max > sums.max {
            if i > 0 {
                // In f64, since a long row may rise from block to block.
                let growth = max.to_f64() - sums.max.to_f64();
                sums.exponentials *= (-growth).exp();
                sums.below_max += (i * BLOCK) as f64 * growth;
            }
            sums.max = max;
        }
        // With every logit at -inf so far, 0 stands in for the maximum: the exponentials are 0 then.
        let shift = if sums.max == E::Real::NEG_INFINITY { zero } else { sums.max };
        for x in block.iter_mut() {
            *x = *x - shift;
        }
        if with_below_max {
            sums.below_max += lane_sum(block.len(), |j| zero - block[j]).to_f64();
        }
        for x in block.iter_mut() {
            *x = x.exp_of_nonpositive();
        }
        sums.exponentials += lane_sum(block.len(), |j| block[j]).to_f64();
    }
    sums
}
