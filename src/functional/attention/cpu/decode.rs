//! A few queries, as many as a text that is generated has at a time, against all keys: read once, as they lie.
//!
//! A block of keys is transposed for many queries. For a few of them that would cost more than their scores, and
//! once for each head of a group; so scores are sums over rows here, and all heads of a group meet a block together.

use super::forward::{finish, weigh};
use super::heads::{Head, Heads, Output, Rows};
use super::tile::{Tile, Widened};
use super::{KEYS, TASKS};
use crate::cpu::{Element, Real, map_tasks, slices_sum, vectorized};

/// Queries from which on tiles are taken: as many as share a block of registers there. Not measured between.
pub(super) const QUERIES: usize = 8;

/// Keys below which another task does not pay.
const MIN_KEYS: usize = 4 * KEYS;

/// What a row has come to over some of its keys.
struct Sums<R> {
    max: Vec<R>,
    sum: Vec<R>,
    o: Vec<R>,
}

/// Writes `o`, and returns of each row what its softmax is made with.
///
/// A task takes a stripe of the keys that a group of heads shares; where there are several, their sums are merged in
/// order.
pub(super) fn decode<E: Element>(heads: &Heads<'_, E>, o: &Output<'_, E>) -> Vec<E::Real> {
    let n_kv_heads = heads.args.batches as usize * heads.args.kv_heads as usize;
    let keys = heads.args.keys as usize;
    let stripes = (TASKS / n_kv_heads).clamp(1, (keys / MIN_KEYS).max(1));
    let stripe = keys.div_ceil(stripes).next_multiple_of(KEYS);
    let over = |scratch: &mut Scratch<E::Real>, task: usize| {
        let start = task % stripes * stripe;
        scratch.over_stripe(heads, task / stripes * heads.group, (start, start + stripe))
    };
    let (scratch, in_parallel) = (|| Scratch::new(heads), heads.in_parallel());
    if stripes == 1 {
        let whole =
            |scratch: &mut _, kv_head| finished(heads, kv_head, &[over(scratch, kv_head)], o);
        return map_tasks((n_kv_heads, in_parallel), scratch, whole).concat();
    }
    let sums = map_tasks((n_kv_heads * stripes, in_parallel), scratch, over);
    let merge = |(): &mut (), kv_head: usize| {
        finished(heads, kv_head, &sums[kv_head * stripes..][..stripes], o)
    };
    map_tasks((n_kv_heads, in_parallel), || (), merge).concat()
}

/// What a task holds.
struct Scratch<R> {
    q: Vec<Widened<R>>,
    values: Widened<R>,
    scores: Vec<R>,
}

impl<R: Real> Scratch<R> {
    fn new<E: Element<Real = R>>(heads: &Heads<'_, E>) -> Self {
        Self {
            q: (0..heads.group).map(|_| Widened::zeros(heads.queries, heads.width)).collect(),
            // As if a value might be no number: so few queries are multiplied one by one in any case.
            values: Widened { finite: false, ..Widened::zeros(heads.tile_rows().0, heads.width) },
            scores: vec![R::ZERO; heads.queries * KEYS],
        }
    }

