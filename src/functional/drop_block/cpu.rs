use std::mem::MaybeUninit;

use candle_core::{CpuStorage, Result, Storage, Tensor};

use super::{DropBlockArgs, NAME, scale};
use crate::cpu::{Element, Real, filled, for_float_dtype, map_tasks, storage, vectorized};
use crate::input::Input;
use crate::mask::MaskArgs;

/// Elements of planes that are drawn in one task.
const TASK: usize = 1 << 14;

/// How many elements of a mask of `args.elements` are dropped.
pub(super) fn count(mask: &MaskArgs, args: &DropBlockArgs) -> Result<Storage> {
    let planes = args.elements as usize / args.plane();
    let planes_a_task = TASK.div_ceil(args.plane());
    let tasks = planes.div_ceil(planes_a_task);
    let dropped = map_tasks(
        (tasks, true),
        || Plane::new(args),
        |plane, task| {
            let first = task * planes_a_task;
            let of_plane =
                |at| plane.draw(mask, args, at).iter().filter(|kept| **kept == 0).count();
            (first..planes.min(first + planes_a_task)).map(of_plane).sum::<usize>()
        },
    );
    Ok(Storage::Cpu(CpuStorage::I64(vec![dropped.iter().sum::<usize>() as i64])))
}

pub(super) fn fwd(
    mask: &MaskArgs,
    args: &DropBlockArgs,
    x: &Tensor,
    dropped: Option<&Tensor>,
) -> Result<Storage> {
    let scale = scale(args, dropped)?;
    let x = Input::new(NAME, x);
    for_float_dtype!(x, |E| {
        let x = x.slice::<E>()?;
        let part = |start: usize, y: &mut [MaybeUninit<E>]| {
            let (mut plane, mut drawn) = (Plane::new(args), None);
            for (i, y) in y.chunks_mut(args.plane()).enumerate() {
                let at = start + i * args.plane();
                let plane_of_mask = at / args.plane() / args.channels as usize;
                if drawn != Some(plane_of_mask) {
                    plane.draw(mask, args, plane_of_mask);
                    drawn = Some(plane_of_mask);
                }
                select_scaled(&x[at..][..y.len()], &plane.kept, scale, y);
            }
        };
        // SAFETY: chunks are whole planes, and `select_scaled` writes all of each.
        let y = unsafe { filled::<E>(x.len(), args.plane(), part) };
        Ok(storage(y))
    })
}

/// 1 for what is kept, over all planes of a mask.
pub(super) fn kept(mask: &MaskArgs, args: &DropBlockArgs, planes: usize) -> Vec<u8> {
    let mut plane = Plane::new(args);
    (0..planes).flat_map(|at| plane.draw(mask, args, at).to_vec()).collect()
}

/// Room for a plane.
struct Plane {
    /// 1 for what is kept.
    kept: Vec<u8>,
    /// The same of what the seeds of one row drop in it.
    row: Vec<u8>,
}

impl Plane {
    fn new(args: &DropBlockArgs) -> Self {
        Self { kept: vec![1; args.plane()], row: vec![1; args.width as usize] }
    }

    fn draw(&mut self, mask: &MaskArgs, args: &DropBlockArgs, plane: usize) -> &[u8] {
        draw_plane(mask, args, plane, &mut self.kept, &mut self.row);
        &self.kept
    }
}

vectorized! {
    /// Draws the seeds of a plane row by row; widens those of a row along it, and the row down and up. `row` holds
    /// ones, before and after.
    fn draw_plane(
        mask: &MaskArgs,
        args: &DropBlockArgs,
        plane: usize,
        kept: &mut [u8],
        row: &mut [u8],
    ) {
        kept.fill(1);
        let (height, width) = (args.height as usize, args.width as usize);
        let (block_height, block_width) = (args.block_height as usize, args.block_width as usize);
        let (above, below) = (block_height / 2, (block_height - 1) / 2);
        let (left, right) = (block_width / 2, (block_width - 1) / 2);
        let (mut has_seeds, mut filled) = (false, 0);
        let mut runs = mask.runs(plane * kept.len(), kept.len(), width);
        while let Some((at, col, draws)) = runs.next() {
            let h = at / width;
            let is_inside = h >= above && h + below < height;
            let seeds = draws.iter().filter(|draw| !mask.keeps(**draw)).count();
            if seeds > 0 && (args.inside == 0 || is_inside) {
                for (i, _) in draws.iter().enumerate().filter(|(_, draw)| !mask.keeps(**draw)) {
                    let w = col + i;
                    if args.inside == 1 && (w < left || w + right >= width) {
                        continue;
                    }
                    // Blocks overlap: what is left of `filled` may be dropped already.
                    let end = (w + right + 1).min(width);
                    row[w.saturating_sub(left).max(filled)..end].fill(0);
                    (has_seeds, filled) = (true, end);
                }
            }
            if has_seeds && col + draws.len() == width {
                let rows = h.saturating_sub(above)..(h + below + 1).min(height);
                for kept in kept[rows.start * width..rows.end * width].chunks_exact_mut(width) {
                    for (kept, row) in kept.iter_mut().zip(&*row) {
                        *kept &= row;
                    }
                }
                row.fill(1);
                (has_seeds, filled) = (false, 0);
            }
        }
    }
}

vectorized! {
    fn select_scaled<E: Element>(x: &[E], kept: &[u8], scale: f64, y: &mut [MaybeUninit<E>]) {
        let scale = E::Real::from_f64(scale);
        for ((x, kept), y) in x.iter().zip(kept).zip(y) {
            let scaled = E::store(x.load() * scale);
            y.write(if *kept == 1 { scaled } else { E::ZERO });
        }
    }
}
