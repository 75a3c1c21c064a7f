use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::NAME;
use crate::cpu::{Element, Real, filled, for_float_dtype, optional_slice, storage, vectorized};
use crate::input::Input;
use crate::mask::MaskArgs;

pub(super) fn fwd(
    mask: &MaskArgs,
    samples: usize,
    x: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Storage> {
    let keep = mask.keep(&[samples]);
    let (x, residual) = (Input::new(NAME, x), Input::optional(NAME, residual));
    for_float_dtype!(x, |E| {
        let (x, residual) = (x.slice::<E>()?, optional_slice::<E>(&residual)?);
        let sample_len = x.len() / samples.max(1);
        let part = |start: usize, y: &mut [MaybeUninit<E>]| {
            let mut at = start;
            while at < start + y.len() {
                let sample = at / sample_len;
                let end = ((sample + 1) * sample_len).min(start + y.len());
                let residual = residual.map(|residual| &residual[at..end]);
                let y = &mut y[at - start..end - start];
                add_branch(keep[sample] == 1, mask.scale(), &x[at..end], residual, y);
                at = end;
            }
        };
        // SAFETY: every part of the chunk lies in one sample and is written by `add_branch`.
        let y = unsafe { filled::<E>(x.len(), 8, part) };
        Ok(storage(y))
    })
}

vectorized! {
    /// A part of one sample: its residual alone if it is dropped.
    pub(in crate::functional) fn add_branch<E: Element>(
        keep: bool,
        scale: f32,
        x: &[E],
        residual: Option<&[E]>,
        y: &mut [MaybeUninit<E>],
    ) {
        let scale = E::Real::from_f32(scale);
        match (keep, residual) {
            (true, Some(residual)) => {
                for ((x, residual), y) in x.iter().zip(residual).zip(y) {
                    y.write(E::store(residual.load() + x.load() * scale));
                }
            }
            (true, None) => {
                for (x, y) in x.iter().zip(y) {
                    y.write(E::store(x.load() * scale));
                }
            }
            (false, Some(residual)) => {
                for (residual, y) in residual.iter().zip(y) {
                    y.write(*residual);
                }
            }
            (false, None) => {
                for y in y {
                    y.write(E::ZERO);
                }
            }
        }
    }
}