    /// The heads that share keys and values, from `first_head` on, over the keys from `start` to `end`.
    fn over_stripe<E: Element<Real = R>>(
        &mut self,
        heads: &Heads<'_, E>,
        first_head: usize,
        (start, end): (usize, usize),
    ) -> Sums<R> {
        let (queries, width, scores) = (heads.queries, heads.width, &mut self.scores);
        let rows = heads.group * queries;
        let mut sums = Sums {
            max: vec![R::NEG_INFINITY; rows],
            sum: vec![R::ZERO; rows],
            o: vec![R::ZERO; rows * width],
        };
        let group: Vec<_> = (first_head..).take(heads.group).map(|head| heads.head(head)).collect();
        for (head, q) in group.iter().zip(&mut self.q) {
            q.load(&heads.q, (head.batch, head.head), (0, queries), heads.scale);
        }
        let end = end.min(group[0].keys);
        for block in (start..end).step_by(KEYS) {
            let keys = (block, end.min(block + KEYS));
            let mut is_loaded = false;
            for (at, (head, q)) in group.iter().zip(&self.q).enumerate() {
                let Some((begin, end)) = heads.seen(head, (0, queries - 1), keys) else { continue };
                if !is_loaded {
                    let values = &mut self.values.elements;
                    widen_values(&heads.v, head.batch, head.kv_head, keys.0, keys.1, width, values);
                    is_loaded = true;
                }
                let tile = Tile { query: 0, queries, block, begin, end };
                scores_of_rows(tile, q, &heads.k, head, scores);
                let row = at * queries;
                let o = &mut sums.o[row * width..][..queries * width];
                weigh(heads, head, tile, scores, &mut sums.max[row..], &mut sums.sum[row..], o);
                tile.over_keys(scores, &self.values, o);
            }
        }
        sums
    }
}

/// Writes the rows of the heads that share keys and values, merged over all stripes.
fn finished<E: Element>(
    heads: &Heads<'_, E>,
    kv_head: usize,
    stripes: &[Sums<E::Real>],
    o: &Output<'_, E>,
) -> Vec<E::Real> {
    let rows = (0..heads.group * heads.queries).flat_map(|row| {
        let head = heads.head(kv_head * heads.group + row / heads.queries);
        let (max, sum, of_row) = merged(stripes, row, heads.width);
        // SAFETY: the one task that merges this group of heads writes their rows.
        unsafe { finish(heads, &head, row % heads.queries, &of_row, (max, sum), o) }
    });
    rows.collect()
}

vectorized! {
    /// The scores of a tile, sums over its rows.
    pub(super) fn scores_of_rows<E: Element>(
        tile: Tile,
        q: &Widened<E::Real>,
        k: &Rows<'_, E>,
        head: &Head<E::Real>,
        scores: &mut [E::Real],
    ) {
        let queries = q.elements.chunks_exact(q.width).zip(scores.chunks_exact_mut(KEYS));
        for (q, scores) in queries.take(tile.queries) {
            let scores = &mut scores[tile.skipped()..tile.end - tile.block];
            for (score, key) in scores.iter_mut().zip(tile.begin..) {
                let row = k.row(head.batch, head.kv_head, key);
                *score = slices_sum(&q[..row.len()], row, |q, k| q * k.load());
            }
        }
    }
}

vectorized! {
    /// The rows from `first` to `end`, `width` elements apart; what lies between stays zeros.
    fn widen_values<E: Element>(
        rows: &Rows<'_, E>,
        batch: usize,
        head: usize,
        first: usize,
        end: usize,
        width: usize,
        out: &mut [E::Real],
    ) {
        for (row, out) in (first..end).zip(out.chunks_exact_mut(width)) {
            for (out, x) in out.iter_mut().zip(rows.row(batch, head, row)) {
                *out = x.load();
            }
        }
    }
}

/// A row over all stripes, in their order.
fn merged<R: Real>(stripes: &[Sums<R>], row: usize, width: usize) -> (R, R, Vec<R>) {
    let mut max = R::NEG_INFINITY;
    for sums in stripes {
        max = if sums.max[row] > max { sums.max[row] } else { max };
    }
    let (mut sum, mut o) = (R::ZERO, vec![R::ZERO; width]);
    for sums in stripes {
        // A stripe of which nothing is seen, or with scores of -inf alone, adds nothing.
        let shrink =
            if sums.max[row] == max { R::ONE } else { (sums.max[row] - max).exp_of_nonpositive() };
        sum += sums.sum[row] * shrink;
        for (o, part) in o.iter_mut().zip(&sums.o[row * width..][..width]) {
            *o += *part * shrink;
        }
    }
    (max, sum, o)
}
