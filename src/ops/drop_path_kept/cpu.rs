use candle_core::{CpuStorage, Layout, Result, Shape, Tensor, WithDType, bail};

use super::{NAME, NOWHERE};
use crate::claim::Input;
use crate::elem::{for_float_dtype, slice, storage};
use crate::ops::drop_path_add::cpu::add_branch;
use crate::parallel::filled;

/// An output of shape `shape`, whose sample n is `residual[n] + x[places[n]] * scale`.
pub(super) fn fwd(
    places: &Tensor,
    scale: f32,
    (x, layout): (&CpuStorage, &Layout),
    residual: Option<(&CpuStorage, &Layout)>,
    shape: &Shape,
) -> Result<CpuStorage> {
    let places = Input::new(places);
    let (places, places_layout) = places.cpu(NAME)?;
    let Some((first, end)) = places_layout.contiguous_offsets() else {
        bail!("{NAME}: places: expected a contiguous tensor; call contiguous() on it")
    };
    let places = &u32::cpu_storage_as_slice(places)?[first..end];
    let len = shape.elem_count();
    let size = len / places.len().max(1);
    for_float_dtype!(NAME, x, |E| {
        let x = slice::<E>(NAME, x, layout)?;
        let residual =
            residual.map(|(residual, layout)| slice::<E>(NAME, residual, layout)).transpose()?;
        // SAFETY: every part of the chunk lies in one sample and is written by `add_branch`.
        let y = unsafe {
            filled(len, 8, |start, y| {
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
            })
        };
        Ok(storage(y))
    })
}
