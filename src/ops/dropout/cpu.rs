use std::mem::MaybeUninit;

use candle_core::{CpuStorage, Layout, Result};

use super::NAME;
use crate::elem::{Element, Real, for_float_dtype, rows_cols, slice, storage};
use crate::mask::MaskArgs;
use crate::parallel::filled;
use crate::simd::vectorized;

pub(super) fn fwd(mask: &MaskArgs, x: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
    let (_, cols) = rows_cols(layout.dims());
    for_float_dtype!(NAME, x, |E| {
        let x = slice::<E>(NAME, x, layout)?;
        // SAFETY: `select_scaled` writes all of `y`.
        let y = unsafe {
            filled(x.len(), 8, |start, y| {
                select_scaled(mask, start, cols, &x[start..][..y.len()], y)
            })
        };
        Ok(storage(y))
    })
}

vectorized! {
    /// The elements from `start` on of a tensor with `cols` columns.
    fn select_scaled<E: Element>(
        mask: &MaskArgs,
        start: usize,
        cols: usize,
        x: &[E],
        y: &mut [MaybeUninit<E>],
    ) {
        let scale = E::Real::from_f32(mask.scale());
        let mut runs = mask.runs(start, x.len(), cols);
        while let Some((at, _, draws)) = runs.next() {
            for ((x, draw), y) in x[at..].iter().zip(draws).zip(&mut y[at..]) {
                let kept = E::store(x.load() * scale);
                y.write(if mask.keeps(*draw) { kept } else { E::ZERO });
            }
        }
    }
}
