use crate::cuda::sizes::{Launch, THREADS, team_of_row, whole_rows};

/// The part of a norm that is no tensor, and what its kernels are launched with.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct NormArgs {
    pub(crate) eps: f64,
    pub(crate) removes_mean: bool,
}

impl NormArgs {
    /// Forward: a team takes a row.
    pub fn launch(rows: usize, cols: usize, multiprocessors: usize) -> Launch {
        whole_rows(rows, cols, multiprocessors)
    }

    /// Backward: no more blocks than run at once, since each writes a row of partial sums.
    pub fn launch_bwd(rows: usize, cols: usize, multiprocessors: usize) -> Launch {
        let (lanes, teams) = team_of_row(cols);
        let resident = multiprocessors * (THREADS / (lanes * teams));
        Launch::new([rows.div_ceil(teams).clamp(1, resident), 1, 1], [lanes, teams, 1])
    }

    /// The second kernel of backward: blocks of 32 columns x 8 threads that share a column, the first row of
    /// the grid for the weight, the second for the bias.
    pub fn launch_bwd_total(cols: usize) -> Launch {
        Launch::new([cols.div_ceil(32).max(1), 2, 1], [32, 8, 1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::sizes::limits::*;

    #[test]
    fn grids_are_whole_warps_and_fit() {
        for launch in [NormArgs::launch, NormArgs::launch_bwd] {
            assert_whole_warps(|cols| launch(7, cols, MULTIPROCESSORS));
            assert_grid_fits(|rows, cols| launch(rows, cols, MULTIPROCESSORS));
        }
        assert_whole_warps(NormArgs::launch_bwd_total);
    }
}
