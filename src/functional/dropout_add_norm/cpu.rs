use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::NAME;
use crate::check::rows_cols;
use crate::cpu::{
    Element, Real, filled_pair, for_float_dtype, optional_slice, storage, vectorized,
};
use crate::functional::norm::Norm;
use crate::functional::norm::cpu::RowNorm;
use crate::input::Input;
use crate::mask::MaskArgs;

/// `z` and `n`.
pub(super) fn fwd(
    mask: &MaskArgs,
    x: &Tensor,
    residual: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &Norm,
) -> Result<[Storage; 2]> {
    let (_, cols) = rows_cols(x.dims());
    let (x, weight) = (Input::new(NAME, x), Input::new(NAME, norm.weight()));
    let [residual, bias, norm_bias] =
        [residual, bias, norm.bias()].map(|input| Input::optional(NAME, input));
    for_float_dtype!(x, |E| {
        let x = x.slice::<E>()?;
        let (residual, bias) = (optional_slice::<E>(&residual)?, optional_slice::<E>(&bias)?);
        let norm = RowNorm::<E>::new(norm.args(), &weight, &norm_bias)?;
        let part = |start: usize, z: &mut [_], n: &mut [_]| {
            let x = &x[start..][..z.len()];
            let residual = residual.map(|residual| &residual[start..][..z.len()]);
            rows_fwd(mask, &norm, start, cols, x, residual, bias, z, n)
        };
        // SAFETY: chunks are whole rows, and `rows_fwd` writes every row of `z` and `n`.
        let (z, n) = unsafe { filled_pair::<E>(x.len(), cols, part) };
        Ok([storage(z), storage(n)])
    })
}

vectorized! {
    /// The rows from element `start` on.
    fn rows_fwd<E: Element>(
        mask: &MaskArgs,
        norm: &RowNorm<'_, E>,
        start: usize,
        cols: usize,
        x: &[E],
        residual: Option<&[E]>,
        bias: Option<&[E]>,
        z: &mut [MaybeUninit<E>],
        n: &mut [MaybeUninit<E>],
    ) {
        let scale = E::Real::from_f32(mask.scale());
        let mut v = vec![E::Real::ZERO; cols];
        for (i, (z, n)) in z.chunks_exact_mut(cols).zip(n.chunks_exact_mut(cols)).enumerate() {
            // Step 1: the biased branch.
            let x = &x[i * cols..][..cols];
            match bias {
                Some(bias) => {
                    for ((v, x), bias) in v.iter_mut().zip(x).zip(bias) {
                        *v = x.load() + bias.load();
                    }
                }
                None => v.iter_mut().zip(x).for_each(|(v, x)| *v = x.load()),
            }
            // Step 2: its dropout, added to the stream and rounded as it is stored.
            let residual = residual.map(|residual| &residual[i * cols..][..cols]);
            let mut runs = mask.runs(start + i * cols, cols, cols);
            while let Some((at, _, draws)) = runs.next() {
                let run = v[at..].iter_mut().zip(draws).zip(&mut z[at..]);
                match residual {
                    Some(residual) => {
                        for (((v, draw), z), residual) in run.zip(&residual[at..]) {
                            let kept = E::store(residual.load() + *v * scale);
                            let stream = if mask.keeps(*draw) { kept } else { *residual };
                            z.write(stream);
                            *v = stream.load();
                        }
                    }
                    None => {
                        for ((v, draw), z) in run {
                            let kept = E::store(*v * scale);
                            let stream = if mask.keeps(*draw) { kept } else { E::ZERO };
                            z.write(stream);
                            *v = stream.load();
                        }
                    }
                }
            }
            // Step 3: statistics and norm.
            norm.norm_row(&mut v, n);
        }
    }
}
