use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};
use rayon::prelude::*;

use super::NAME;
use crate::check::rows_cols;
use crate::cpu::{Element, Real, filled, for_float_dtype, optional_slice, storage, vectorized};
use crate::input::Input;
use crate::mask::MaskArgs;

pub(super) fn fwd(
    mask: &MaskArgs,
    x: &Tensor,
    residual: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Storage> {
    let (_, cols) = rows_cols(x.dims());
    let (x, residual) = (Input::new(NAME, x), Input::new(NAME, residual));
    let bias = Input::optional(NAME, bias);
    for_float_dtype!(x, |E| {
        let (x, residual) = (x.slice::<E>()?, residual.slice::<E>()?);
        let bias = optional_slice::<E>(&bias)?;
        let part = |start: usize, y: &mut [_]| {
            let (x, residual) = (&x[start..][..y.len()], &residual[start..][..y.len()]);
            add_selected(mask, start, cols, x, residual, bias, y)
        };
        // SAFETY: `add_selected` writes all of `y`.
        let y = unsafe { filled::<E>(x.len(), 8, part) };
        Ok(storage(y))
    })
}

vectorized! {
    /// The elements from `start` on of a tensor with `cols` columns.
    fn add_selected<E: Element>(
        mask: &MaskArgs,
        start: usize,
        cols: usize,
        x: &[E],
        residual: &[E],
        bias: Option<&[E]>,
        y: &mut [MaybeUninit<E>],
    ) {
        let scale = E::Real::from_f32(mask.scale());
        let mut runs = mask.runs(start, x.len(), cols);
        while let Some((at, col, draws)) = runs.next() {
            let n = draws.len();
            let (x, residual, y) = (&x[at..][..n], &residual[at..][..n], &mut y[at..][..n]);
            // Two loops, since a branch on the bias inside one would keep it from vectorising.
            if let Some(bias) = bias {
                let bias = &bias[col..][..n];
                for i in 0..n {
                    let kept = residual[i].load() + (x[i].load() + bias[i].load()) * scale;
                    y[i].write(if mask.keeps(draws[i]) { E::store(kept) } else { residual[i] });
                }
            } else {
                for i in 0..n {
                    let kept = residual[i].load() + x[i].load() * scale;
                    y[i].write(if mask.keeps(draws[i]) { E::store(kept) } else { residual[i] });
                }
            }
        }
    }
}

/// Elements that one thread sums at least before the partial sums are added up in order.
const MIN_PARTIAL: usize = 1 << 15;

/// Partial sums at most, whatever the number of threads: they are held until all are there.
const MAX_PARTIALS: usize = 64;

/// Rows whose sum is added to that of their chunk: rounding errors grow with the length of a chain.
const BLOCK_ROWS: usize = 128;

pub(super) fn bwd_bias(mask: &MaskArgs, dy: &Tensor) -> Result<Storage> {
    let (_, cols) = rows_cols(dy.dims());
    let dy = Input::new(NAME, dy);
    for_float_dtype!(dy, |E| Ok(storage(column_sums(mask, dy.slice::<E>()?, cols))))
}

fn column_sums<E: Element>(mask: &MaskArgs, dy: &[E], cols: usize) -> Vec<E> {
    let mut sums = vec![E::Real::ZERO; cols];
    let chunk = dy.len().div_ceil(MAX_PARTIALS).max(MIN_PARTIAL).next_multiple_of(cols.max(1));
    let partials: Vec<_> = dy
        .par_chunks(chunk)
        .enumerate()
        .map(|(i, dy)| {
            let mut partial = vec![E::Real::ZERO; cols];
            let mut block_sums = partial.clone();
            let block = BLOCK_ROWS * cols;
            for (j, dy) in dy.chunks(block.max(1)).enumerate() {
                block_sums.fill(E::Real::ZERO);
                add_to_columns(mask, i * chunk + j * block, cols, dy, &mut block_sums);
                partial.iter_mut().zip(&block_sums).for_each(|(sum, block)| *sum += *block);
            }
            partial
        })
        .collect();
    for partial in partials {
        for (sum, partial) in sums.iter_mut().zip(partial) {
            *sum += partial;
        }
    }
    sums.into_iter().map(E::store).collect()
}

vectorized! {
    /// Adds the rows from element `start` on to the sum of each column.
    fn add_to_columns<E: Element>(
        mask: &MaskArgs,
        start: usize,
        cols: usize,
        dy: &[E],
        sums: &mut [E::Real],
    ) {
        let scale = E::Real::from_f32(mask.scale());
        let mut runs = mask.runs(start, dy.len(), cols);
        while let Some((at, col, draws)) = runs.next() {
            for ((dy, draw), sum) in dy[at..].iter().zip(draws).zip(&mut sums[col..]) {
                let dx = dy.load() * scale;
                *sum += if mask.keeps(*draw) { dx } else { E::Real::ZERO };
            }
        }
    }
}
