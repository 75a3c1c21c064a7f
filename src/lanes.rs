//! Sums and maxima over a row, taken in a fixed number of lanes whatever the register width, so that
//! every instruction set gives the same bits.

use crate::elem::Real;

const LANES: usize = 16;

/// `Σ term(j)` over `0..len`.
#[inline(always)]
pub(crate) fn lane_sum<R: Real>(len: usize, term: impl Fn(usize) -> R) -> R {
    let mut lanes = [R::ZERO; LANES];
    let whole = len / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    for j in whole..len {
        lanes[j - whole] += term(j);
    }
    lanes.into_iter().sum()
}

/// The largest element; NaN is passed over.
#[inline(always)]
pub(crate) fn lane_max<R: Real>(x: &[R]) -> R {
    let max = |a: R, b: R| if b > a { b } else { a };
    let mut lanes = [R::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = max(*lane, *x);
        }
    }
    rest.iter().chain(&lanes).fold(R::NEG_INFINITY, |a, b| max(a, *b))
}
