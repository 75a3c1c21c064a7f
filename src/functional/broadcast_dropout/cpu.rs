use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::args::{Groups, Values};
use crate::cpu::{Element, Real, filled, for_float_dtype, storage, vectorized};
use crate::input::Input;
use crate::mask::{MaskArgs, NO_DRAWS, RUN};

pub(super) fn fwd(
    op: &'static str,
    groups: &Groups,
    values: Values,
    x: &Tensor,
    ids: Option<&Tensor>,
) -> Result<Storage> {
    let (x, ids) = (Input::new(op, x), Input::optional(op, ids));
    for_float_dtype!(x, |E| {
        let x = x.slice::<E>()?;
        let ids = ids.as_ref().map(|ids| ids.slice::<u32>()).transpose()?;
        let part = |start: usize, y: &mut [MaybeUninit<E>]| {
            let x = &x[start..][..y.len()];
            match (groups.mask_cols, ids) {
                (None, _) => {
                    by_column(&groups.mask, start, groups.cols, groups.repeat, values, x, y)
                }
                (Some(_), Some(ids)) => {
                    by_word(&groups.mask, start, groups.cols, ids, values, x, y)
                }
                (Some(mask_cols), None) => {
                    by_row(&groups.mask, start, groups.cols, mask_cols, values, x, y)
                }
            }
        };
        // SAFETY: each of the three writes all of `y`.
        let y = unsafe { filled::<E>(x.len(), 8, part) };
        Ok(storage(y))
    })
}

vectorized! {
    /// One decision a column of `repeat` rows, drawn once for those of them that lie here.
    fn by_column<E: Element>(
        mask: &MaskArgs,
        start: usize,
        cols: usize,
        repeat: usize,
        values: Values,
        x: &[E],
        y: &mut [MaybeUninit<E>],
    ) {
        let (scale, shift) = (E::Real::from_f64(values.scale), E::Real::from_f64(values.shift));
        let fill = E::store(E::Real::from_f64(values.fill));
        let mut room = NO_DRAWS;
        let mut at = 0;
        while at < x.len() {
            let (row, first) = ((start + at) / cols, (start + at) % cols);
            let rest = x.len() - at;
            // A row that is cut stands alone.
            let rows = if first > 0 { 1 } else { (repeat - row % repeat).min(rest / cols).max(1) };
            let width = (cols - first).min(rest);
            for from in (0..width).step_by(RUN) {
                let len = RUN.min(width - from);
                let draws = mask.draws(row, first + from, len, &mut room);
                for at in (0..rows).map(|row| at + row * cols + from) {
                    for ((x, draw), y) in x[at..].iter().zip(draws).zip(&mut y[at..]) {
                        let kept = E::store(x.load() * scale + shift);
                        y.write(if mask.keeps(*draw) { kept } else { fill });
                    }
                }
            }
            at += (rows - 1) * cols + width;
        }
    }
}

vectorized! {
    /// One decision a row, of which a row of the mask has `mask_cols`; the first and the last one may be cut.
    fn by_row<E: Element>(
        mask: &MaskArgs,
        start: usize,
        cols: usize,
        mask_cols: usize,
        values: Values,
        x: &[E],
        y: &mut [MaybeUninit<E>],
    ) {
        let Some(last) = x.len().checked_sub(1) else { return };
        let first = start / cols;
        let mut runs = mask.runs(first, (start + last) / cols - first + 1, mask_cols);
        while let Some((at, _, draws)) = runs.next() {
            for (i, draw) in draws.iter().enumerate() {
                let from = ((first + at + i) * cols).max(start) - start;
                let to = ((first + at + i + 1) * cols - start).min(x.len());
                group(mask.keeps(*draw), values, &x[from..to], &mut y[from..to]);
            }
        }
    }
}

vectorized! {
    /// One decision a row, that of its word.
    fn by_word<E: Element>(
        mask: &MaskArgs,
        start: usize,
        cols: usize,
        ids: &[u32],
        values: Values,
        x: &[E],
        y: &mut [MaybeUninit<E>],
    ) {
        let mut at = 0;
        while at < x.len() {
            let row = (start + at) / cols;
            let to = ((row + 1) * cols - start).min(x.len());
            group(mask.keep_at(0, ids[row] as usize) == 1, values, &x[at..to], &mut y[at..to]);
            at = to;
        }
    }
}

/// What is dropped or kept together.
#[inline(always)]
fn group<E: Element>(keep: bool, values: Values, x: &[E], y: &mut [MaybeUninit<E>]) {
    if keep {
        let (scale, shift) = (E::Real::from_f64(values.scale), E::Real::from_f64(values.shift));
        for (x, y) in x.iter().zip(y) {
            y.write(E::store(x.load() * scale + shift));
        }
    } else {
        let fill = E::store(E::Real::from_f64(values.fill));
        for y in y {
            y.write(fill);
        }
    }
}
