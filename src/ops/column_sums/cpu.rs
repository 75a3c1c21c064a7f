use candle_core::{Result, Storage, Tensor};
use rayon::prelude::*;

use super::NAME;
use crate::check::rows_cols;
use crate::cpu::{Element, Real, for_float_dtype, storage, vectorized};
use crate::input::Input;
use crate::mask::MaskArgs;

/// Elements that one thread sums at least before the partial sums are added up in order.
const MIN_PARTIAL: usize = 1 << 15;

/// Partial sums at most, whatever the number of threads: they are held until all are there.
const MAX_PARTIALS: usize = 64;

/// Rows whose sum is added to that of their chunk: rounding errors grow with the length of a chain.
const BLOCK_ROWS: usize = 128;

pub(super) fn fwd(mask: &MaskArgs, x: &Tensor) -> Result<Storage> {
    let (_, cols) = rows_cols(x.dims());
    let x = Input::new(NAME, x);
    for_float_dtype!(x, |E| Ok(storage(column_sums(mask, x.slice::<E>()?, cols))))
}

fn column_sums<E: Element>(mask: &MaskArgs, x: &[E], cols: usize) -> Vec<E> {
    let mut sums = vec![E::Real::ZERO; cols];
    let chunk = x.len().div_ceil(MAX_PARTIALS).max(MIN_PARTIAL).next_multiple_of(cols.max(1));
    let partials: Vec<_> = x
        .par_chunks(chunk)
        .enumerate()
        .map(|(i, x)| {
            let mut partial = vec![E::Real::ZERO; cols];
            let mut block_sums = partial.clone();
            let block = BLOCK_ROWS * cols;
            for (j, x) in x.chunks(block.max(1)).enumerate() {
                block_sums.fill(E::Real::ZERO);
                add_to_columns(mask, i * chunk + j * block, cols, x, &mut block_sums);
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
        x: &[E],
        sums: &mut [E::Real],
    ) {
        let scale = E::Real::from_f32(mask.scale());
        let mut runs = mask.runs(start, x.len(), cols);
        while let Some((at, col, draws)) = runs.next() {
            for ((x, draw), sum) in x[at..].iter().zip(draws).zip(&mut sums[col..]) {
                let kept = x.load() * scale;
                *sum += if mask.keeps(*draw) { kept } else { E::Real::ZERO };
            }
        }
    }
}
