use candle_core::{CpuStorage, Result, Storage, Tensor, WithDType};
use rayon::prelude::*;

use super::NAME;
use crate::cpu::{Element, for_float_dtype, matmul, storage, vectorized};
use crate::input::Input;

/// From a matrix x.
pub(super) fn fwd(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Storage> {
    let y = matmul(&Input::new(NAME, x), &Input::new(NAME, weight))?;
    match bias {
        Some(bias) => add_bias(y, Input::new(NAME, bias)),
        None => Ok(Storage::Cpu(y)),
    }
}

/// Adds `bias` to every row of a product, where it lies.
fn add_bias(y: CpuStorage, bias: Input<'_>) -> Result<Storage> {
    /// Elements that a thread takes at a time.
    const CHUNK: usize = 1 << 14;
    for_float_dtype!(bias, |E| {
        let bias = bias.slice::<E>()?;
        let mut y = E::cpu_storage_data(y)?;
        // An empty bias has an empty y, of which there are no chunks.
        let rows = CHUNK.next_multiple_of(bias.len().max(1));
        y.par_chunks_mut(rows).for_each(|y| add_to_rows(bias, y));
        Ok(storage(y))
    })
}

vectorized! {
    fn add_to_rows<E: Element>(bias: &[E], y: &mut [E]) {
        for row in y.chunks_exact_mut(bias.len()) {
            for (y, bias) in row.iter_mut().zip(bias) {
                *y = E::store(y.load() + bias.load());
            }
        }
    }
}
