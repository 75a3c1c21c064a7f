//! Sums and maxima over a row, taken in a fixed number of lanes whatever the register width, so that
//! every instruction set gives the same bits.

use super::real::Real;

const LANES: usize = 16;

/// Terms that are summed before their sum is added to the total: rounding errors grow with the number of
/// additions in a chain, and rows can be long.
const BLOCK: usize = 64 * LANES;

/// `Σ term(j)` over `0..len`.
#[inline(always)]
pub(crate) fn lane_sum<R: Real>(len: usize, term: impl Fn(usize) -> R) -> R {
    let mut totals = [R::ZERO; LANES];
    for block in (0..len).step_by(BLOCK) {
        let end = len.min(block + BLOCK);
        let whole = end - (end - block) % LANES;
        let mut sums = [R::ZERO; LANES];
        for start in (block..whole).step_by(LANES) {
            for (lane, sum) in sums.iter_mut().enumerate() {
                *sum += term(start + lane);
            }
        }
        for j in whole..end {
            sums[j - whole] += term(j);
        }
        totals.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }
    totals.into_iter().sum()
}

/// `Σ term(x[j])`, as [`lane_sum`] adds up; a slice of chunks needs no check of its bounds.
#[inline(always)]
pub(crate) fn slice_sum<R: Real>(x: &[R], term: impl Fn(R) -> R) -> R {
    let mut totals = [R::ZERO; LANES];
    for block in x.chunks(BLOCK) {
        let mut sums = [R::ZERO; LANES];
        let chunks = block.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += term(*x));
        }
        sums.iter_mut().zip(rest).for_each(|(sum, x)| *sum += term(*x));
        totals.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }
    totals.into_iter().sum()
}

/// `Σ term(a[j], b[j])` of slices as long as one another, in the same lanes, each one chain of additions;
/// the lanes are added by halves.
#[inline(always)]
pub(crate) fn slices_sum<A: Copy, B: Copy, R: Real>(
    a: &[A],
    b: &[B],
    term: impl Fn(A, B) -> R,
) -> R {
    let mut sums = [R::ZERO; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += term(*a, *b);
        }
    }
    sums.iter_mut().zip(rest).for_each(|(sum, (a, b))| *sum += term(*a, *b));
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
        half /= 2;
    }
    sums[0]
}

/// The mean of the elements, as they are summed by [`lane_sum`]. No rounding moves it out of their range, so that
/// of equal elements it is what they are.
#[inline(always)]
pub(crate) fn lane_mean<R: Real>(x: &[R]) -> R {
    let mut totals = [R::ZERO; LANES];
    let (mut smallest, mut largest) = ([R::INFINITY; LANES], [R::NEG_INFINITY; LANES]);
    for block in x.chunks(BLOCK) {
        let mut sums = [R::ZERO; LANES];
        let chunks = block.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (lane, x) in chunk.iter().enumerate() {
                sums[lane] += *x;
                smallest[lane] = smaller(smallest[lane], *x);
                largest[lane] = larger(largest[lane], *x);
            }
        }
        for (lane, x) in rest.iter().enumerate() {
            sums[lane] += *x;
            smallest[lane] = smaller(smallest[lane], *x);
            largest[lane] = larger(largest[lane], *x);
        }
        totals.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }
    let mean = totals.into_iter().sum::<R>() / R::from_f64(x.len() as f64);
    let smallest = smallest.into_iter().fold(R::INFINITY, smaller);
    let largest = largest.into_iter().fold(R::NEG_INFINITY, larger);
    // A mean that is NaN stays so.
    smaller(larger(mean, smallest), largest)
}

/// The smaller of two, the first where one is NaN.
#[inline(always)]
fn smaller<R: Real>(a: R, b: R) -> R {
    if b < a { b } else { a }
}

/// The larger of two, the first where one is NaN.
#[inline(always)]
fn larger<R: Real>(a: R, b: R) -> R {
    if b > a { b } else { a }
}

/// The largest element; NaN is passed over.
#[inline(always)]
pub(crate) fn lane_max<R: Real>(x: &[R]) -> R {
    let mut lanes = [R::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *x);
        }
    }
    rest.iter().chain(&lanes).copied().fold(R::NEG_INFINITY, larger)
}
