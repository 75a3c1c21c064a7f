//! A few queries, as many as a text that is generated has at a time, against all keys: read once, as they lie.
//!
//! A block of keys is transposed for many queries. For a few of them that would cost more than their scores, and
//! once for each head of a group; so scores are sums over rows here, and all heads of a group meet a block together.

use super::forward::weigh;
use super::heads::{Head, Heads, Rows};
use super::tile::{Tile, Widened};
use super::{KEYS, TASKS};
use crate::cpu::{Element, Real, map_tasks, panel, slices_sum, vectorized};

/// Queries from which on tiles are faster.
pub(super) const QUERIES: usize = 8;

/// Keys below which another task does not pay.
const MIN_KEYS: usize = 4 * KEYS;

/// What a row has come to over some of its keys.
struct Sums<R> {
    max: Vec<R>,
    sum: Vec<R>,
    o: Vec<R>,
}

/// Running sums of all rows of a head: its largest score, the sum of `exp(t - max)`, and the row of `o` that is as
/// long as a widened one. Calls `finish(head, query, row, max, sum)` for each, in order.
pub(super) fn decode<E: Element>(
    heads: &Heads<'_, E>,
    mut finish: impl FnMut(&Head<E::Real>, usize, &[E::Real], E::Real, E::Real),
) {
    let (group, rows) = (heads.group, heads.group * heads.queries);
    let n_kv_heads = heads.args.batches as usize * heads.args.kv_heads as usize;
    let keys = heads.args.keys as usize;
    let stripes = (TASKS / n_kv_heads).clamp(1, (keys / MIN_KEYS).max(1));
    let stripe = keys.div_ceil(stripes).next_multiple_of(KEYS);
    let sums = map_tasks(
        (n_kv_heads * stripes, heads.in_parallel()),
        || (),
        |(), task| {
            let start = task % stripes * stripe;
            over_stripe(heads, task / stripes * group, (start, keys.min(start + stripe)))
        },
    );
    for (kv_head, sums) in sums.chunks_exact(stripes).enumerate() {
        for row in 0..rows {
            let head = heads.head(kv_head * group + row / heads.queries);
            let (max, sum, o) = merged(sums, row, heads.width);
            finish(&head, row % heads.queries, &o, max, sum);
        }
    }
}

/// The heads that share keys and values, from `first_head` on, over the keys from `start` to `end`.
fn over_stripe<E: Element>(
    heads: &Heads<'_, E>,
    first_head: usize,
    (start, end): (usize, usize),
) -> Sums<E::Real> {
    let (queries, width, zero) = (heads.queries, heads.width, E::Real::ZERO);
    let rows = heads.group * queries;
    let mut sums = Sums {
        max: vec![E::Real::NEG_INFINITY; rows],
        sum: vec![zero; rows],
        o: vec![zero; rows * width],
    };
    let group: Vec<_> = (first_head..first_head + heads.group)
        .map(|head| {
            let (head, mut q) = (heads.head(head), Widened::zeros(queries, width));
            q.load(&heads.q, (head.batch, head.head), (0, queries), heads.scale);
            (head, q)
        })
        .collect();
    // As if a value might be no number: so few queries are multiplied one by one in any case.
    let mut values = Widened { finite: false, ..Widened::zeros(heads.tile_rows().0, width) };
    let mut scores = vec![zero; queries * KEYS];
    for block in (start..end).step_by(KEYS) {
        let keys = (block, end.min(block + KEYS));
        let mut loaded = false;
        for (at, (head, q)) in group.iter().enumerate() {
            let Some((begin, end)) = heads.seen(head, (0, queries - 1), keys) else { continue };
            let kv_head = (head.batch, head.kv_head);
            if !loaded {
                widen_values(&heads.v, kv_head.0, kv_head.1, keys.0, keys.1, &mut values.elements);
                loaded = true;
            }
            let tile = Tile { query: 0, queries, block, begin, end };
            scores_of_rows(tile, q, &heads.k, head, &mut scores);
            let row = at * queries;
            let o = &mut sums.o[row * width..][..queries * width];
            weigh(heads, head, tile, &mut scores, &mut sums.max[row..], &mut sums.sum[row..], o);
            tile.over_keys(&scores, &values, o);
        }
    }
    sums
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
    /// The rows from `first` to `end`, whose rest stays zeros.
    fn widen_values<E: Element>(
        rows: &Rows<'_, E>,
        batch: usize,
        head: usize,
        first: usize,
        end: usize,
        out: &mut [E::Real],
    ) {
        let width = rows.cols.next_multiple_of(panel::<E::Real>());
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
