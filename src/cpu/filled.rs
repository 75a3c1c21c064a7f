//! Outputs, and how passes spread over cores: chunks of whole units, each written by one thread, so that no
//! result depends on the number of threads.
//!
//! An output is not zeroed first. A build with the cfg `poison_outputs` (the variable
//! `CANDLE_DROPOUT_POISON_OUTPUTS` sets it) fills it with NaN instead, so that what a pass fails to write
//! shows in any test.

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
    // SAFETY: the caller's.
    unsafe { filled_with(len, unit, f) }.0
}

/// [`filled`], and what `f` returned for each chunk, in order.
///
/// # Safety
/// `f` writes every element of the chunk that it is given.
pub(crate) unsafe fn filled_with<E: Send, R: Send>(
    len: usize,
    unit: usize,
    f: impl Fn(usize, &mut [MaybeUninit<E>]) -> R + Sync,
) -> (Vec<E>, Vec<R>) {
    if len == 0 {
        return (Vec::new(), Vec::new()); // the unit of an empty tensor may be 0
    }
    let mut out = Vec::with_capacity(len);
    let spare = room(&mut out, len);
    let results = if len <= MIN_ELEMENTS {
        vec![f(0, spare)]
    } else {
        let chunk = chunk_of(unit);
        let chunks = spare.par_chunks_mut(chunk).enumerate();
        chunks.map(|(i, out)| f(i * chunk, out)).collect()
    };
    // SAFETY: the chunks cover `..len`, and `f` has written all of each.
    unsafe { out.set_len(len) };
    (out, results)
}

/// Two vectors of one length, filled together as by [`filled`].
///
/// # Safety
/// `f` writes every element of both chunks that it is given.
pub(crate) unsafe fn filled_pair<E: Send>(
    len: usize,
    unit: usize,
    f: impl Fn(usize, &mut [MaybeUninit<E>], &mut [MaybeUninit<E>]) + Sync,
) -> (Vec<E>, Vec<E>) {
    if len == 0 {
        return (Vec::new(), Vec::new());
    }
    let (mut first, mut second) = (Vec::with_capacity(len), Vec::with_capacity(len));
    let spare = (room(&mut first, len), room(&mut second, len));
    if len <= MIN_ELEMENTS {
        f(0, spare.0, spare.1);
    } else {
        let chunk = chunk_of(unit);
        let chunks = spare.0.par_chunks_mut(chunk).zip(spare.1.par_chunks_mut(chunk));
        chunks.enumerate().for_each(|(i, (first, second))| f(i * chunk, first, second));
    }
    // SAFETY: the chunks cover `..len`, and `f` has written all of each.
    unsafe { first.set_len(len) };
    // SAFETY: as above.
    unsafe { second.set_len(len) };
    (first, second)
}

/// `f(state, task)` for each task, in parallel if that is worth while; the results in the order of the
/// tasks. A state serves many tasks, one after the other.
pub(crate) fn map_tasks<S, R: Send>(
    (tasks, in_parallel): (usize, bool),
    state: impl Fn() -> S + Sync + Send,
    f: impl Fn(&mut S, usize) -> R + Sync + Send,
) -> Vec<R> {
    if tasks <= 1 || !in_parallel {
        let mut state = state();
        return (0..tasks).map(|task| f(&mut state, task)).collect();
    }
    (0..tasks).into_par_iter().with_max_len(1).map_init(state, f).collect()
}

/// Memory of which several tasks fill their own parts.
pub(crate) struct Scattered<E> {
    start: *mut MaybeUninit<E>,
    len: usize,
}

// SAFETY: a shared reference gives access through `part` alone, whose caller rules out overlaps.
unsafe impl<E: Send> Sync for Scattered<E> {}

