use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::NAME;
use crate::check::rows_cols;
use crate::cpu::{Element, Real, filled, for_float_dtype, storage, vectorized};
use crate::input::Input;
use crate::mask::MaskArgs;

pub(super) fn fwd(mask: &MaskArgs, x: &Tensor) -> Result<Storage> {
    let (_, cols) = rows_cols(x.dims());
    let x = Input::new(NAME, x);
    for_float_dtype!(x, |E| {
        let x = x.slice::<E>()?;
        let part =
            |start: usize, y: &mut [_]| select_scaled(mask, start, cols, &x[start..][..y.len()], y);
        // SAFETY: `select_scaled` writes all of `y`.
        let y = unsafe { filled::<E>(x.len(), 8, part) };
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
