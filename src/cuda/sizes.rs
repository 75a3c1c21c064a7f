//! Grids and blocks that kernels share, as pure functions of the shape and of the number of multiprocessors.
//! What belongs to one op stands beside its arguments.

/// Elements in a vector: `WIDTH` of `kernels/elem.cuh`.
pub(crate) const WIDTH: usize = 8;

/// Vectors that a thread holds at a time: `TILE` of `kernels/elem.cuh`.
const TILE: usize = 4;

/// Threads in a block.
pub(crate) const THREADS: usize = 256;

/// Blocks a multiprocessor is given; a grid strides over what is left. Enough to fill every
/// multiprocessor several times over, so that blocks that end early are replaced.
pub(crate) const BLOCKS_PER_MULTIPROCESSOR: usize = 32;

/// What a kernel is launched with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, beside what the kernel declares.
    pub shared_bytes: u32,
}

impl Launch {
    /// Without dynamic shared memory.
    pub(crate) fn new(grid: [usize; 3], block: [usize; 3]) -> Self {
        let clamped = |sizes: [usize; 3]| sizes.map(|size| u32::try_from(size).unwrap_or(u32::MAX));
        Self { grid: clamped(grid), block: clamped(block), shared_bytes: 0 }
    }

    /// Blocks of `lanes` x `teams` threads; enough of them for `tasks` teams, up to the limit.
    pub(crate) fn teams(lanes: usize, teams: usize, tasks: usize, multiprocessors: usize) -> Self {
        let blocks = tasks.div_ceil(teams).clamp(1, multiprocessors * BLOCKS_PER_MULTIPROCESSOR);
        Self::new([blocks, 1, 1], [lanes, teams, 1])
    }
}

/// Element-wise kernels (`for_each_tile`): teams of lanes that share a tile of a row.
///
/// Of the team sizes that still read 64 bytes at once, the widest among those that waste least of their
/// last tile.
pub fn elementwise(rows: usize, cols: usize, multiprocessors: usize) -> Launch {
    let vectors = cols.div_ceil(WIDTH).max(1);
    let covered = |lanes: usize| vectors.next_multiple_of(lanes * TILE);
    let lanes = [32, 16, 8, 4].into_iter().min_by_key(|&lanes| covered(lanes)).unwrap_or(32);
    let tiles = rows.saturating_mul(covered(lanes) / (lanes * TILE));
    Launch::teams(lanes, THREADS / lanes, tiles, multiprocessors)
}

/// Kernels that take a row as a whole: a team has one, and holds up to `THREADS * TILE * WIDTH` columns of
/// it in registers.
pub fn whole_rows(rows: usize, cols: usize, multiprocessors: usize) -> Launch {
    let (lanes, teams) = team_of_row(cols);
    Launch::teams(lanes, teams, rows, multiprocessors)
}

/// Lanes of the team that holds a row of `cols` columns in registers, if any does, and teams of a block.
pub(crate) fn team_of_row(cols: usize) -> (usize, usize) {
    let lanes = cols.div_ceil(WIDTH * TILE).next_power_of_two().clamp(4, THREADS);
    (lanes, if lanes > 32 { 1 } else { THREADS / lanes })
}

/// What every launch has to be, for the tests of all grids.
#[cfg(test)]
pub(crate) mod limits {
    use super::*;

    /// The H200's.
    pub(crate) const MULTIPROCESSORS: usize = 132;

    /// Asserts that blocks are whole warps within the launch bounds, for any number of columns.
    pub(crate) fn assert_whole_warps(launch_of: impl Fn(usize) -> Launch) {
        for cols in (1..3000).chain([8192, 65_536, 1 << 31]) {
            let launch = launch_of(cols);
            let threads: u32 = launch.block.iter().product();
            assert!(threads <= 256 && threads.is_multiple_of(32), "{cols} columns: {launch:?}");
        }
    }

    /// Asserts that grids stay within the limits of the device, for any number of rows and columns.
    pub(crate) fn assert_grid_fits(launch_of: impl Fn(usize, usize) -> Launch) {
        for rows in [1, 65_535, 65_537, 1 << 31, 1 << 40] {
            for cols in [1, 8, 1000, 1 << 31] {
                let launch = launch_of(rows, cols);
                let [x, y, z] = launch.grid;
                assert!((1..=i32::MAX as u32).contains(&x), "{rows} x {cols}: {launch:?}");
                assert!((1..=65_535).contains(&y) && z == 1, "{rows} x {cols}: {launch:?}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::limits::*;
    use super::*;

    #[test]
    fn shared_grids_are_whole_warps_and_fit() {
        for launch in [elementwise, whole_rows] {
            assert_whole_warps(|cols| launch(7, cols, MULTIPROCESSORS));
            assert_grid_fits(|rows, cols| launch(rows, cols, MULTIPROCESSORS));
        }
    }

    #[test]
    fn teams_waste_little_of_their_tiles() {
        let lanes = |cols| elementwise(64, cols, MULTIPROCESSORS).block[0];
        assert_eq!(lanes(1024), 32);
        assert_eq!(lanes(768), 8);
        assert_eq!(lanes(64), 4);
        assert_eq!(lanes(4096), 32);
    }

    #[test]
    fn rows_of_8192_columns_stay_in_registers() {
        let launch = whole_rows(1, 8192, MULTIPROCESSORS);
        assert_eq!(launch.block, [256, 1, 1]);
        assert_eq!(whole_rows(1, 1024, MULTIPROCESSORS).block, [32, 8, 1]);
    }
}
