use crate::cuda::sizes::{Launch, THREADS, WIDTH};

/// Sizes of an attention and the limits on its scores, as every kernel gets them. Twin of `struct
/// AttentionArgs` in `kernels/attention.cuh`.
#[doc(hidden)]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionArgs {
    /// Multiplies the scores.
    pub scale: f64,
    /// 0 for none.
    pub softcap: f64,
    pub batches: u32,
    pub heads: u32,
    /// Divides `heads`; head `h` reads key and value head `h / (heads / kv_heads)`.
    pub kv_heads: u32,
    pub queries: u32,
    pub keys: u32,
    pub head_size: u32,
    /// Keys that a query sees before and after its own, the key `i + keys - queries`; [`Self::UNBOUNDED`] for all.
    pub left: u32,
    pub right: u32,
    /// 1 if keys are dropped, not weights; the mask has a scale of 1 then.
    pub drop_key: u32,
    pub padding: u32,
}

impl AttentionArgs {
    /// No limit on the keys that are seen to one side.
    pub const UNBOUNDED: u32 = u32::MAX;

    /// The keys that query `i` sees, as a range; `keys` is the length of its sample.
    #[inline(always)]
    pub fn visible(&self, query: usize, keys: usize) -> (usize, usize) {
        let diagonal = query as i64 + i64::from(self.keys) - i64::from(self.queries);
        let begin = match self.left {
            Self::UNBOUNDED => 0,
            left => (diagonal - i64::from(left)).max(0),
        };
        let end = match self.right {
            Self::UNBOUNDED => keys as i64,
            right => (diagonal + i64::from(right) + 1).min(keys as i64),
        };
        (begin as usize, end.max(begin) as usize)
    }

    #[inline(always)]
    pub(super) fn drops_keys(&self) -> bool {
        self.drop_key != 0
    }

    /// Row sums of backward (`kernels/attention_delta.cu`): teams of lanes that share a row, up to 32.
    pub fn launch_delta(&self, multiprocessors: usize) -> Launch {
        let lanes = (self.head_size as usize).div_ceil(WIDTH).next_power_of_two().clamp(1, 32);
        Launch::teams(lanes, THREADS / lanes, self.rows(), multiprocessors)
    }

    /// Rows of q and o: all queries of all heads.
    pub fn rows(&self) -> usize {
        self.batches as usize * self.heads as usize * self.queries as usize
    }
}

/// Where the elements of a tensor `[B, H, S, D]` lie: strides in elements. Those of the last dimension
/// are neighbours. Twin of `struct HeadStrides` in `kernels/attention.cuh`.
#[doc(hidden)]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadStrides {
    pub batch: u64,
    pub head: u64,
    pub row: u64,
}

impl HeadStrides {
    /// Where row `(batch, head, row)` begins.
    #[inline(always)]
    pub fn at(&self, batch: usize, head: usize, row: usize) -> usize {
        batch * self.batch as usize + head * self.head as usize + row * self.row as usize
    }
}

/// The strides of the four tensors of a pass: q, k, v, o, or their gradients. Twin of `struct
/// AttentionLayout` in `kernels/attention.cuh`.
#[doc(hidden)]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionLayout {
    pub q: HeadStrides,
    pub k: HeadStrides,
    pub v: HeadStrides,
    pub o: HeadStrides,
}

/// The kernels of attention that walk over tiles of scores.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionPass {
    Fwd,
    BwdDq,
    BwdDkdv,
}

impl AttentionPass {
    /// Head sizes that `kernels/attention_f32.cu` has instances for; others take the next one.
    pub const F32_HEAD_SIZES: [usize; 3] = [64, 128, 256];

    /// Head sizes that `kernels/attention_half.cu` has instances for; others take the next one.
    pub const HALF_HEAD_SIZES: [usize; 5] = [32, 64, 96, 128, 256];

