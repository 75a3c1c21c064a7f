use candle_core::{Result, bail};

use crate::cuda::sizes::{Launch, THREADS, WIDTH};

/// Where the rows of x and of the tables lie: the argument of the kernels. Twin of `struct RopeArgs`
/// in `kernels/rope.cu`.
#[doc(hidden)]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeArgs {
    /// x is `[batches, heads, positions, 2 * half]`.
    pub(crate) batches: u64,
    pub(crate) heads: u64,
    pub(crate) positions: u64,
    pub(crate) half: u64,
    /// Elements of x from one batch, head and position to the next; its last dimension is dense.
    pub(crate) x_strides: [u64; 3],
    /// Elements from the tables of one batch to those of the next: 0 if all share them.
    pub(crate) table_stride: u64,
    /// 1, or -1 to rotate backwards.
    pub(crate) sin_sign: f32,
    /// 1 if the elements 2j and 2j + 1 are a pair, 0 if j and j + half are.
    pub(crate) interleaved: u32,
}

impl RopeArgs {
    /// For x of 2 to 4 dimensions, the last one dense and even.
    pub fn new(
        op: &str,
        (dims, strides): (&[usize], &[usize]),
        table_dims: &[usize],
        inverse: bool,
        interleaved: bool,
    ) -> Result<Self> {
        let per_batch = table_dims.len() == 3;
        // A single leading dimension is that of the batch where each batch has tables of its own.
        let ([batches, heads, positions, size], [b, h, t, _]) = match (dims, strides, per_batch) {
            (&[t, d], &[st, sd], _) => ([1, 1, t, d], [0, 0, st, sd]),
            (&[b, t, d], &[sb, st, sd], true) => ([b, 1, t, d], [sb, 0, st, sd]),
            (&[h, t, d], &[sh, st, sd], false) => ([1, h, t, d], [0, sh, st, sd]),
            (&[b, h, t, d], &[sb, sh, st, sd], _) => ([b, h, t, d], [sb, sh, st, sd]),
            _ => bail!(
                "{op}: x: expected [T, D], [B, T, D] or [B, H, T, D], got {dims:?}; reshape it"
            ),
        };
        Ok(Self {
            batches: batches as u64,
            heads: heads as u64,
            positions: positions as u64,
            half: (size / 2) as u64,
            x_strides: [b as u64, h as u64, t as u64],
            table_stride: if per_batch { (positions * (size / 2)) as u64 } else { 0 },
            sin_sign: if inverse { -1. } else { 1. },
            interleaved: u32::from(interleaved),
        })
    }

    /// A team of lanes takes one position of several heads, whose angles they share.
    pub fn launch(&self, multiprocessors: usize) -> Launch {
        /// Heads that a thread rotates together: `HEADS` of `kernels/rope.cu`.
        const HEADS: usize = 4;
        let [batches, heads, positions, half] =
            [self.batches, self.heads, self.positions, self.half].map(|size| size as usize);
        let lanes = half.div_ceil(WIDTH).max(1).next_power_of_two().min(32);
        let items = batches.saturating_mul(heads.div_ceil(HEADS)).saturating_mul(positions);
        Launch::teams(lanes, THREADS / lanes, items, multiprocessors)
    }

    /// Batch, head and position of row `row` of y.
    #[inline(always)]
    pub(crate) fn coordinates(&self, row: usize) -> [u64; 3] {
        let (position, rest) = (row as u64 % self.positions, row as u64 / self.positions);
        [rest / self.heads, rest % self.heads, position]
    }

    /// Those of the row that follows; three divisions would take longer than a short row.
    #[inline(always)]
    pub(crate) fn following(&self, [batch, head, position]: [u64; 3]) -> [u64; 3] {
        if position + 1 < self.positions {
            [batch, head, position + 1]
        } else if head + 1 < self.heads {
            [batch, head + 1, 0]
        } else {
            [batch + 1, 0, 0]
        }
    }

    /// Where a row of x begins, and where the angles that belong to it.
    #[inline(always)]
    pub(crate) fn offsets(&self, [batch, head, position]: [u64; 3]) -> (usize, usize) {
        let [b, h, t] = self.x_strides;
        let table = batch * self.table_stride + position * self.half;
        ((batch * b + head * h + position * t) as usize, table as usize)
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::cuda::sizes::limits::*;

    #[test]
    fn grids_are_whole_warps_and_fit() {
        let launch = |[batches, heads, positions, half]: [usize; 4]| {
            let dims = [batches, heads, positions, 2 * half];
            let args =
                RopeArgs::new("rope", (&dims, &[0, 0, 0, 1]), &[positions, half], false, false);
            args.expect("four dimensions").launch(MULTIPROCESSORS)
        };
        assert_whole_warps(|half| launch([2, 7, 5, half]));
        assert_grid_fits(|positions, half| launch([3, 5, positions, half]));
    }

    #[test]
    fn the_layout_is_that_of_the_kernels() {
        assert_eq!(size_of::<RopeArgs>(), 72);
        let sizes = [offset_of!(RopeArgs, batches), offset_of!(RopeArgs, half)];
        let strides = [offset_of!(RopeArgs, x_strides), offset_of!(RopeArgs, table_stride)];
        let words = [offset_of!(RopeArgs, sin_sign), offset_of!(RopeArgs, interleaved)];
        assert_eq!([sizes, strides, words], [[0, 24], [32, 56], [64, 68]]);
    }
}
