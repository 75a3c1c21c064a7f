//! Grid, block and chunk sizes, as pure functions of the shape and of the number of multiprocessors.

/// Elements in a vector: `WIDTH` of `kernels/elem.cuh`.
const WIDTH: usize = 8;

/// Vectors that a thread holds at a time: `TILE` of `kernels/elem.cuh`.
const TILE: usize = 4;

/// Threads in a block.
const THREADS: usize = 256;

/// Blocks a multiprocessor is given; a grid strides over what is left. Enough to fill every
/// multiprocessor several times over, so that blocks that end early are replaced.
const BLOCKS_PER_MULTIPROCESSOR: usize = 32;

/// What a kernel is launched with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    /// Dynamic shared memory of a block, beside what the kernel declares.
    pub(crate) shared_bytes: u32,
}

impl Launch {
    /// Blocks of `lanes` x `teams` threads; enough of them for `tasks` teams, up to the limit.
    fn teams(lanes: usize, teams: usize, tasks: usize, multiprocessors: usize) -> Self {
        let blocks = tasks.div_ceil(teams).clamp(1, multiprocessors * BLOCKS_PER_MULTIPROCESSOR);
        Self {
            grid: [blocks as u32, 1, 1],
            block: [lanes as u32, teams as u32, 1],
            shared_bytes: 0,
        }
    }
}

/// Element-wise kernels (`for_each_tile`): teams of lanes that share a tile of a row.
///
/// Of the team sizes that still read 64 bytes at once, the widest among those that waste least of their
/// last tile.
pub(crate) fn elementwise(rows: usize, cols: usize, multiprocessors: usize) -> Launch {
    let vectors = cols.div_ceil(WIDTH).max(1);
    let covered = |lanes: usize| vectors.next_multiple_of(lanes * TILE);
    let lanes = [32, 16, 8, 4].into_iter().min_by_key(|&lanes| covered(lanes)).unwrap_or(32);
    let tiles = rows.saturating_mul(covered(lanes) / (lanes * TILE));
    Launch::teams(lanes, THREADS / lanes, tiles, multiprocessors)
}

/// Rotations: a team of lanes takes one position of several heads, whose angles they share.
pub(crate) fn rope(
    batches: usize,
    heads: usize,
    positions: usize,
    half: usize,
    multiprocessors: usize,
) -> Launch {
    /// Heads that a thread rotates together: `HEADS` of `kernels/rope.cu`.
    const HEADS: usize = 4;
    let lanes = half.div_ceil(WIDTH).max(1).next_power_of_two().min(32);
    let items = batches.saturating_mul(heads.div_ceil(HEADS)).saturating_mul(positions);
    Launch::teams(lanes, THREADS / lanes, items, multiprocessors)
}

/// Softmax kernels: a team takes a row and holds it in registers, up to `THREADS * TILE * WIDTH`
/// columns.
pub(crate) fn softmax(rows: usize, cols: usize, multiprocessors: usize) -> Launch {
    let (lanes, teams) = team_of_row(cols);
    Launch::teams(lanes, teams, rows, multiprocessors)
}

/// Cross-entropy kernels: as softmax, but a row of any length is read once.
pub(crate) fn cross_entropy(rows: usize, classes: usize, multiprocessors: usize) -> Launch {
    softmax(rows, classes, multiprocessors)
}

/// The second kernel of the cross entropy: one block adds up the losses of all rows.
pub(crate) fn cross_entropy_total() -> Launch {
    Launch { grid: [1; 3], block: [THREADS as u32, 1, 1], shared_bytes: 0 }
}

/// Norm kernels, forward: as softmax.
pub(crate) fn norm(rows: usize, cols: usize, multiprocessors: usize) -> Launch {
    softmax(rows, cols, multiprocessors)
}

/// Norm kernels, backward: no more blocks than run at once, since each writes a row of partial sums.
pub(crate) fn norm_bwd(rows: usize, cols: usize, multiprocessors: usize) -> Launch {
    let (lanes, teams) = team_of_row(cols);
    let resident = multiprocessors * (THREADS / (lanes * teams));
    let blocks = rows.div_ceil(teams).clamp(1, resident);
    Launch { grid: [blocks as u32, 1, 1], block: [lanes as u32, teams as u32, 1], shared_bytes: 0 }
}

/// The second kernel of [`norm_bwd`]: blocks of 32 columns x 8 threads that share a column, the first row
/// of the grid for the weight, the second for the bias.
pub(crate) fn norm_totals(cols: usize) -> Launch {
    Launch { grid: [cols.div_ceil(32).max(1) as u32, 2, 1], block: [32, 8, 1], shared_bytes: 0 }
}

/// Lanes of the team that holds a row of `cols` columns in registers, if any does, and teams of a block.
fn team_of_row(cols: usize) -> (usize, usize) {
    let lanes = cols.div_ceil(WIDTH * TILE).next_power_of_two().clamp(4, THREADS);
    (lanes, if lanes > 32 { 1 } else { THREADS / lanes })
}

