//! A stripe of queries against all keys, block by block, with running sums.

use super::heads::{Head, Heads, Output};
use super::tile::{Tile, Widened, transpose};
use super::{KEYS, QUERIES};
use super::{hide_dropped, logits};
use crate::cpu::{Element, Real, lane_max, slice_sum, vectorized};
use crate::mask::NO_DRAWS;

/// What a task of the forward pass holds.
pub(super) struct Forward<R> {
    pub(super) q: Widened<R>,
    /// A block of keys, transposed.
    pub(super) keys: Vec<R>,
    pub(super) values: Widened<R>,
    pub(super) scores: Vec<R>,
    pub(super) o: Vec<R>,
    pub(super) max: Vec<R>,
    pub(super) sum: Vec<R>,
}

impl<R: Real> Forward<R> {
    pub(super) fn new<E: Element<Real = R>>(heads: &Heads<'_, E>, stripe: usize) -> Self {
        let (keys, queries) = heads.tile_rows();
        Self {
            q: Widened::zeros(stripe, heads.width),
            keys: vec![R::ZERO; keys * heads.head_size],
            values: Widened::zeros(keys, heads.width),
            scores: vec![R::ZERO; queries * KEYS],
            o: vec![R::ZERO; stripe * heads.width],
            max: vec![R::ZERO; stripe],
            sum: vec![R::ZERO; stripe],
        }
    }

    /// Writes the rows of `o` from `start` to `end`, and returns of each what its softmax is made with.
    pub(super) fn run<E: Element<Real = R>>(
        &mut self,
        heads: &Heads<'_, E>,
        head: &Head<R>,
        start: usize,
        end: usize,
        o: &Output<'_, E>,
    ) -> Vec<R> {
        let (width, kv_head) = (heads.width, (head.batch, head.kv_head));
        self.q.load(&heads.q, (head.batch, head.head), (start, end), heads.scale);
        self.o.fill(R::ZERO);
        self.max.fill(R::NEG_INFINITY);
        self.sum.fill(R::ZERO);
        let seen = heads.seen(head, (start, end - 1), (0, head.keys)).unwrap_or((0, 0));
        for block in (seen.0 / KEYS * KEYS..seen.1).step_by(KEYS) {
            let keys = (block, seen.1.min(block + KEYS));
            transpose(&heads.k, kv_head.0, kv_head.1, keys.0, keys.1, &mut self.keys);
            self.values.load(&heads.v, kv_head, keys, R::ONE);
            for query in (start..end).step_by(QUERIES) {
                let queries = QUERIES.min(end - query);
                let Some((begin, end)) = heads.seen(head, (query, query + queries - 1), keys)
                else {
                    continue;
                };
                let tile = Tile { query, queries, block, begin, end };
                let (q, row) = (&self.q.elements[(query - start) * width..], query - start);
                tile.scores(q, width, &self.keys, heads.head_size, &mut self.scores);
                let o = &mut self.o[row * width..];
                let (max, sum) = (&mut self.max[row..], &mut self.sum[row..]);
                weigh(heads, head, tile, &mut self.scores, max, sum, o);
                tile.over_keys(&self.scores, &self.values, o);
            }
        }
        let rows = self.o.chunks_exact(width).zip(self.max.iter().zip(&self.sum));
        rows.zip(start..end)
            .map(|((row, (max, sum)), query)| {
                // SAFETY: the task of this head and stripe alone writes this row.
                unsafe { finish(heads, head, query, row, (*max, *sum), o) }
            })
            .collect::<Vec<_>>()
            .concat()
    }
}

/// Writes a row of `o`, and gives what its softmax is made with.
///
/// # Safety
/// No other task writes this row at the same time.
pub(super) unsafe fn finish<E: Element>(
    heads: &Heads<'_, E>,
    head: &Head<E::Real>,
    query: usize,
    row: &[E::Real],
    (max, sum): (E::Real, E::Real),
    o: &Output<'_, E>,
) -> [E::Real; 2] {
    let blind = sum == E::Real::ZERO;
    let normaliser = if blind { E::Real::ZERO } else { sum.recip() };
    let factor = heads.drop_scale * normaliser;
    // SAFETY: the caller's.
    unsafe { o.write((head.batch, head.head, query), row, factor) };
    [if blind { E::Real::INFINITY } else { max }, normaliser]
}

vectorized! {
    /// Turns the scores of a tile into `exp(t - max)` where they are kept and 0 elsewhere, and brings
    /// `max`, `sum` and `o` up to date.
    pub(super) fn weigh<E: Element>(
        heads: &Heads<'_, E>,
        head: &Head<E::Real>,
        tile: Tile,
        scores: &mut [E::Real],
        max: &mut [E::Real],
        sum: &mut [E::Real],
        o: &mut [E::Real],
    ) {
        let (from, to) = tile.columns::<E::Real>();
        let mut buffer = NO_DRAWS;
        let rows = scores.chunks_exact_mut(KEYS).zip(o.chunks_exact_mut(heads.width));
        for (((scores, o), (max, sum)), i) in
            rows.zip(max.iter_mut().zip(sum)).zip(0..tile.queries)
        {
            let query = tile.query + i;
            let (begin, end) = tile.seen(heads.args, query, head.keys);
            scores[from..begin].fill(E::Real::ZERO);
            scores[end..to].fill(E::Real::ZERO);
            if begin == end {
                continue;
            }
            let (row, col) = (head.mask_row + query, tile.block + from);
            let draws = heads.drop.draws(row, col, to - from, &mut buffer);
            let seen = &mut scores[begin..end];
            logits(heads, head, query, tile.block + begin, seen, None);
            if heads.args.drops_keys() {
                hide_dropped(heads, &draws[begin - from..], seen);
            }
            let largest = lane_max(seen);
            if largest > *max {
                let shrink = (*max - largest).exp_of_nonpositive();
                *max = largest;
                *sum = *sum * shrink;
                for o in o.iter_mut() {
                    *o = *o * shrink;
                }
            }
            // With every score at -inf, 0 stands in for the maximum.
            let max = if *max == E::Real::NEG_INFINITY { E::Real::ZERO } else { *max };
            for t in seen.iter_mut() {
                *t = (*t - max).exp_of_nonpositive();
            }
            *sum += slice_sum(seen, |p| p);
            if !heads.drop.keeps_all() {
                for (p, draw) in scores[from..to].iter_mut().zip(draws) {
                    *p = if heads.drop.keeps(*draw) { *p } else { E::Real::ZERO };
                }
            }
        }
    }
}
