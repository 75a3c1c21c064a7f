//! Products of whole matrices, by the crate that candle takes for them, too.
//!
//! Candle's own zeroes an output that is then overwritten, in pages of 4 kB. Of a product of 4,096 rows with a weight of
//! 128 columns that is a tenth to a quarter, of one with thousands a twentieth; see `benches/NOTES.md`.

use candle_core::backend::BackendStorage;
use candle_core::utils::{has_accelerate, has_mkl};
use candle_core::{CpuStorage, DType, Result, bail};
use gemm::Parallelism;
use half::f16;
use rayon::prelude::*;

use super::element::Element;
use super::filled::{Scattered, scattered};
use super::real::Real;
use crate::input::Input;

/// Sums over twice as many products or more are taken in equal parts of at least so many, whose sums are then added.
///
/// The gradient of a weight sums over all tokens and has few elements: threads that share out these pack the same
/// tokens again, threads that share out tokens do not.
const PART: usize = 2048;

/// Elements of a result up to which it may be held several times.
const MAX_OF_PARTS: usize = 1 << 18;

/// `a b` of two matrices, each contiguous or the transpose of one that is.
///
/// Work is shared out by rows and columns of the result and by parts of a fixed size, never by the number of threads:
/// that changes no bit.
pub(crate) fn matmul(a: &Input<'_>, b: &Input<'_>) -> Result<CpuStorage> {
    let (rows, inner) = a.layout().shape().dims2()?;
    let (_, cols) = b.layout().shape().dims2()?;
    // A program that has given candle a library means all products; bf16 `gemm` does not know.
    let is_candles = has_mkl() || has_accelerate();
    match a.dtype() {
        DType::F32 if !is_candles => multiplied::<f32>(a, b, [rows, inner, cols]),
        DType::F64 if !is_candles => multiplied::<f64>(a, b, [rows, inner, cols]),
        DType::F16 if !is_candles => multiplied::<f16>(a, b, [rows, inner, cols]),
        _ => a.cpu()?.matmul(b.cpu()?, (1, rows, cols, inner), a.layout(), b.layout()),
    }
}

/// A matrix from its first element on.
#[derive(Clone, Copy)]
struct Matrix<'a, E> {
    elements: &'a [E],
    /// From row to row, and from column to column.
    strides: [usize; 2],
}

impl<'a, E: Element> Matrix<'a, E> {
    fn new(x: &'a Input<'_>, dims: [usize; 2]) -> Result<Self> {
        let elements = x.strided_slice::<E>()?;
        let &[row, col] = x.layout().stride() else {
            bail!("{}: expected a matrix, got {:?}", x.op(), x.layout())
        };
        let last: usize = [row, col].iter().zip(dims).map(|(stride, dim)| stride * (dim - 1)).sum();
        assert!(last < elements.len(), "a layout lies in its storage");
        Ok(Self { elements, strides: [row, col] })
    }

    /// The part that begins at a row or a column.
    fn from(self, at: [usize; 2]) -> Self {
        let start = at[0] * self.strides[0] + at[1] * self.strides[1];
        Self { elements: &self.elements[start..], ..self }
    }
}

fn multiplied<E: Element>(
    a: &Input<'_>,
    b: &Input<'_>,
    [rows, inner, cols]: [usize; 3],
) -> Result<CpuStorage> {
    let (a, b) = (Matrix::<E>::new(a, [rows, inner])?, Matrix::<E>::new(b, [inner, cols])?);
    let len = rows * cols;
    // Halves would be rounded between parts.
    let is_wide = size_of::<E>() == size_of::<E::Real>();
    let parts = if is_wide && len <= MAX_OF_PARTS { (inner / PART).max(1) } else { 1 };
    let part = inner.div_ceil(parts);
    let threads = (rayon::current_num_threads() / parts).max(1);
    let product = |[out]: &[Scattered<E>; 1]| {
        (0..parts).into_par_iter().with_max_len(1).for_each(|i| {
            // SAFETY: each part of the output is that of one `i`.
            let out = unsafe { out.part(i * len, len) };
            let inner = part.min(inner - i * part);
            let (a, b) = (a.from([0, i * part]), b.from([i * part, 0]));
            let [a_strides, b_strides] = [a, b].map(|x| x.strides.map(|stride| stride as isize));
            let parallelism =
                if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
            // SAFETY: `rows` x `cols` elements lie in `out`, row by row, and `Matrix::new` has seen that the others lie
            // in `a` and `b`. Nothing is read of `out`.
            unsafe {
                gemm::gemm(
                    rows,
                    cols,
                    inner,
                    out.as_mut_ptr().cast::<E>(),
                    1,
                    cols as isize,
                    false,
                    a.elements.as_ptr(),
                    a_strides[1],
                    a_strides[0],
                    b.elements.as_ptr(),
                    b_strides[1],
                    b_strides[0],
                    E::ZERO,
                    E::store(E::Real::from_f64(1.)),
                    false,
                    false,
                    false,
                    parallelism,
                )
            };
        });
    };
    // SAFETY: a product writes all of its part, and there are `parts` of them.
    let ([mut out], ()) = unsafe { scattered([parts * len], product) };
    if parts > 1 {
        let (sum, others) = out.split_at_mut(len);
        for part in others.chunks_exact(len) {
            for (sum, x) in sum.iter_mut().zip(part) {
                *sum = E::store(sum.load() + x.load());
            }
        }
        out.truncate(len);
        out.shrink_to_fit();
    }
    Ok(E::to_cpu_storage_owned(out))
}
