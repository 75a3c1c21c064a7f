use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::NAME;
use super::args::ScoreArgs;
use crate::check::rows_cols;
use crate::cpu::{
    Element, Real, filled, for_float_dtype, lane_max, lane_sum, optional_slice, storage, vectorized,
};
use crate::input::Input;
use crate::mask::{MaskArgs, NO_DRAWS, RUN};

pub(super) fn fwd(
    drop: &MaskArgs,
    args: &ScoreArgs,
    scores: &Tensor,
    additive: Option<&Tensor>,
) -> Result<Storage> {
    let (_, cols) = rows_cols(scores.dims());
    let (scores, additive) = (Input::new(NAME, scores), Input::optional(NAME, additive));
    for_float_dtype!(scores, |E| {
        let (scores, additive) = (scores.slice::<E>()?, optional_slice::<E>(&additive)?);
        let part = |start: usize, y: &mut [_]| {
            rows_fwd(drop, args, start, cols, &scores[start..][..y.len()], additive, y)
        };
        // SAFETY: chunks are whole rows, and `rows_fwd` writes every row of `y`.
        let y = unsafe { filled::<E>(scores.len(), cols, part) };
        Ok(storage(y))
    })
}

pub(super) fn bwd(
    drop: &MaskArgs,
    args: &ScoreArgs,
    scores: &Tensor,
    additive: Option<&Tensor>,
    dy: &Tensor,
) -> Result<Storage> {
    let (_, cols) = rows_cols(scores.dims());
    let (scores, additive) = (Input::new(NAME, scores), Input::optional(NAME, additive));
    let dy = Input::new(NAME, dy);
    for_float_dtype!(scores, |E| {
        let (scores, dy) = (scores.slice::<E>()?, dy.slice::<E>()?);
        let additive = optional_slice::<E>(&additive)?;
        let part = |start: usize, dscores: &mut [_]| {
            let (scores, dy) = (&scores[start..][..dscores.len()], &dy[start..][..dscores.len()]);
            rows_bwd(drop, args, start, cols, scores, additive, dy, dscores)
        };
        // SAFETY: chunks are whole rows, and `rows_bwd` writes every row of `dscores`.
        let dscores = unsafe { filled::<E>(scores.len(), cols, part) };
        Ok(storage(dscores))
    })
}

vectorized! {
    /// The rows from element `start` on.
    fn rows_fwd<E: Element>(
        drop: &MaskArgs,
        args: &ScoreArgs,
        start: usize,
        cols: usize,
        scores: &[E],
        additive: Option<&[E]>,
        y: &mut [MaybeUninit<E>],
    ) {
        let drop_scale = E::Real::from_f32(drop.scale());
        let mut p = vec![E::Real::ZERO; cols];
        let mut runs = drop.runs(start, scores.len(), cols);
        for (i, (scores, y)) in
            scores.chunks_exact(cols).zip(y.chunks_exact_mut(cols)).enumerate()
        {
            let row = start / cols + i;
            let normaliser = exponentials(drop, args, row, scores, additive, &mut p) * drop_scale;
            let mut done = 0;
            while done < cols && let Some((_, col, draws)) = runs.next() {
                for ((p, draw), y) in p[col..].iter().zip(draws).zip(&mut y[col..]) {
                    let kept = E::store(*p * normaliser);
                    y.write(if drop.keeps(*draw) { kept } else { E::ZERO });
                }
                done = col + draws.len();
            }
        }
    }
}

