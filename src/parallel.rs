//! How CPU kernels spread over cores: chunks of whole units, each written by one thread, so that no
//! result depends on the number of threads.

use std::mem::MaybeUninit;

use rayon::prelude::*;

/// Elements below which a second thread costs more than it saves.
const MIN_ELEMENTS: usize = 1 << 14;

/// A new vector of `len` elements, filled by `f(start, chunk)` over chunks of whole multiples of
/// `unit` elements, in parallel if there are many.
///
/// Its memory is allocated once and touched first by the thread that writes it: for large tensors the
/// page faults cost more than the arithmetic.
///
/// # Safety
/// `f` writes every element of the chunk that it is given.
pub(crate) unsafe fn filled<E: Send>(
    len: usize,
    unit: usize,
    f: impl Fn(usize, &mut [MaybeUninit<E>]) + Sync,
) -> Vec<E> {
    if len == 0 {
        return Vec::new(); // the unit of an empty tensor may be 0
    }
    let mut out = Vec::with_capacity(len);
    let spare = &mut out.spare_capacity_mut()[..len];
    if len <= MIN_ELEMENTS {
        f(0, spare);
    } else {
        let chunk = MIN_ELEMENTS.next_multiple_of(unit);
        spare.par_chunks_mut(chunk).enumerate().for_each(|(i, out)| f(i * chunk, out));
    }
    // SAFETY: the chunks cover `..len`, and `f` has written all of each.
    unsafe { out.set_len(len) };
    out
}