/// Column sums: blocks of 32 x 8 threads for 256 columns, in `grid[1]` chunks of rows whose sums a
/// second kernel adds up.
pub(crate) fn column_sums(rows: usize, cols: usize, multiprocessors: usize) -> Launch {
    const TEAMS: usize = 8;
    /// Rows that a thread sums at least, before a further chunk pays for its part of the second kernel.
    const ROWS_PER_THREAD: usize = 16;
    let column_blocks = cols.div_ceil(32 * WIDTH).max(1);
    let wanted = (multiprocessors * BLOCKS_PER_MULTIPROCESSOR).div_ceil(column_blocks);
    let chunks = rows.div_ceil(TEAMS * ROWS_PER_THREAD).clamp(1, wanted);
    Launch {
        grid: [column_blocks as u32, chunks as u32, 1],
        block: [32, TEAMS as u32, 1],
        shared_bytes: 0,
    }
}

/// The second kernel of the column sums: a thread a column.
pub(crate) fn column_totals(cols: usize, multiprocessors: usize) -> Launch {
    let blocks = cols.div_ceil(THREADS).clamp(1, multiprocessors * BLOCKS_PER_MULTIPROCESSOR);
    Launch { grid: [blocks as u32, 1, 1], block: [THREADS as u32, 1, 1], shared_bytes: 0 }
}

/// The kernels of attention that walk over tiles of scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttentionPass {
    Fwd,
    BwdDq,
    BwdDkdv,
}

impl AttentionPass {
    /// As the `.cu` files name it.
    pub(crate) fn kernel(self) -> &'static str {
        match self {
            Self::Fwd => "attention_fwd",
            Self::BwdDq => "attention_bwd_dq",
            Self::BwdDkdv => "attention_bwd_dkdv",
        }
    }
}

/// Head sizes that `kernels/attention_f32.cu` has instances for; others take the next one.
pub(crate) const ATTENTION_F32_HEAD_SIZES: [usize; 3] = [64, 128, 256];

/// `kernels/attention_f32.cu`: a block takes 64 of the `rows` of one of `heads` heads, all samples counted;
/// for dk and dv those of the keys and their heads. `head_size` is that of the instance.
pub(crate) fn attention_f32(
    pass: AttentionPass,
    head_size: usize,
    heads: usize,
    rows: usize,
) -> Launch {
    /// `TILE_ROWS` of the kernels.
    const TILE_ROWS: usize = 64;
    // 64 rows x 8 threads that share one, each with as many rows as leave room for its results.
    let rows_of_thread = match (pass, head_size) {
        (_, ..=64) | (AttentionPass::Fwd | AttentionPass::BwdDq, ..=128) => 4,
        _ => 2,
    };
    let blocks = heads.saturating_mul(rows.div_ceil(TILE_ROWS));
    Launch {
        grid: [u32::try_from(blocks).unwrap_or(u32::MAX), 1, 1],
        block: [(TILE_ROWS * 8 / rows_of_thread) as u32, 1, 1],
        shared_bytes: 0,
    }
}

/// Head sizes that `kernels/attention_half.cu` has instances for; others take the next one.
pub(crate) const ATTENTION_HALF_HEAD_SIZES: [usize; 5] = [32, 64, 96, 128, 256];

/// `kernels/attention_half.cu`, f16 and bf16; arguments as of [`attention_f32`]. Above 48 KiB of shared memory,
/// at most 97 KiB, a kernel has to be allowed it.
pub(crate) fn attention_half(
    pass: AttentionPass,
    head_size: usize,
    heads: usize,
    rows: usize,
) -> Launch {
    const THREADS: usize = 128;
    // The shapes of the kernels: rows of a block; rows of tiles in shared memory; beside them bytes of scores
    // and of what is known of rows.
    let (block_rows, tile_rows, other_bytes) = match (pass, head_size) {
        (AttentionPass::Fwd, ..=64) => (128, 128 + 4 * 64, 0),
        (AttentionPass::Fwd, ..=128) => (128, 128 + 4 * 32, 0),
        (AttentionPass::Fwd, _) => (64, 64 + 4 * 32, 0),
        (AttentionPass::BwdDq, ..=128) => (128, 2 * 128 + 4 * 32, 128 * 8),
        (AttentionPass::BwdDq, _) => (64, 2 * 64 + 2 * 32, 64 * 8),
        (AttentionPass::BwdDkdv, ..=128) => (64, 2 * 64 + 3 * 64, 2 * 64 * 64 * 2 + 64 * 8),
        (AttentionPass::BwdDkdv, _) => (32, 2 * 32 + 3 * 32, 2 * 32 * 32 * 2 + 32 * 8),
    };
    // Tiles of keys begin where Philox calls do, up to 7 keys before the first.
    let rows = if pass == AttentionPass::BwdDkdv { rows.saturating_add(WIDTH - 1) } else { rows };
    let blocks = heads.saturating_mul(rows.div_ceil(block_rows));
    Launch {
        grid: [u32::try_from(blocks).unwrap_or(u32::MAX), 1, 1],
        block: [THREADS as u32, 1, 1],
        shared_bytes: (2 * tile_rows * head_size + other_bytes) as u32,
    }
}

