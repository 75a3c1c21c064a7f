use candle_core::{Result, bail};

use super::config::{DropBlockConfig, clipped};
use crate::cuda::sizes::{BLOCKS_PER_MULTIPROCESSOR, Launch, THREADS};

/// Mask elements of a tile, at most: `MAX_TILE` of `kernels/drop_block.cu`.
const MAX_TILE: usize = 1 << 16;

/// Mask elements of a tile, if its rows are short, and twice as many of `x`: enough for every thread to have several
/// loads in flight.
const TILE: usize = 1 << 13;

/// Elements of a plane, at most: kernels count the draws for a tile in 32 bits.
const MAX_PLANE: usize = 1 << 31;

/// A mask of seeds and the blocks around them, over `[planes, channels, height, width]`. Twin of
/// `struct DropBlockArgs` in `kernels/drop_block.cu`.
#[doc(hidden)]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DropBlockArgs {
    pub(super) elements: u64,
    span: u64,
    spans: u64,
    pub(super) height: u64,
    pub(super) width: u64,
    pub(super) block_height: u64,
    pub(super) block_width: u64,
    pub(super) channels: u64,
    chunk: u64,
    tile: u32,
    pub(super) inside: u32,
}

impl DropBlockArgs {
    /// Of `channels` planes of x that share each of the `planes` of a mask, a part of a whole of `elements`.
    pub fn new(
        op: &str,
        config: &DropBlockConfig,
        (planes, channels): (usize, usize),
        [height, width]: [usize; 2],
        elements: u64,
    ) -> Result<Self> {
        let plane = height.checked_mul(width).filter(|plane| *plane <= MAX_PLANE);
        let Some(plane) = plane else {
            bail!(
                "{op}: x: expected planes [H, W] of at most 2^31 elements, got [{height}, {width}]; narrow them"
            )
        };
        let [block_height, block_width] = [height, width].map(|size| clipped(config, size));
        // Of wide planes a tile has several times the rows that are drawn beside it.
        let beside = block_height.saturating_sub(1).saturating_mul(width);
        let tile = beside.saturating_mul(4).clamp(TILE, MAX_TILE).next_multiple_of(32);
        let (span, spans) = if channels == 1 { (planes * plane, 1) } else { (plane, planes) };
        let chunk = (2 * TILE).div_ceil(tile.min(span).max(1)).next_multiple_of(8);
        Ok(Self {
            elements,
            span: span as u64,
            spans: spans as u64,
            height: height as u64,
            width: width as u64,
            block_height: block_height as u64,
            block_width: block_width as u64,
            channels: channels as u64,
            chunk: chunk as u64,
            tile: tile as u32,
            inside: u32::from(!config.fast),
        })
    }

    /// Blocks of threads that count what is dropped.
    pub fn count_launch(&self, multiprocessors: usize) -> Launch {
        self.launch(1, multiprocessors)
    }

    /// Blocks of threads that take each tile with a chunk of channels.
    pub fn fwd_launch(&self, multiprocessors: usize) -> Launch {
        self.launch(self.channels.div_ceil(self.chunk), multiprocessors)
    }

    fn launch(&self, chunks: u64, multiprocessors: usize) -> Launch {
        let tiles = self.spans.saturating_mul(self.span.div_ceil(self.tile.into()));
        let tasks = usize::try_from(tiles.saturating_mul(chunks)).unwrap_or(usize::MAX);
        let blocks = tasks.clamp(1, multiprocessors * BLOCKS_PER_MULTIPROCESSOR);
        Launch::new([blocks, 1, 1], [THREADS, 1, 1])
    }

    /// Elements of a plane.
    pub(super) fn plane(&self) -> usize {
        (self.height * self.width) as usize
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::cuda::sizes::limits::*;

    #[test]
    fn the_layout_is_that_of_the_kernels() {
        assert_eq!(size_of::<DropBlockArgs>(), 80);
        let words = [
            offset_of!(DropBlockArgs, elements),
            offset_of!(DropBlockArgs, span),
            offset_of!(DropBlockArgs, spans),
            offset_of!(DropBlockArgs, height),
            offset_of!(DropBlockArgs, width),
            offset_of!(DropBlockArgs, block_height),
            offset_of!(DropBlockArgs, block_width),
            offset_of!(DropBlockArgs, channels),
            offset_of!(DropBlockArgs, chunk),
        ];
        assert_eq!(words, std::array::from_fn(|i| 8 * i));
        assert_eq!([offset_of!(DropBlockArgs, tile), offset_of!(DropBlockArgs, inside)], [72, 76]);
    }

    #[test]
    fn grids_fit_and_tiles_fit_into_their_memory() -> Result<()> {
        let config = DropBlockConfig { block_size: 1 << 20, ..Default::default() };
        for (planes, channels) in [(1, 1), (7, 64), (65_537, 3), (1 << 20, 2048)] {
            for hw in [[1, 1], [7, 7], [56, 56], [3, 100_000], [4096, 4096], [1 << 15, 1 << 16]] {
                let args = DropBlockArgs::new("test", &config, (planes, channels), hw, 1)?;
                assert!(args.tile as usize <= MAX_TILE && args.tile.is_multiple_of(32), "{args:?}");
                // Of a stretch of x a kernel counts the elements in 32 bits.
                assert!(args.chunk * u64::from(args.tile) < 1 << 31, "{args:?}");
                assert!(args.block_height <= args.height && args.block_width <= args.width);
                for launch in [args.count_launch(MULTIPROCESSORS), args.fwd_launch(MULTIPROCESSORS)]
                {
                    assert_eq!((launch.block, launch.shared_bytes), ([256, 1, 1], 0));
                    assert!((1..=MULTIPROCESSORS as u32 * 32).contains(&launch.grid[0]));
                }
            }
        }
        let error = DropBlockArgs::new("test", &config, (1, 1), [1 << 16, (1 << 15) + 1], 1);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("test: x: expected planes [H, W] of at most 2^31"), "{error}");
        Ok(())
    }
}
