use crate::cuda::sizes::{BLOCKS_PER_MULTIPROCESSOR, Launch, THREADS, WIDTH};

/// What the two kernels of column sums are launched with.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct ColumnSumsGrids {
    /// Blocks of 32 x 8 threads for 256 columns, in `grid[1]` chunks of rows.
    pub sums: Launch,
    /// A thread a column adds up the sums of the chunks.
    pub totals: Launch,
}

impl ColumnSumsGrids {
    pub fn new(rows: usize, cols: usize, multiprocessors: usize) -> Self {
        const TEAMS: usize = 8;
        /// Rows that a thread sums at least, before a further chunk pays for its part of the second kernel.
        const ROWS_PER_THREAD: usize = 16;
        let most = multiprocessors * BLOCKS_PER_MULTIPROCESSOR;
        let column_blocks = cols.div_ceil(32 * WIDTH).max(1);
        let chunks = rows.div_ceil(TEAMS * ROWS_PER_THREAD);
        let chunks = chunks.clamp(1, most.div_ceil(column_blocks));
        let blocks = cols.div_ceil(THREADS).clamp(1, most);
        Self {
            sums: Launch::new([column_blocks, chunks, 1], [32, TEAMS, 1]),
            totals: Launch::new([blocks, 1, 1], [THREADS, 1, 1]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::sizes::limits::*;

    #[test]
    fn grids_are_whole_warps_and_fit() {
        let grids = |rows, cols| ColumnSumsGrids::new(rows, cols, MULTIPROCESSORS);
        assert_whole_warps(|cols| grids(7, cols).sums);
        assert_whole_warps(|cols| grids(7, cols).totals);
        assert_grid_fits(|rows, cols| grids(rows, cols).sums);
    }
}