impl<E> Scattered<E> {
    /// The `len` elements from `start` on.
    ///
    /// # Safety
    /// No other part that is alive overlaps this one.
    #[expect(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [MaybeUninit<E>] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: within the allocation, which `scattered` keeps; the caller rules out overlaps.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

/// New vectors of the given lengths, filled by `f` in parts of any order, and what it returned.
///
/// # Safety
/// `f` writes every element of each.
pub(crate) unsafe fn scattered<E: Send, R, const N: usize>(
    lens: [usize; N],
    f: impl FnOnce(&[Scattered<E>; N]) -> R,
) -> ([Vec<E>; N], R) {
    let mut vectors = lens.map(Vec::with_capacity);
    let parts = std::array::from_fn(|i| Scattered {
        start: room(&mut vectors[i], lens[i]).as_mut_ptr(),
        len: lens[i],
    });
    let result = f(&parts);
    for (vector, len) in vectors.iter_mut().zip(lens) {
        // SAFETY: `f` has written all of it.
        unsafe { vector.set_len(len) };
    }
    (vectors, result)
}

/// A new vector with one entry for each of `rows` rows of `cols` elements, filled by `f(start, chunk)`
/// over chunks of rows, in parallel if there are many elements.
///
/// # Safety
/// `f` writes every entry of the chunk that it is given.
pub(crate) unsafe fn filled_per_row<T: Send>(
    rows: usize,
    cols: usize,
    f: impl Fn(usize, &mut [MaybeUninit<T>]) + Sync,
) -> Vec<T> {
    if rows == 0 {
        return Vec::new(); // rows that do not exist may have no columns either
    }
    let mut out = Vec::with_capacity(rows);
    let spare = room(&mut out, rows);
    if rows.saturating_mul(cols) <= MIN_ELEMENTS {
        f(0, spare);
    } else {
        let chunk = (MIN_ELEMENTS / cols.max(1)).max(1);
        let chunks = spare.par_chunks_mut(chunk).enumerate();
        chunks.for_each(|(i, out)| f(i * chunk, out));
    }
    // SAFETY: the chunks cover `..rows`, and `f` has written all of each.
    unsafe { out.set_len(rows) };
    out
}

/// The capacity for `len` elements of an empty vector.
fn room<E>(out: &mut Vec<E>, len: usize) -> &mut [MaybeUninit<E>] {
    let room = &mut out.spare_capacity_mut()[..len];
    #[cfg(target_os = "linux")]
    ask_for_huge_pages(room);
    #[cfg(poison_outputs)]
    poison(room);
    room
}

/// Sets every bit, which is NaN in every dtype.
#[cfg(poison_outputs)]
fn poison<E>(memory: &mut [MaybeUninit<E>]) {
    // SAFETY: so many elements lie there, and what is not initialised may have any bytes.
    unsafe { memory.as_mut_ptr().write_bytes(0xff, memory.len()) };
}

/// Elements a thread takes at a time.
fn chunk_of(unit: usize) -> usize {
    MIN_ELEMENTS.next_multiple_of(unit)
}

/// Asks for memory in pages of 2 MB, which take one fault where pages of 4 KB take 512.
#[cfg(target_os = "linux")]
fn ask_for_huge_pages<E>(memory: &mut [MaybeUninit<E>]) {
    const PAGE: usize = 1 << 21;
    let bytes = memory.as_mut_ptr_range();
    let (start, end) = (bytes.start.addr().next_multiple_of(PAGE), bytes.end.addr() & !(PAGE - 1));
    if start < end {
        // SAFETY: whole pages that lie within `memory`, whose contents the advice leaves alone; it is
        // a hint, so a refusal is no error.
        unsafe {
            libc::madvise(bytes.start.with_addr(start).cast(), end - start, libc::MADV_HUGEPAGE)
        };
    }
}

#[cfg(all(test, poison_outputs))]
mod tests {
    use super::*;

    /// A slice that is shorter than the output by an element.
    const SHORT: [f32; 6] = [1.; 6];

    fn fill_in_part(out: &mut [MaybeUninit<f32>]) {
        out.iter_mut().zip(SHORT).for_each(|(out, x)| {
            out.write(x);
        });
    }

    #[track_caller]
    fn assert_last_is_nan(out: &[f32]) {
        assert!(out.len() == 7 && out[..6] == SHORT && out[6].is_nan(), "{out:?}");
    }

    #[test]
    fn what_is_not_written_is_nan() {
        // SAFETY: the last element is initialised by the poison, if by nothing else.
        let out = unsafe { filled(7, 1, |_, out| fill_in_part(out)) };
        assert_last_is_nan(&out);
        // SAFETY: as above.
        let (out, _) = unsafe { filled_with(7, 1, |_, out| fill_in_part(out)) };
        assert_last_is_nan(&out);
        let both = |_: usize, first: &mut [_], second: &mut [_]| {
            fill_in_part(first);
            fill_in_part(second);
        };
        // SAFETY: as above.
        let (first, second) = unsafe { filled_pair(7, 1, both) };
        assert_last_is_nan(&first);
        assert_last_is_nan(&second);
        // SAFETY: as above.
        let out = unsafe { filled_per_row(7, 1, |_, out| fill_in_part(out)) };
        assert_last_is_nan(&out);
        // SAFETY: no other part is alive.
        let part = |[out]: &[Scattered<f32>; 1]| fill_in_part(unsafe { out.part(0, 7) });
        // SAFETY: as above.
        let ([out], ()) = unsafe { scattered([7], part) };
        assert_last_is_nan(&out);
    }
}
