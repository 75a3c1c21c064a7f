use candle_core::{Result, bail};

use super::philox::{COLS_PER_CALL, COLS_PER_FILL, fill_draws};
use super::rows::RowMap;
use super::{MaskKey, Rate};

/// Columns are limited to this: `col / 8` is a 32-bit counter word.
const MAX_COLS: u64 = 1 << 35;

/// Draws held at a time: 1 KiB, which stays in the first-level cache beside its elements.
pub(crate) const RUN: usize = 512;

/// Room for the draws of [`MaskArgs::draws`].
pub(crate) type Draws = [u16; RUN + COLS_PER_FILL];

/// What it holds at first.
pub(crate) const NO_DRAWS: Draws = [0; RUN + COLS_PER_FILL];

/// A [`DropMask`](super::DropMask) over a tensor of known shape: the one argument through which every
/// kernel, CPU and CUDA, sees a mask. Twin of `struct MaskArgs` in `kernels/philox.cuh`.
#[doc(hidden)]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MaskArgs {
    key: [u32; 2],
    threshold: u32,
    scale: f32,
    col_0: u64,
    rows: RowMap,
}

impl MaskArgs {
    /// The mask over the part of shape `dims` that begins at `start` of a whole of shape `full_dims`.
    /// The caller has checked that the part lies in the whole.
    pub(crate) fn new(
        op: &str,
        rate: Rate,
        key: MaskKey,
        dims: &[usize],
        full_dims: &[usize],
        start: &[usize],
    ) -> Result<Self> {
        let (cols, leading) = dims.split_last().map_or((1, dims), |(cols, rest)| (*cols, rest));
        let col_0 = start.last().copied().unwrap_or(0) as u64;
        let end = col_0.saturating_add(cols as u64);
        if end > MAX_COLS {
            bail!(
                "{op}: x: expected at most 2^35 columns (last dimension), got {end}; reshape so that \
                 part of them is a leading dimension"
            )
        }
        let rows = full_dims[..leading.len()].iter().try_fold(1u128, |rows, &dim| {
            rows.checked_mul(dim as u128).filter(|rows| *rows <= 1 << 64)
        });
        if rows.is_none() {
            bail!(
                "{op}: drop.window: expected at most 2^64 rows in the whole, got {full_dims:?}; pass \
                 the shape of the whole mask"
            )
        }
        // Behind a stride that wraps at 2^64 only dimensions of size 1 can follow.
        let (mut row_0, mut stride) = (0u64, 1u64);
        let mut strides = vec![0; leading.len()];
        for d in (0..leading.len()).rev() {
            strides[d] = stride;
            row_0 = row_0.wrapping_add(stride.wrapping_mul(start[d] as u64));
            stride = stride.wrapping_mul(full_dims[d] as u64);
        }
        let Some(rows) = RowMap::new(leading, &strides, row_0) else {
            bail!(
                "{op}: drop.window: expected a part that splits at most three leading dimensions, got \
                 {dims:?} of {full_dims:?}; split fewer dimensions"
            )
        };
        let threshold = rate.threshold();
        Ok(Self { key: key.words(), threshold, scale: rate.scale(), col_0, rows })
    }

    /// Walks the elements `start..start + len` of a `[rows, cols]` tensor in runs that lie in one row.
    #[inline(always)]
    pub(crate) fn runs(&self, start: usize, len: usize, cols: usize) -> Runs<'_> {
        // An empty tensor may have no columns to divide by.
        let (row, col) = if len == 0 { (0, 0) } else { (start / cols, start % cols) };
        Runs { mask: self, at: 0, len, row, col, cols, draws: NO_DRAWS }
    }

    /// Which of the `cols` columns of the first row are kept.
    pub(crate) fn keep_first_row(&self, cols: usize) -> Vec<bool> {
        let mut keep = vec![false; cols];
        let mut runs = self.runs(0, cols, cols);
        while let Some((at, _, draws)) = runs.next() {
            for (keep, draw) in keep[at..].iter_mut().zip(draws) {
                *keep = self.keeps(*draw);
            }
        }
        keep
    }

    /// The draws of `len <= RUN` columns from `col` on, in row `row` of the tensor.
    #[inline(always)]
    pub(crate) fn draws<'a>(
        &self,
        row: usize,
        col: usize,
        len: usize,
        buffer: &'a mut Draws,
    ) -> &'a [u16] {
        if self.keeps_all() || self.drops_all() {
            return &buffer[..len]; // still all zeros, and any draw gives the same answer
        }
        let col = self.col_0 + col as u64;
        // A first column that is no multiple of 8 lies inside a call: draw all of it, skip its head.
        let head = (col % COLS_PER_CALL as u64) as usize;
        let first_call = (col / COLS_PER_CALL as u64) as u32;
        let filled = &mut buffer[..(head + len).next_multiple_of(COLS_PER_FILL)];
        fill_draws(self.key, self.rows.map(row as u64), first_call, filled);
        &filled[head..head + len]
    }

    /// True if an element with this draw is kept.
    #[inline(always)]
    pub(crate) fn keeps(&self, draw: u16) -> bool {
        u32::from(draw) < self.threshold
    }

    /// What a kept element is multiplied by.
    #[inline(always)]
    pub(crate) fn scale(&self) -> f32 {
        self.scale
    }

    /// True if everything is kept, whatever is drawn.
    #[inline(always)]
    pub(crate) fn keeps_all(&self) -> bool {
        self.threshold == Rate::KEEP_ALL.threshold()
    }

    /// True if everything is dropped, whatever is drawn.
    #[inline(always)]
    pub(crate) fn drops_all(&self) -> bool {
        self.threshold == Rate::DROP_ALL.threshold()
    }
}

/// See [`MaskArgs::runs`].
///
/// A loop over `next` and no method that takes a closure: a closure is compiled on its own, for the
/// baseline instruction set, wherever the compiler does not inline it.
pub(crate) struct Runs<'a> {
    mask: &'a MaskArgs,
    at: usize,
    len: usize,
    row: usize,
    col: usize,
    cols: usize,
    draws: Draws,
}

impl Runs<'_> {
    /// The position of the run's first element after `start`, its column, and the draw of each of its
    /// elements.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Option<(usize, usize, &[u16])> {
        if self.at == self.len {
            return None;
        }
        let (at, row, col) = (self.at, self.row, self.col);
        let run = RUN.min(self.cols - col).min(self.len - at);
        self.at += run;
        self.col += run;
        if self.col == self.cols {
            (self.row, self.col) = (row + 1, 0);
        }
        Some((at, col, self.mask.draws(row, col, run, &mut self.draws)))
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_layout_is_that_of_the_kernels() {
        assert_eq!(size_of::<MaskArgs>(), 88);
        let words = [
            offset_of!(MaskArgs, key),
            offset_of!(MaskArgs, threshold),
            offset_of!(MaskArgs, scale),
        ];
        assert_eq!(words, [0, 8, 12]);
        assert_eq!([offset_of!(MaskArgs, col_0), offset_of!(MaskArgs, rows)], [16, 24]);
    }
}
