use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::NAME;
use crate::check::rows_cols;
use crate::cpu::{Element, Real, filled, for_float_dtype, optional_slice, storage, vectorized};
use crate::input::Input;
use crate::mask::MaskArgs;

pub(super) fn fwd(
    mask: &MaskArgs,
    x: &Tensor,
    residual: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Storage> {
    let (_, cols) = rows_cols(x.dims());
    let (x, residual) = (Input::new(NAME, x), Input::new(NAME, residual));
    let bias = Input::optional(NAME, bias);
    for_float_dtype!(x, |E| {
        let (x, residual) = (x.slice::<E>()?, residual.slice::<E>()?);
        let bias = optional_slice::<E>(&bias)?;
        let part = |start: usize, y: &mut [_]| {
            let (x, residual) = (&x[start..][..y.len()], &residual[start..][..y.len()]);
            add_selected(mask, start, cols, x, residual, bias, y)
        };
        // SAFETY: `add_selected` writes all of `y`.
        let y = unsafe { filled::<E>(x.len(), 8, part) };
        Ok(storage(y))
    })
}

vectorized! {
    /// The elements from `start` on of a tensor with `cols` columns.
    fn add_selected<E: Element>(
        mask: &MaskArgs,
        start: usize,
        cols: usize,
        x: &[E],
        residual: &[E],
        bias: Option<&[E]>,
        y: &mut [MaybeUninit<E>],
    ) {
        let scale = E::Real::from_f32(mask.scale());
        let mut runs = mask.runs(start, x.len(), cols);
        while let Some((at, col, draws)) = runs.next() {
            let n = draws.len();
            let (x, residual, y) = (&x[at..][..n], &residual[at..][..n], &mut y[at..][..n]);
            // Two loops, since a branch on the bias inside one would keep it from vectorising.
            if let Some(bias) = bias {
                let bias = &bias[col..][..n];
                for i in 0..n {
                    let kept = residual[i].load() + (x[i].load() + bias[i].load()) * scale;
                    y[i].write(if mask.keeps(draws[i]) { E::store(kept) } else { residual[i] });
                }
            } else {
                for i in 0..n {
                    let kept = residual[i].load() + x[i].load() * scale;
                    y[i].write(if mask.keeps(draws[i]) { E::store(kept) } else { residual[i] });
                }
            }
        }
    }
}
