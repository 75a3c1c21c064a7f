use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use crate::check::rows_cols;
use crate::cpu::{Element, Real, filled, for_float_dtype, optional_slice, storage, vectorized};
use crate::input::Input;
use crate::mask::MaskArgs;

/// Of the shape and dtype of `like`, one of the two.
pub(super) fn fwd(
    op: &'static str,
    mask: &MaskArgs,
    scale: f64,
    like: &Tensor,
    a: Option<&Tensor>,
    b: Option<&Tensor>,
) -> Result<Storage> {
    let (rows, cols) = rows_cols(like.dims());
    let (a, b) = (Input::optional(op, a), Input::optional(op, b));
    let like = Input::new(op, like);
    for_float_dtype!(like, |E| {
        let (a, b) = (optional_slice::<E>(&a)?, optional_slice::<E>(&b)?);
        let part = |start: usize, y: &mut [_]| add_noise(mask, scale, start, cols, a, b, y);
        // SAFETY: `add_noise` writes all of `y`.
        let y = unsafe { filled::<E>(rows * cols, 8, part) };
        Ok(storage(y))
    })
}

vectorized! {
    /// The elements from `start` on of a tensor with `cols` columns.
    fn add_noise<E: Element>(
        mask: &MaskArgs,
        scale: f64,
        start: usize,
        cols: usize,
        a: Option<&[E]>,
        b: Option<&[E]>,
        y: &mut [MaybeUninit<E>],
    ) {
        let scale = E::Real::from_f64(scale);
        let mut runs = mask.normal_runs(start, y.len(), cols);
        while let Some((at, z)) = runs.next() {
            let (n, from) = (z.len(), start + at);
            let y = &mut y[at..][..n];
            // A loop for each form, since a branch inside one would keep it from vectorising.
            match (a, b) {
                (Some(a), Some(b)) => {
                    let (a, b) = (&a[from..][..n], &b[from..][..n]);
                    for i in 0..n {
                        let noise = b[i].load() * (E::Real::from_f32(z[i]) * scale);
                        y[i].write(E::store(a[i].load() + noise));
                    }
                }
                (Some(a), None) => {
                    let a = &a[from..][..n];
                    for i in 0..n {
                        y[i].write(E::store(a[i].load() + E::Real::from_f32(z[i]) * scale));
                    }
                }
                (None, b) => {
                    for i in 0..n {
                        let b = b.map_or(E::Real::ONE, |b| b[from + i].load());
                        y[i].write(E::store(b * (E::Real::from_f32(z[i]) * scale)));
                    }
                }
            }
        }
    }
}
