//! How a function of `nn` is compared with candle's operations.

use candle_core::{DType, Result, Tensor};
use cases::runner::{Given, run};
use cases::{DTYPES, View, epsilon, error, largest, random};

pub type Call<'a> = dyn Fn(&[Tensor]) -> Result<Tensor> + 'a;

pub const VIEWS: [View; 5] =
    [View::Contiguous, View::Transposed, View::RowsBeforeHeads, View::Offset, View::Inset];

/// Output and gradients of `ours` are as near to those of `candles` in f64 as those of `candles` in the dtype are,
/// twice over, which may be near by chance, or a rounding more; a sum over `terms` adds a rounding a term.
pub fn agrees(
    what: &str,
    dims: &[Vec<usize>],
    (view, dtype): (View, DType),
    terms: usize,
    ours: &Call,
    candles: &Call,
) -> Result<()> {
    let what = format!("{what} of {dims:?}, {view:?}, {dtype:?}");
    let bases =
        dims.iter().enumerate().map(|(at, dims)| random(&view.base(dims), dtype, at as u64));
    let bases = bases.collect::<Result<Vec<_>>>()?;
    let wide = bases.iter().map(|x| x.to_dtype(DType::F64)).collect::<Result<Vec<_>>>()?;
    let plain = dims.iter().zip(&bases).map(|(dims, base)| view.of(base, dims));
    let plain = plain.collect::<Result<Vec<_>>>()?;
    let (y, expected) = (ours(&plain)?, candles(&plain)?);
    assert_eq!((y.dims(), y.dtype()), (expected.dims(), expected.dtype()), "{what}");
    assert!(y.is_contiguous(), "{what}: as candle's kernels, and its slice_set, want it");
    let dy = random(y.dims(), dtype, 9)?;
    let given = Given { dims, view, times: 2. };
    let (exact, _) = run(candles, &wide, given, &dy.to_dtype(DType::F64)?)?;
    let (candles, _) = run(candles, &bases, given, &dy)?;
    let (ours, _) = run(ours, &bases, given, &dy)?;
    for (at, exact) in exact.iter().enumerate() {
        let (off, their) = (error(&ours[at], exact)?, error(&candles[at], exact)?);
        let rounding = epsilon(dtype) * largest(exact)?.max(1.) * terms as f64;
        assert!(
            off <= 2. * their + rounding,
            "{what}: result {at} is off by {off:e}, candle's by {their:e}"
        );
    }
    Ok(())
}

/// The same for every dtype, and every view of arguments that have the same shape in all of them.
pub fn agrees_in_all(
    what: &str,
    dims: &[Vec<usize>],
    terms: usize,
    ours: &Call,
    candles: &Call,
) -> Result<()> {
    for dtype in DTYPES {
        for view in VIEWS {
            agrees(what, dims, (view, dtype), terms, ours, candles)?;
        }
    }
    Ok(())
}
