//! Products of tiles that lie in the caches, for ops that make their operands on the way.
//!
//! ```text
//! out[m, n]  (+)=  left[m, k] · right[k, n]
//! ```
//!
//! The right operand is read in rows of whole vectors, the left one element by element, so a tile and
//! its transpose serve as they are, and nothing is packed or copied here. A block of `out` lives in
//! registers while `k` runs; loops over arrays of constant size are what the compiler turns into
//! vector code, as everywhere (see `vectorized.rs`). Unlike there, products and sums are fused where the CPU
//! can, so the last bit depends on the instruction set.

use super::real::Real;
#[cfg(target_arch = "x86_64")]
use super::vectorized::{InstructionSet, instruction_set};

/// Columns that stand side by side in a [`Right`] operand: two of the widest registers. `n` is a multiple.
pub(crate) const fn panel<R>() -> usize {
    128 / size_of::<R>()
}

/// Element `(i, p)` at `i * row + p * col`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a, R> {
    pub(crate) elements: &'a [R],
    pub(crate) row: usize,
    pub(crate) col: usize,
}

/// Element `(p, j)` at `p * row + j / panel() * panel + j % panel()`.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a, R> {
    pub(crate) elements: &'a [R],
    pub(crate) row: usize,
    pub(crate) panel: usize,
    /// That no element is infinite or NaN; where one is, an element 0 of the left operand passes nothing
    /// on, by selection.
    pub(crate) finite: bool,
}

/// Sizes of a product, and whether it is added to what `out` holds.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) add: bool,
}

/// Computes a product; rows of `out` lie `stride` elements apart.
pub(crate) fn multiply<R: Real>(
    sizes: Product,
    left: Left<'_, R>,
    right: Right<'_, R>,
    out: &mut [R],
    stride: usize,
) {
    let narrow = size_of::<R>() == 4;
    #[cfg(target_arch = "x86_64")]
    match instruction_set() {
        InstructionSet::Avx512 => {
            return match narrow {
                // SAFETY: `instruction_set` found every feature that this variant enables.
                true => unsafe { avx512::<R, 8, 32>(sizes, left, right, out, stride) },
                // SAFETY: as above.
                false => unsafe { avx512::<R, 8, 16>(sizes, left, right, out, stride) },
            };
        }
        InstructionSet::Avx2 => {
            return match narrow {
                // SAFETY: as above.
                true => unsafe { avx2::<R, 4, 16>(sizes, left, right, out, stride) },
                // SAFETY: as above.
                false => unsafe { avx2::<R, 4, 8>(sizes, left, right, out, stride) },
            };
        }
        InstructionSet::Baseline => {}
    }
    const FUSED: bool = cfg!(target_arch = "aarch64");
    match narrow {
        true => blocks::<R, 4, 8, FUSED>(sizes, left, right, out, stride),
        false => blocks::<R, 4, 4, FUSED>(sizes, left, right, out, stride),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn avx512<R: Real, const MR: usize, const NR: usize>(
    sizes: Product,
    left: Left<'_, R>,
    right: Right<'_, R>,
    out: &mut [R],
    stride: usize,
) {
    blocks::<R, MR, NR, true>(sizes, left, right, out, stride)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<R: Real, const MR: usize, const NR: usize>(
    sizes: Product,
    left: Left<'_, R>,
    right: Right<'_, R>,
    out: &mut [R],
    stride: usize,
) {
    blocks::<R, MR, NR, true>(sizes, left, right, out, stride)
}

/// All blocks of `MR x NR`, and the rows that remain one by one.
#[inline(always)]
fn blocks<R: Real, const MR: usize, const NR: usize, const FUSED: bool>(
    sizes: Product,
    left: Left<'_, R>,
    right: Right<'_, R>,
    out: &mut [R],
    stride: usize,
) {
    let whole = if right.finite { sizes.m - sizes.m % MR } else { 0 };
    for j in (0..sizes.n).step_by(NR) {
        for i in (0..whole).step_by(MR) {
            block::<R, MR, NR, FUSED, false>(sizes, left, right, (i, j), out, stride);
        }
        for i in whole..sizes.m {
            block::<R, 1, NR, FUSED, true>(sizes, left, right, (i, j), out, stride);
        }
    }
}

/// The block of `out` at `(i, j)`, summed from 0 so that chains of additions stay short.
#[inline(always)]
fn block<R: Real, const MR: usize, const NR: usize, const FUSED: bool, const SELECT: bool>(
    Product { k, add, .. }: Product,
    left: Left<'_, R>,
    right: Right<'_, R>,
    (i, j): (usize, usize),
    out: &mut [R],
    stride: usize,
) {
    let panel = panel::<R>();
    let a = &left.elements[i * left.row..];
    let b = &right.elements[j / panel * right.panel + j % panel..];
    let mut sums = [[R::ZERO; NR]; MR];
    for p in 0..k {
        let mut b_row = [R::ZERO; NR];
        b_row.copy_from_slice(&b[p * right.row..][..NR]);
        for (row, sums) in sums.iter_mut().enumerate() {
            let x = a[row * left.row + p * left.col];
            if SELECT && x == R::ZERO {
                continue;
            }
            for (sum, b) in sums.iter_mut().zip(b_row) {
                *sum = if FUSED { b.mul_add(x, *sum) } else { b * x + *sum };
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        let out = &mut out[(i + row) * stride + j..][..NR];
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if add { *out + *sum } else { *sum };
        }
    }
}
