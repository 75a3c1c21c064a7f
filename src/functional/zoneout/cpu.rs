use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::NAME;
use crate::check::rows_cols;
use crate::cpu::{Element, filled, filled_pair, for_float_dtype, storage, vectorized};
use crate::input::Input;
use crate::mask::MaskArgs;

pub(super) fn fwd(mask: &MaskArgs, new: &Tensor, old: &Tensor) -> Result<Storage> {
    let (_, cols) = rows_cols(new.dims());
    let [new, old] = [new, old].map(|x| Input::new(NAME, x));
    for_float_dtype!(new, |E| {
        let (new, old) = (new.slice::<E>()?, old.slice::<E>()?);
        let part = |start: usize, y: &mut [_]| {
            let (new, old) = (&new[start..][..y.len()], &old[start..][..y.len()]);
            select(mask, start, cols, new, old, y)
        };
        // SAFETY: `select` writes all of `y`.
        let y = unsafe { filled::<E>(new.len(), 8, part) };
        Ok(storage(y))
    })
}

/// The gradients of `new` and of `old`.
pub(super) fn bwd(mask: &MaskArgs, dy: &Tensor) -> Result<[Storage; 2]> {
    let (_, cols) = rows_cols(dy.dims());
    let dy = Input::new(NAME, dy);
    for_float_dtype!(dy, |E| {
        let dy = dy.slice::<E>()?;
        let part = |start: usize, dnew: &mut [_], dold: &mut [_]| {
            split(mask, start, cols, &dy[start..][..dnew.len()], dnew, dold)
        };
        // SAFETY: `split` writes all of both.
        let (dnew, dold) = unsafe { filled_pair::<E>(dy.len(), 8, part) };
        Ok([storage(dnew), storage(dold)])
    })
}

vectorized! {
    /// The elements from `start` on of tensors with `cols` columns.
    fn select<E: Element>(
        mask: &MaskArgs,
        start: usize,
        cols: usize,
        new: &[E],
        old: &[E],
        y: &mut [MaybeUninit<E>],
    ) {
        let mut runs = mask.runs(start, new.len(), cols);
        while let Some((at, _, draws)) = runs.next() {
            let n = draws.len();
            let (new, old, y) = (&new[at..][..n], &old[at..][..n], &mut y[at..][..n]);
            for i in 0..n {
                y[i].write(if mask.keeps(draws[i]) { new[i] } else { old[i] });
            }
        }
    }
}

vectorized! {
    /// The same of the gradients.
    fn split<E: Element>(
        mask: &MaskArgs,
        start: usize,
        cols: usize,
        dy: &[E],
        dnew: &mut [MaybeUninit<E>],
        dold: &mut [MaybeUninit<E>],
    ) {
        let mut runs = mask.runs(start, dy.len(), cols);
        while let Some((at, _, draws)) = runs.next() {
            let n = draws.len();
            let (dy, dnew, dold) = (&dy[at..][..n], &mut dnew[at..][..n], &mut dold[at..][..n]);
            for i in 0..n {
                let keep = mask.keeps(draws[i]);
                dnew[i].write(if keep { dy[i] } else { E::ZERO });
                dold[i].write(if keep { E::ZERO } else { dy[i] });
            }
        }
    }
}