/// Row sums of attention's backward: teams of lanes that share a row, up to 32.
pub(crate) fn attention_delta(rows: usize, head_size: usize, multiprocessors: usize) -> Launch {
    let lanes = head_size.div_ceil(WIDTH).next_power_of_two().clamp(1, 32);
    Launch::teams(lanes, THREADS / lanes, rows, multiprocessors)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The H200's.
    const MULTIPROCESSORS: usize = 132;

    fn threads(launch: Launch) -> u32 {
        launch.block.iter().product()
    }

    #[test]
    fn blocks_are_whole_warps_within_the_launch_bounds() {
        for cols in (1..3000).chain([8192, 65_536, 1 << 31]) {
            for launch in [
                elementwise(7, cols, MULTIPROCESSORS),
                softmax(7, cols, MULTIPROCESSORS),
                norm(7, cols, MULTIPROCESSORS),
                norm_bwd(7, cols, MULTIPROCESSORS),
                norm_totals(cols),
                rope(2, 7, 5, cols, MULTIPROCESSORS),
                cross_entropy(7, cols, MULTIPROCESSORS),
                cross_entropy_total(),
                column_sums(7, cols, MULTIPROCESSORS),
                column_totals(cols, MULTIPROCESSORS),
                attention_delta(7, cols, MULTIPROCESSORS),
            ] {
                let threads = threads(launch);
                assert!(threads <= 256 && threads.is_multiple_of(32), "{cols} columns: {launch:?}");
            }
        }
    }

    #[test]
    fn grids_stay_within_the_limits_of_the_device() {
        for rows in [1, 65_535, 65_537, 1 << 31, 1 << 40] {
            for cols in [1, 8, 1000, 1 << 31] {
                for launch in [
                    elementwise(rows, cols, MULTIPROCESSORS),
                    softmax(rows, cols, MULTIPROCESSORS),
                    norm_bwd(rows, cols, MULTIPROCESSORS),
                    rope(3, 5, rows, cols, MULTIPROCESSORS),
                    column_sums(rows, cols, MULTIPROCESSORS),
                    attention_delta(rows, cols, MULTIPROCESSORS),
                ] {
                    let [x, y, z] = launch.grid;
                    assert!((1..=i32::MAX as u32).contains(&x), "{rows} x {cols}: {launch:?}");
                    assert!((1..=65_535).contains(&y) && z == 1, "{rows} x {cols}: {launch:?}");
                }
            }
        }
    }

    #[test]
    fn attention_has_a_block_for_each_tile_of_each_head() {
        for (pass, head_size, threads) in [
            (AttentionPass::Fwd, 64, 128),
            (AttentionPass::BwdDq, 128, 128),
            (AttentionPass::BwdDkdv, 64, 128),
            (AttentionPass::BwdDkdv, 128, 256),
            (AttentionPass::Fwd, 256, 256),
        ] {
            for (rows, tiles) in [(1, 1), (64, 1), (65, 2), (16_384, 256)] {
                let launch = attention_f32(pass, head_size, 12, rows);
                assert_eq!(launch.grid, [12 * tiles, 1, 1]);
                assert_eq!(launch.block, [threads, 1, 1]);
            }
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
        let launch = softmax(1, 8192, MULTIPROCESSORS);
        assert_eq!(launch.block, [256, 1, 1]);
        assert_eq!(softmax(1, 1024, MULTIPROCESSORS).block, [32, 8, 1]);
    }

    #[test]
    fn attention_stays_within_the_shared_memory_of_every_architecture() {
        // sm_86 and sm_120 give a block the least: 99 KiB.
        const MOST: u32 = 99 << 10;
        let passes = [AttentionPass::Fwd, AttentionPass::BwdDq, AttentionPass::BwdDkdv];
        for pass in passes {
            for head_size in ATTENTION_HALF_HEAD_SIZES {
                let launch = attention_half(pass, head_size, 3, 1000);
                assert!(launch.shared_bytes <= MOST, "{pass:?}, {head_size} columns: {launch:?}");
            }
            for head_size in ATTENTION_F32_HEAD_SIZES {
                let threads = threads(attention_f32(pass, head_size, 3, 1000));
                assert!(threads <= 256 && threads.is_multiple_of(32), "{pass:?}, {head_size}");
            }
            let sources = [
                include_str!("../../kernels/attention_half.cu"),
                include_str!("../../kernels/attention_f32.cu"),
            ];
            for source in sources {
                assert!(source.contains(pass.kernel()), "{pass:?}");
            }
        }
    }
}