    /// As the `.cu` files name it.
    pub fn kernel(self) -> &'static str {
        match self {
            Self::Fwd => "attention_fwd",
            Self::BwdDq => "attention_bwd_dq",
            Self::BwdDkdv => "attention_bwd_dkdv",
        }
    }

    /// `kernels/attention_f32.cu`: a block takes 64 of the `rows` of one of `heads` heads, all samples
    /// counted; for dk and dv those of the keys and their heads. `head_size` is that of the instance.
    pub fn launch_f32(self, head_size: usize, heads: usize, rows: usize) -> Launch {
        /// `TILE_ROWS` of the kernels.
        const TILE_ROWS: usize = 64;
        // 64 rows x 8 threads that share one, each with as many rows as leave room for its results.
        let rows_of_thread = match (self, head_size) {
            (_, ..=64) | (Self::Fwd | Self::BwdDq, ..=128) => 4,
            _ => 2,
        };
        let blocks = heads.saturating_mul(rows.div_ceil(TILE_ROWS));
        Launch::new([blocks, 1, 1], [TILE_ROWS * 8 / rows_of_thread, 1, 1])
    }

    /// `kernels/attention_half.cu`, f16 and bf16; arguments as of [`launch_f32`](Self::launch_f32). Above
    /// 48 KiB of shared memory, at most 98 KiB, a kernel has to be allowed it.
    pub fn launch_half(self, head_size: usize, heads: usize, rows: usize) -> Launch {
        const THREADS: usize = 128;
        // The shapes of the kernels: rows of a block; rows of tiles in shared memory; beside them bytes of
        // scores and of what is known of rows.
        let (block_rows, tile_rows, other_bytes) = match (self, head_size) {
            (Self::Fwd, ..=64) => (128, 128 + 4 * 64, 0),
            (Self::Fwd, ..=128) => (128, 128 + 4 * 32, 0),
            (Self::Fwd, _) => (64, 64 + 4 * 32, 0),
            (Self::BwdDq, ..=128) => (128, 2 * 128 + 4 * 32, 128 * 12),
            (Self::BwdDq, _) => (64, 2 * 64 + 2 * 32, 64 * 12),
            (Self::BwdDkdv, ..=128) => (64, 2 * 64 + 3 * 64, 2 * 64 * 64 * 2 + 64 * 12),
            (Self::BwdDkdv, _) => (32, 2 * 32 + 3 * 32, 2 * 32 * 32 * 2 + 32 * 12),
        };
        // Tiles of keys begin where Philox calls do, up to 7 keys before the first.
        let rows = if self == Self::BwdDkdv { rows.saturating_add(WIDTH - 1) } else { rows };
        let blocks = heads.saturating_mul(rows.div_ceil(block_rows));
        let shared_bytes = (2 * tile_rows * head_size + other_bytes) as u32;
        Launch { shared_bytes, ..Launch::new([blocks, 1, 1], [THREADS, 1, 1]) }
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::cuda::sizes::limits::*;

    const PASSES: [AttentionPass; 3] =
        [AttentionPass::Fwd, AttentionPass::BwdDq, AttentionPass::BwdDkdv];

    #[test]
    fn grids_are_whole_warps_and_fit() {
        let launch = |rows: usize, head_size: usize| {
            let (queries, head_size) = (rows.min(1 << 31) as u32, head_size as u32);
            let args = AttentionArgs { queries, head_size, ..SMALL };
            args.launch_delta(MULTIPROCESSORS)
        };
        assert_whole_warps(|head_size| launch(7, head_size));
        assert_grid_fits(launch);
        for (pass, head_size) in PASSES
            .into_iter()
            .flat_map(|pass| AttentionPass::F32_HEAD_SIZES.map(|head_size| (pass, head_size)))
        {
            let [threads, ..] = pass.launch_f32(head_size, 3, 1000).block;
            assert!(threads <= 256 && threads.is_multiple_of(32), "{pass:?}, {head_size}");
        }
    }

    #[test]
    fn there_is_a_block_for_each_tile_of_each_head() {
        for (pass, head_size, threads) in [
            (AttentionPass::Fwd, 64, 128),
            (AttentionPass::BwdDq, 128, 128),
            (AttentionPass::BwdDkdv, 64, 128),
            (AttentionPass::BwdDkdv, 128, 256),
            (AttentionPass::Fwd, 256, 256),
        ] {
            for (rows, tiles) in [(1, 1), (64, 1), (65, 2), (16_384, 256)] {
                let launch = pass.launch_f32(head_size, 12, rows);
                assert_eq!(launch.grid, [12 * tiles, 1, 1]);
                assert_eq!(launch.block, [threads, 1, 1]);
            }
        }
    }

    #[test]
    fn blocks_stay_within_the_shared_memory_of_every_architecture() {
        // sm_86 and sm_120 give a block the least: 99 KiB.
        const MOST: u32 = 99 << 10;
        for pass in PASSES {
            for head_size in AttentionPass::HALF_HEAD_SIZES {
                let launch = pass.launch_half(head_size, 3, 1000);
                assert!(launch.shared_bytes <= MOST, "{pass:?}, {head_size} columns: {launch:?}");
            }
        }
    }

    const SMALL: AttentionArgs = AttentionArgs {
        scale: 1.,
        softcap: 0.,
        batches: 1,
        heads: 1,
        kv_heads: 1,
        queries: 1,
        keys: 1,
        head_size: 1,
        left: AttentionArgs::UNBOUNDED,
        right: AttentionArgs::UNBOUNDED,
        drop_key: 0,
        padding: 0,
    };

    #[test]
    fn the_layout_is_that_of_the_kernels() {
        assert_eq!(size_of::<AttentionArgs>(), 56);
        let sizes = [
            offset_of!(AttentionArgs, softcap),
            offset_of!(AttentionArgs, batches),
            offset_of!(AttentionArgs, heads),
            offset_of!(AttentionArgs, kv_heads),
            offset_of!(AttentionArgs, queries),
            offset_of!(AttentionArgs, keys),
            offset_of!(AttentionArgs, head_size),
            offset_of!(AttentionArgs, left),
            offset_of!(AttentionArgs, right),
            offset_of!(AttentionArgs, drop_key),
        ];
        assert_eq!(sizes, [8, 16, 20, 24, 28, 32, 36, 40, 44, 48]);
        assert_eq!(size_of::<AttentionLayout>(), 96);
        assert_eq!([offset_of!(HeadStrides, head), offset_of!(HeadStrides, row)], [8, 16]);
        let tensors = [
            offset_of!(AttentionLayout, k),
            offset_of!(AttentionLayout, v),
            offset_of!(AttentionLayout, o),
        ];
        assert_eq!(tensors, [24, 48, 72]);
    }
}