vectorized! {
    /// The rows from element `start` on.
    fn rows_bwd<E: Element>(
        drop: &MaskArgs,
        args: &ScoreArgs,
        start: usize,
        cols: usize,
        scores: &[E],
        additive: Option<&[E]>,
        dy: &[E],
        dscores: &mut [MaybeUninit<E>],
    ) {
        let drop_scale = E::Real::from_f32(drop.scale());
        let grad_scale = E::Real::from_f64(args.grad_scale());
        let (mut p, mut dp) = (vec![E::Real::ZERO; cols], vec![E::Real::ZERO; cols]);
        let mut runs = drop.runs(start, scores.len(), cols);
        let rows = scores.chunks_exact(cols).zip(dy.chunks_exact(cols));
        for (i, ((scores, dy), dscores)) in
            rows.zip(dscores.chunks_exact_mut(cols)).enumerate()
        {
            let row = start / cols + i;
            let normaliser = exponentials(drop, args, row, scores, additive, &mut p);
            // A key of probability 0 passes nothing on, by selection: its dy may be infinite.
            let mut done = 0;
            while done < cols && let Some((_, col, draws)) = runs.next() {
                let p = &p[col..];
                for (((dy, draw), dp), p) in
                    dy[col..].iter().zip(draws).zip(&mut dp[col..]).zip(p)
                {
                    let kept = dy.load() * drop_scale;
                    let passes = drop.keeps(*draw) & (*p != E::Real::ZERO);
                    *dp = if passes { kept } else { E::Real::ZERO };
                }
                done = col + draws.len();
            }
            // The mean of dP by the probabilities, and of what is left: what the first was rounded by.
            let dot = lane_sum(cols, |j| p[j] * dp[j]) * normaliser;
            dp.iter_mut().for_each(|dp| *dp = *dp - dot);
            let rest = lane_sum(cols, |j| p[j] * dp[j]) * normaliser;
            let scale = normaliser * grad_scale;
            for ((p, dp), dscores) in p.iter().zip(&dp).zip(dscores) {
                let passed = E::store(*p * (*dp - rest) * scale);
                dscores.write(if *p != E::Real::ZERO { passed } else { E::ZERO });
            }
        }
    }
}

/// Sets `e` to `exp(t - max t)` over the keys of a row and returns the reciprocal of their sum, or 0
/// if every key is masked.
#[inline(always)]
fn exponentials<E: Element>(
    drop: &MaskArgs,
    args: &ScoreArgs,
    row: usize,
    scores: &[E],
    additive: Option<&[E]>,
    e: &mut [E::Real],
) -> E::Real {
    let scale = E::Real::from_f64(args.scale());
    let (seen, masked) = e.split_at_mut(args.visible(row, scores.len()));
    masked.fill(E::Real::ZERO);
    for (e, score) in seen.iter_mut().zip(scores) {
        *e = score.load() * scale;
    }
    if let Some(additive) = additive {
        match args.additive(row) {
            (start, 0) => {
                let bias = additive[start].load();
                seen.iter_mut().for_each(|e| *e += bias);
            }
            (start, _) => {
                seen.iter_mut().zip(&additive[start..]).for_each(|(e, bias)| *e += bias.load());
            }
        }
    }
    if args.drops_keys() {
        hide_dropped(drop, row, seen);
    }
    let max = lane_max(seen);
    // With every key at -inf, 0 stands in for the maximum: the exponentials and their sum are 0 then.
    let max = if max == E::Real::NEG_INFINITY { E::Real::ZERO } else { max };
    for e in seen.iter_mut() {
        *e = (*e - max).exp_of_nonpositive();
    }
    let sum = lane_sum(seen.len(), |j| seen[j]);
    if sum == E::Real::ZERO { sum } else { sum.recip() }
}

/// Selects -inf for the softmax inputs of a row whose keys are dropped. They have a weight of 0 when the dropout of
/// weights comes to them, so that nothing else differs.
#[inline(always)]
fn hide_dropped<R: Real>(drop: &MaskArgs, row: usize, t: &mut [R]) {
    let mut buffer = NO_DRAWS;
    for (i, t) in t.chunks_mut(RUN).enumerate() {
        let draws = drop.draws(row, i * RUN, t.len(), &mut buffer);
        for (t, draw) in t.iter_mut().zip(draws) {
            *t = if drop.keeps(*draw) { *t } else { R::NEG_INFINITY };
        }
    }
}
