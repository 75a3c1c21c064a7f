use candle_core::{Result, Storage, Tensor};
use rayon::prelude::*;

use super::NAME;
use crate::check::rows_cols;
use crate::cpu::{ColumnSums, Element, Real, for_float_dtype, storage, vectorized};
use crate::input::Input;
use crate::mask::MaskArgs;

/// Elements that one thread sums at least before the partial sums are added up in order.
const MIN_PARTIAL: usize = 1 << 15;

/// Partial sums at most, whatever the number of threads: they are held until all are there.
const MAX_PARTIALS: usize = 64;

pub(super) fn fwd(mask: &MaskArgs, x: &Tensor) -> Result<Storage> {
    let (_, cols) = rows_cols(x.dims());
    let x = Input::new(NAME, x);
    for_float_dtype!(x, |E| Ok(storage(column_sums(mask, x.slice::<E>()?, cols))))
}

fn column_sums<E: Element>(mask: &MaskArgs, x: &[E], cols: usize) -> Vec<E> {
    let chunk = x.len().div_ceil(MAX_PARTIALS).max(MIN_PARTIAL).next_multiple_of(cols.max(1));
    let partials: Vec<_> = x
        .par_chunks(chunk)
        .enumerate()
        .map(|(i, x)| {
            let mut sums = ColumnSums::new(cols);
            add_rows(mask, i * chunk, cols, x, &mut sums);
            sums
        })
        .collect();
    ColumnSums::of_parts(cols, partials)
}

vectorized! {
    /// Adds the rows from element `start` on.
    fn add_rows<E: Element>(
        mask: &MaskArgs,
        start: usize,
        cols: usize,
        x: &[E],
        sums: &mut ColumnSums<E::Real>,
    ) {
        let scale = E::Real::from_f32(mask.scale());
        let mut runs = mask.runs(start, x.len(), cols);
        while let Some((at, col, draws)) = runs.next() {
            for ((x, draw), sum) in x[at..].iter().zip(draws).zip(&mut sums.row()[col..]) {
                let kept = x.load() * scale;
                *sum += if mask.keeps(*draw) { kept } else { E::Real::ZERO };
            }
            if col + draws.len() == cols {
                sums.end_row();
            }
        }
    }
}
