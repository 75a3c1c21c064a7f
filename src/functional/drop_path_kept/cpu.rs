use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::{NAME, NOWHERE};
use crate::cpu::{filled, for_float_dtype, optional_slice, storage};
use crate::functional::drop_path_add::cpu::add_branch;
use crate::input::Input;

/// An output of `len` elements, whose sample n is `residual[n] + x[places[n]] * scale`.
pub(super) fn fwd(
    places: &Tensor,
    scale: f32,
    x: &Tensor,
    residual: Option<&Tensor>,
    len: usize,
) -> Result<Storage> {
    let (places, x) = (Input::new(NAME, places), Input::new(NAME, x));
    let (places, residual) = (places.slice::<u32>()?, Input::optional(NAME, residual));
    let size = len / places.len().max(1);
    for_float_dtype!(x, |E| {
        let (x, residual) = (x.slice::<E>()?, optional_slice::<E>(&residual)?);
        let part = |start: usize, y: &mut [MaybeUninit<E>]| {
            let mut at = start;
            while at < start + y.len() {
                let sample = at / size;
                let end = ((sample + 1) * size).min(start + y.len());
                let keep = places[sample] != NOWHERE;
                let from = if keep { places[sample] as usize * size + at % size } else { 0 };
                let x = if keep { &x[from..][..end - at] } else { &[] };
                let residual = residual.map(|residual| &residual[at..end]);
                add_branch(keep, scale, x, residual, &mut y[at - start..end - start]);
                at = end;
            }
        };
        // SAFETY: every part of the chunk lies in one sample and is written by `add_branch`.
        let y = unsafe { filled::<E>(len, 8, part) };
        Ok(storage(y))
    })
}
