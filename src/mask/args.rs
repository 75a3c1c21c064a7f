use candle_core::{Result, bail};

use super::philox::{
    COLS_PER_CALL, COLS_PER_FILL, WIDE_COLS_PER_CALL, WIDE_COLS_PER_FILL, fill_draws,
    fill_wide_draws,
};
use super::rows::RowMap;
use super::{MaskKey, Rate};

/// Columns are limited to this: `col / 8` is a 32-bit counter word.
const MAX_COLS: u64 = 1 << 35;

/// Half of it where a column takes a whole word.
const MAX_WIDE_COLS: u64 = 1 << 34;

/// Draws held at a time: 1 KiB, which stays in the first-level cache beside its elements.
pub(crate) const RUN: usize = 512;

/// Room for the draws of [`MaskArgs::draws`].
pub(crate) type Draws = [u16; RUN + COLS_PER_FILL];

/// What it holds at first.
pub(crate) const NO_DRAWS: Draws = [0; RUN + COLS_PER_FILL];

/// Room for the draws of [`MaskArgs::wide_draws`].
pub(crate) type WideDraws = [u32; RUN + WIDE_COLS_PER_FILL];

/// What it holds at first.
pub(crate) const NO_WIDE_DRAWS: WideDraws = [0; RUN + WIDE_COLS_PER_FILL];

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
    /// The mask over a tensor of shape `dims` that is shared over its dimensions `shared`, in ascending order: the
    /// part that begins at `start` of a whole of shape `full_dims`, both of the mask, which lacks what is shared.
    /// The caller has checked that the part lies in the whole.
    ///
    /// Its rows are those before the last dimension that is not shared.
    pub(crate) fn new(
        op: &str,
        rate: Rate,
        key: MaskKey,
        dims: &[usize],
        shared: &[usize],
        full_dims: &[usize],
        start: &[usize],
    ) -> Result<Self> {
        let own: Vec<usize> = (0..dims.len()).filter(|d| !shared.contains(d)).collect();
        let (last, leading) = own.split_last().map_or((0, &own[..]), |(last, rest)| (*last, rest));
        let cols = if own.is_empty() { 1 } else { dims[last] };
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
        let mut strides = vec![0; last];
        for (at, &d) in leading.iter().enumerate().rev() {
            strides[d] = stride;
            row_0 = row_0.wrapping_add(stride.wrapping_mul(start[at] as u64));
            stride = stride.wrapping_mul(full_dims[at] as u64);
        }
        let threshold = rate.threshold();
        match RowMap::new(&dims[..last], &strides, row_0) {
            Some(rows) => {
                Ok(Self { key: key.words(), threshold, scale: rate.scale(), col_0, rows })
            }
            None if shared.is_empty() => bail!(
                "{op}: drop.window: expected a part that splits at most three leading dimensions, got \
                 {dims:?} of {full_dims:?}; split fewer dimensions"
            ),
            None => bail!(
                "{op}: shared: expected at most four groups of dimensions, shared or not in turn, before the \
                 last one that is not shared, got {shared:?} of {dims:?}; permute x so that shared dimensions \
                 lie together"
            ),
        }
    }

    /// Walks the elements `start..start + len` of a `[rows, cols]` tensor in runs that lie in one row.
    #[inline(always)]
    pub(crate) fn runs(&self, start: usize, len: usize, cols: usize) -> Runs<'_> {
        Runs { mask: self, walk: Walk::new(start, len, cols), draws: NO_DRAWS }
    }

    /// The same walk with 32-bit draws.
    #[inline(always)]
    pub(crate) fn wide_runs(&self, start: usize, len: usize, cols: usize) -> WideRuns<'_> {
        WideRuns { mask: self, walk: Walk::new(start, len, cols), draws: NO_WIDE_DRAWS }
    }

    /// The mask over a tensor of shape `dims`: 1 where an element is kept.
    pub(crate) fn keep(&self, dims: &[usize]) -> Vec<u8> {
        let cols = dims.last().copied().unwrap_or(1);
        let mut keep = vec![0; dims.iter().product()];
        let mut runs = self.runs(0, keep.len(), cols);
        while let Some((at, _, draws)) = runs.next() {
            for (keep, draw) in keep[at..].iter_mut().zip(draws) {
                *keep = u8::from(self.keeps(*draw));
            }
        }
        keep
    }

    /// 1 if the element at this place of the tensor is kept, else 0.
    #[inline(always)]
    pub(crate) fn keep_at(&self, row: usize, col: usize) -> u8 {
        let mut draws = NO_DRAWS;
        u8::from(self.keeps(self.draws(row, col, 1, &mut draws)[0]))
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

    /// The 32-bit draws of `len <= RUN` columns from `col` on, in row `row` of the tensor, whatever the rate.
    #[inline(always)]
    pub(crate) fn wide_draws<'a>(
        &self,
        row: usize,
        col: usize,
        len: usize,
        buffer: &'a mut WideDraws,
    ) -> &'a [u32] {
        let col = self.whole_col(col);
        let head = (col % WIDE_COLS_PER_CALL as u64) as usize;
        let first_call = (col / WIDE_COLS_PER_CALL as u64) as u32;
        let filled = &mut buffer[..(head + len).next_multiple_of(WIDE_COLS_PER_FILL)];
        fill_wide_draws(self.key, self.rows.map(row as u64), first_call, filled);
        &filled[head..head + len]
    }

    /// All of them, over a tensor of shape `dims`.
    pub(crate) fn wide_words(&self, dims: &[usize]) -> Vec<u32> {
        let cols = dims.last().copied().unwrap_or(1);
        let mut words = vec![0; dims.iter().product()];
        let mut runs = self.wide_runs(0, words.len(), cols);
        while let Some((at, draws)) = runs.next() {
            words[at..][..draws.len()].copy_from_slice(draws);
        }
        words
    }

    /// The column of the whole of which column `col` of the tensor is.
    #[inline(always)]
    pub(super) fn whole_col(&self, col: usize) -> u64 {
        self.col_0 + col as u64
    }

    /// Refuses columns that have no wide draw: `col / 4` is a 32-bit word of the counter, too.
    pub(crate) fn check_wide(&self, op: &str, dims: &[usize]) -> Result<()> {
        let end = self.col_0.saturating_add(dims.last().copied().unwrap_or(1) as u64);
        if end > MAX_WIDE_COLS {
            bail!(
                "{op}: x: expected at most 2^34 columns (last dimension), got {end}; reshape so that \
                 part of them is a leading dimension"
            )
        }
        Ok(())
    }

    /// The same decisions, and what is kept stays as large as it is.
    pub fn unscaled(self) -> Self {
        Self { scale: 1., ..self }
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

/// The elements `start..start + len` of a `[rows, cols]` tensor, in stretches of at most [`RUN`] that lie in one row.
///
/// A loop over `next`, of this and of what is made of it, and no method that takes a closure: a closure is compiled on
/// its own, for the baseline instruction set, wherever the compiler does not inline it.
pub(super) struct Walk {
    at: usize,
    len: usize,
    row: usize,
    col: usize,
    cols: usize,
}

/// A stretch of a [`Walk`].
#[derive(Clone, Copy)]
pub(super) struct Stretch {
    /// The position of its first element after the start.
    pub(super) at: usize,
    pub(super) row: usize,
    pub(super) col: usize,
    pub(super) len: usize,
}

impl Walk {
    #[inline(always)]
    pub(super) fn new(start: usize, len: usize, cols: usize) -> Self {
        // An empty tensor may have no columns to divide by.
        let (row, col) = if len == 0 { (0, 0) } else { (start / cols, start % cols) };
        Self { at: 0, len, row, col, cols }
    }

    #[inline(always)]
    pub(super) fn next(&mut self) -> Option<Stretch> {
        if self.at == self.len {
            return None;
        }
        let (at, row, col) = (self.at, self.row, self.col);
        let len = RUN.min(self.cols - col).min(self.len - at);
        self.at += len;
        self.col += len;
        if self.col == self.cols {
            (self.row, self.col) = (row + 1, 0);
        }
        Some(Stretch { at, row, col, len })
    }
}

/// See [`MaskArgs::runs`].
pub(crate) struct Runs<'a> {
    mask: &'a MaskArgs,
    walk: Walk,
    draws: Draws,
}

impl Runs<'_> {
    /// The position of the run's first element after `start`, its column, and the draw of each of its
    /// elements.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Option<(usize, usize, &[u16])> {
        let Stretch { at, row, col, len } = self.walk.next()?;
        Some((at, col, self.mask.draws(row, col, len, &mut self.draws)))
    }
}

/// See [`MaskArgs::wide_runs`].
pub(crate) struct WideRuns<'a> {
    mask: &'a MaskArgs,
    walk: Walk,
    draws: WideDraws,
}

impl WideRuns<'_> {
    /// The position of the run's first element after `start`, and the draw of each of its elements.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Option<(usize, &[u32])> {
        let Stretch { at, row, col, len } = self.walk.next()?;
        Some((at, self.mask.wide_draws(row, col, len, &mut self.draws)))
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
