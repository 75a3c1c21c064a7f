//! Standard normal numbers, each pair from two 32-bit draws: Box, Muller, "A note on the generation of random normal
//! deviates", Annals of Mathematical Statistics 29, 1958. The CUDA twin is `kernels/normal.cuh`, step by step and so
//! bit for bit: products and sums round one by one on both sides, and nothing is left to a library.

use super::MaskArgs;
use super::args::{NO_WIDE_DRAWS, RUN, Stretch, Walk, WideDraws};
use super::philox::{WIDE_COLS_PER_CALL, WIDE_COLS_PER_FILL};

/// `ln(1 + f) = f - f^2 / 2 + f^3 P(f)` between the roots of 1/2 and 2 (Cephes, `logf`).
const LN: [f32; 9] = [
    7.037_683_6e-2,
    -1.151_461e-1,
    1.167_699_84e-1,
    -1.242_014_1e-1,
    1.424_932_3e-1,
    -1.666_805_7e-1,
    2.000_071_4e-1,
    -2.499_999_4e-1,
    3.333_333e-1,
];

/// `ln 2` as a number of few bits, so that multiples of it are exact, and the rest.
const LN_2: [f32; 2] = [6.933_594e-1, -2.121_944_4e-4];

/// `sin t = t + t^3 P(t^2)` up to an eighth of a turn (Cephes, `sinf`).
const SIN: [f32; 3] = [-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1];

/// `cos t = 1 - t^2 / 2 + t^4 P(t^2)` up to an eighth of a turn (Cephes, `cosf`).
const COS: [f32; 3] = [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2];

/// A turn over 2^32.
const ANGLE: f32 = 1.462_918_1e-9;

const TWO_TO_MINUS_32: f32 = 2.328_306_4e-10;

/// The root of 1/2, as the bits of an f32 and in 2^32 parts of 1.
const ROOT_HALF_BITS: u32 = 0x3f35_04f3;
const ROOT_HALF_WORD: u32 = 0xb504_f334;

#[inline(always)]
fn polynomial<const N: usize>(coefficients: [f32; N], x: f32) -> f32 {
    let mut p = coefficients[0];
    for c in &coefficients[1..] {
        p = p * x + c;
    }
    p
}

/// `sqrt(-2 ln((word + 0.5) 2^-32))`: between 1.5e-5 and 6.77.
#[inline(always)]
fn radius(word: u32) -> f32 {
    // Near 1 the distance to it is an integer, whose digits would be lost in the number itself.
    let near_1 = word >= ROOT_HALF_WORD;
    let below_1 = (!word as f32 + 0.5) * TWO_TO_MINUS_32;
    // Elsewhere m 2^e, with m between the roots of 1/2 and 2.
    let bits = (word as f32 + 0.5).to_bits();
    let e = (bits.wrapping_sub(ROOT_HALF_BITS) as i32) >> 23;
    let m = f32::from_bits(bits.wrapping_sub((e as u32) << 23));
    let f = if near_1 { -below_1 } else { m - 1. };
    let e = if near_1 { 0. } else { (e - 32) as f32 };
    let f2 = f * f;
    let small = polynomial(LN, f) * f * f2 + e * LN_2[1] - 0.5 * f2;
    let ln = e * LN_2[0] + (f + small);
    (-2. * ln).sqrt()
}

/// Cosine and sine of `word` 2^-32 turns.
#[inline(always)]
fn direction(word: u32) -> (f32, f32) {
    let quarter = word.wrapping_add(1 << 29) >> 30;
    let t = word.wrapping_sub(quarter << 30) as i32 as f32 * ANGLE;
    let t2 = t * t;
    let sin = polynomial(SIN, t2) * t2 * t + t;
    let cos = polynomial(COS, t2) * t2 * t2 - 0.5 * t2 + 1.;
    let (x, y) = if quarter & 1 == 1 { (sin, cos) } else { (cos, sin) };
    let signed = |x: f32, sign: u32| f32::from_bits(x.to_bits() ^ (sign & 2) << 30);
    (signed(x, quarter + 1), signed(y, quarter))
}

/// The two normal numbers of the draws of an even column and of the odd one beside it.
#[inline(always)]
pub(super) fn pair(even: u32, odd: u32) -> (f32, f32) {
    let (r, (cos, sin)) = (radius(even), direction(odd));
    (r * cos, r * sin)
}

impl MaskArgs {
    /// Walks the elements `start..start + len` of a `[rows, cols]` tensor in runs that lie in one row; twin of
    /// [`runs`](Self::runs).
    #[inline(always)]
    pub(crate) fn normal_runs(&self, start: usize, len: usize, cols: usize) -> NormalRuns<'_> {
        let z = [0.; RUN + WIDE_COLS_PER_FILL];
        NormalRuns { mask: self, walk: Walk::new(start, len, cols), words: NO_WIDE_DRAWS, z }
    }
}

crate::cpu::vectorized! {
    /// The normal numbers of all elements of a tensor of shape `dims`.
    pub(super) fn normals_of(mask: &MaskArgs, dims: &[usize]) -> Vec<f32> {
        let cols = dims.last().copied().unwrap_or(1);
        let mut all = vec![0.; dims.iter().product()];
        let mut runs = mask.normal_runs(0, all.len(), cols);
        while let Some((at, z)) = runs.next() {
            all[at..][..z.len()].copy_from_slice(z);
        }
        all
    }
}

