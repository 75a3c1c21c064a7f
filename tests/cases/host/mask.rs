//! Masks, and whether kernels draw them as an independent implementation does.

use candle_core::Device;
use candle_dropout::{DropMask, MaskArgs, MaskKey, Rate};

use super::case::Case;
use super::common::values;
use super::program::Program;

/// The mask over a tensor.
pub struct Mask {
    /// For the ops of the crate.
    pub drop: DropMask,
    /// For the kernels.
    pub args: MaskArgs,
    /// For formulas.
    pub keep: Vec<bool>,
    pub scale: f64,
}

impl Mask {
    /// The part of shape `dims` that begins at `start` of a mask of shape `full`.
    pub fn part(rate: Rate, key: MaskKey, [dims, full, start]: [&[usize]; 3]) -> Self {
        let drop = DropMask::with_rate(rate, key).window(full, start);
        let keep: Vec<u8> = values(&drop.to_tensor(dims, &Device::Cpu).unwrap());
        let keep = keep.into_iter().map(|keep| keep == 1).collect();
        let args = drop.args("test", dims).unwrap();
        Self { drop, args, keep, scale: rate.scale().into() }
    }

    /// The same at the rate and with the key of most tests.
    pub fn window(drop_p: f32, window: [&[usize]; 3]) -> Self {
        Self::part(Rate::new(drop_p).unwrap(), MaskKey::derive(7, 11), window)
    }

    /// A part that reaches to the end of the whole.
    pub fn from_start(drop_p: f32, dims: &[usize], start: &[usize]) -> Self {
        let full: Vec<_> = dims.iter().zip(start).map(|(dim, start)| dim + start).collect();
        Self::window(drop_p, [dims, &full, start])
    }
}

/// A stretch of one row of a mask, as an independent implementation computed it.
struct Vector {
    mask: MaskArgs,
    keep: Vec<bool>,
    what: String,
}

/// The lines of `mask_vectors.txt`, each as it stands and from its first whole Philox call on, at its own
/// rate and at those that tell its first and last draw from their neighbours.
fn vectors() -> Vec<Vector> {
    let mut vectors = Vec::new();
    for line in include_str!("../../mask_vectors.txt").lines() {
        let field: Vec<_> = line.split(' ').collect();
        let key = MaskKey::new(u64::from_str_radix(field[2], 16).unwrap());
        let threshold: u32 = field[4].parse().unwrap();
        let [row, col] = [5, 6].map(|i| field[i].parse::<usize>().unwrap());
        let draws: Vec<u32> =
            field[7].split(',').map(|draw| u32::from_str_radix(draw, 16).unwrap()).collect();
        let keep: Vec<bool> = field[8].bytes().map(|bit| bit == b'1').collect();
        assert!(draws.iter().zip(&keep).all(|(draw, keep)| (*draw < threshold) == *keep));

        let aligned = col.next_multiple_of(8) - col;
        let aligned_end = aligned + draws.len().saturating_sub(aligned) / 8 * 8;
        for (from, to) in [(0, draws.len()), (aligned, aligned_end)] {
            if from >= to {
                continue;
            }
            let draws = &draws[from..to];
            let [first, last] = [draws[0], draws[draws.len() - 1]];
            for threshold in [threshold, first, first + 1, last, last + 1] {
                let rate = Rate::new((65536 - threshold) as f32 / 65536.).unwrap();
                assert_eq!(rate.threshold(), threshold);
                let (dims, start) = ([1, to - from], [row, col + from]);
                let full = [row + 1, col + to];
                vectors.push(Vector {
                    mask: Mask::part(rate, key, [&dims, &full, &start]).args,
                    keep: draws.iter().map(|draw| *draw < threshold).collect(),
                    what: format!("row {row}, columns {} on, threshold {threshold}", col + from),
                });
            }
        }
    }
    vectors
}

/// Of each stretch of a row a launch keeps what the independent implementation keeps: what it drops is 0 in
/// its first buffer, and nothing else is. `case` is given the mask and its columns.
#[track_caller]
pub fn assert_keeps_the_vectors(program: &Program, case: impl Fn(&MaskArgs, usize) -> Case) {
    let vectors = vectors();
    let cases: Vec<_> = vectors.iter().map(|of| case(&of.mask, of.keep.len())).collect();
    for (outputs, vector) in program.run(&cases).unwrap().iter().zip(&vectors) {
        let kept: Vec<bool> = outputs.get::<f32>(0).iter().map(|y| *y != 0.).collect();
        assert_eq!(kept, vector.keep, "{}", vector.what);
    }
}