/// See [`MaskArgs::normal_runs`].
pub(crate) struct NormalRuns<'a> {
    mask: &'a MaskArgs,
    walk: Walk,
    words: WideDraws,
    z: [f32; RUN + WIDE_COLS_PER_FILL],
}

impl NormalRuns<'_> {
    /// The position of the run's first element after `start`, and the number of each of its elements.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Option<(usize, &[f32])> {
        let Stretch { at, row, col, len: run } = self.walk.next()?;
        // A run that begins or ends inside a call takes whole pairs of it.
        let head = self.mask.whole_col(col) % WIDE_COLS_PER_CALL as u64;
        self.mask.wide_draws(row, col, run, &mut self.words);
        let (head, drawn) = (head as usize, (head as usize + run).next_multiple_of(2));
        let pairs = self.words[..drawn].chunks_exact(2).zip(self.z[..drawn].chunks_exact_mut(2));
        for (words, z) in pairs {
            (z[0], z[1]) = pair(words[0], words[1]);
        }
        Some((at, &self.z[head..head + run]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::{DropMask, MaskKey, NoiseKey};

    /// Words at both ends, beside powers of two and beside each change of case, and some in between.
    fn words() -> Vec<u32> {
        let mut words: Vec<u32> = (0..32).map(|bit| 1 << bit).collect();
        words.extend([0, ROOT_HALF_WORD, ROOT_HALF_WORD >> 1, 3 << 29, 5 << 29, 7 << 29, 3 << 30]);
        let mut near: Vec<u32> = words
            .iter()
            .flat_map(|&w| (0..200).map(move |i| w.wrapping_add(i).wrapping_sub(100)))
            .collect();
        near.extend((0..1_000_000u64).map(|i| MaskKey::derive(5, i).bits() as u32));
        near
    }

    fn units(x: f32, exact: f64) -> f64 {
        let ulp = f64::from(f32::EPSILON) * 2f64.powi(exact.abs().log2().floor() as i32);
        (f64::from(x) - exact).abs() / ulp
    }

    #[test]
    fn radius_and_direction_are_within_three_units_in_the_last_place() {
        let mut worst = [0f64; 3];
        for word in words() {
            let exact = (-2. * ((f64::from(word) + 0.5) * 2f64.powi(-32)).ln()).sqrt();
            worst[0] = worst[0].max(units(radius(word), exact));
            // Around the nearest quarter of a turn, since sin(pi) is not 0 in f64.
            let quarter = (u64::from(word) + (1 << 29)) >> 30;
            let rest = i64::from(word) - ((quarter as i64) << 30);
            let (sin, cos) = (rest as f64 * 2f64.powi(-32) * std::f64::consts::TAU).sin_cos();
            let (x, y) = [(cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos)][quarter as usize % 4];
            let (cos, sin) = direction(word);
            if rest != 0 {
                worst[1] = worst[1].max(units(cos, x));
                worst[2] = worst[2].max(units(sin, y));
            } else {
                assert_eq!((f64::from(cos), f64::from(sin)), (x, y));
            }
        }
        assert!(worst.iter().all(|worst| *worst <= 3.), "{worst:?} units in the last place");
    }

    #[test]
    fn the_largest_number_is_the_root_of_66_ln_2() {
        let largest = (66. * std::f64::consts::LN_2).sqrt() as f32;
        assert_eq!(pair(0, 0), (largest, 0.));
        assert!(radius(u32::MAX) > 1.5e-5);
    }

    /// The lines of `normal_vectors.txt`; `normal_vectors.py` says what stands in them.
    #[test]
    fn draws_and_normals_are_those_of_an_independent_implementation() {
        let mut lines = 0;
        for line in include_str!("../../tests/normal_vectors.txt").lines() {
            let field: Vec<_> = line.split(' ').collect();
            let hex = |i: usize| u64::from_str_radix(field[i], 16).unwrap();
            let [row, col] = [3, 4].map(|i| field[i].parse::<usize>().unwrap());
            let draws: Vec<u32> =
                field[5].split(',').map(|draw| u32::from_str_radix(draw, 16).unwrap()).collect();
            let normals: Vec<f64> = field[6].split(',').map(|z| z.parse().unwrap()).collect();
            let (key, n) = (MaskKey::derive(hex(0), hex(1)), draws.len());
            assert_eq!(key.bits(), hex(2));
            let noise = NoiseKey::new(key).window(&[row + 1, col + n], &[row, col]);
            let args = noise.args("test", &[1, n]).unwrap();
            let mut got = Vec::new();
            for from in (0..n).step_by(RUN) {
                let run = RUN.min(n - from);
                got.extend_from_slice(args.wide_draws(0, from, run, &mut { NO_WIDE_DRAWS }));
            }
            assert_eq!(got, draws, "{line}");
            for (i, (z, exact)) in normals_of(&args, &[1, n]).into_iter().zip(normals).enumerate() {
                assert!(units(z, exact) <= 5., "row {row} column {}: {z} {exact}", col + i);
            }
            lines += 1;
        }
        assert_eq!(lines, 16);
    }

    #[test]
    fn a_key_decides_and_measures_apart() {
        let key = MaskKey::new(3);
        let noise = NoiseKey::new(key);
        assert_eq!(NoiseKey::from(&DropMask::with_rate(crate::Rate::DROP_ALL, key)), noise);
        assert!(noise.args("test", &[2, 5]).unwrap().keeps_all());
    }
}
