//! Blocks of keys against all queries that see them.

use super::decode;
use super::heads::{Head, Heads, Output, Rows};
use super::tile::{Tile, Widened, transpose};
use super::{KEYS, QUERIES};
use super::{hide_dropped, logits};
use crate::cpu::{Element, Real, lane_sum, vectorized};
use crate::mask::NO_DRAWS;

/// What backward needs beside the arguments.
pub(super) struct Given<'a, E: Element> {
    pub(super) dout: Rows<'a, E>,
    /// Maximum and normaliser of every row.
    pub(super) softmax: &'a [E::Real],
    /// `Σ do * o` of every row.
    pub(super) delta: &'a [E::Real],
}

vectorized! {
    pub(super) fn dots<E: Element>(
        o: &Rows<'_, E>,
        dout: &Rows<'_, E>,
        batch: usize,
        head: usize,
        delta: &mut [E::Real],
    ) {
        for (row, delta) in delta.iter_mut().enumerate() {
            let (o, dout) = (o.row(batch, head, row), dout.row(batch, head, row));
            *delta = lane_sum(o.len(), |d| o[d].load() * dout[d].load());
        }
    }
}

/// What a task of the backward pass holds.
pub(super) struct Backward<R> {
    /// A block of keys and values, transposed.
    pub(super) keys: Vec<R>,
    pub(super) values: Vec<R>,
    /// The keys again, as they are.
    pub(super) k: Widened<R>,
    pub(super) dk: Vec<R>,
    pub(super) dv: Vec<R>,
    pub(super) q: Widened<R>,
    pub(super) dout: Widened<R>,
    pub(super) scores: Vec<R>,
    pub(super) dp: Vec<R>,
    /// `[group, queries, width]`.
    pub(super) dq: Vec<R>,
}

impl<R: Real> Backward<R> {
    pub(super) fn new<E: Element<Real = R>>(heads: &Heads<'_, E>) -> Self {
        let (zeros, (keys, queries)) = (|len| vec![R::ZERO; len], heads.tile_rows());
        Self {
            keys: zeros(keys * heads.head_size),
            values: zeros(keys * heads.head_size),
            k: Widened::zeros(keys, heads.width),
            dk: zeros(keys * heads.width),
            dv: zeros(keys * heads.width),
            q: Widened::zeros(queries, heads.width),
            dout: Widened::zeros(queries, heads.width),
            scores: zeros(queries * KEYS),
            dp: zeros(queries * KEYS),
            dq: zeros(heads.group * heads.queries * heads.width),
        }
    }

    /// Writes `dk` and `dv` of every `stripes`-th block of keys, and sums their part of `dq`.
    pub(super) fn run<E: Element<Real = R>>(
        &mut self,
        heads: &Heads<'_, E>,
        given: &Given<'_, E>,
        kv_index: usize,
        (stripe, stripes): (usize, usize),
        dk: &Output<'_, E>,
        dv: &Output<'_, E>,
    ) {
        let (width, all_keys) = (heads.width, heads.args.keys as usize);
        self.dq.fill(R::ZERO);
        for block in (stripe * KEYS..all_keys).step_by(stripes * KEYS) {
            let block_end = all_keys.min(block + KEYS);
            let first = heads.head(kv_index * heads.group);
            let kv_head = (first.batch, first.kv_head);
            let keys = (block, block_end.min(first.keys).max(block));
            if heads.queries >= decode::QUERIES {
                transpose(&heads.k, kv_head.0, kv_head.1, keys.0, keys.1, &mut self.keys);
            }
            transpose(&heads.v, kv_head.0, kv_head.1, keys.0, keys.1, &mut self.values);
            self.k.load(&heads.k, kv_head, keys, R::ONE);
            self.dk.fill(R::ZERO);
            self.dv.fill(R::ZERO);
            for member in 0..heads.group {
                let head = heads.head(kv_index * heads.group + member);
                for query in (0..heads.queries).step_by(QUERIES) {
                    let queries = QUERIES.min(heads.queries - query);
                    let Some((begin, end)) = heads.seen(&head, (query, query + queries - 1), keys)
                    else {
                        continue;
                    };
                    let tile = Tile { query, queries, block, begin, end };
                    let dq_row = member * heads.queries + query;
                    self.tile(heads, &head, given, tile, dq_row * width);
                }
            }
            for (key, (dk_row, dv_row)) in
                (block..block_end).zip(self.dk.chunks_exact(width).zip(self.dv.chunks_exact(width)))
            {
                let row = (kv_head.0, kv_head.1, key);
                // SAFETY: the task of this head and stripe alone writes these rows. The queries were
                // scaled already.
                unsafe { dk.write(row, dk_row, R::ONE) };
                // SAFETY: as above.
                unsafe { dv.write(row, dv_row, heads.drop_scale) };
            }
        }
    }

    pub(super) fn tile<E: Element<Real = R>>(
        &mut self,
        heads: &Heads<'_, E>,
        head: &Head<R>,
        given: &Given<'_, E>,
        tile: Tile,
        dq_start: usize,
    ) {
        let (at, cols) = ((head.batch, head.head), heads.head_size);
        let rows = (tile.query, tile.query + tile.queries);
        self.q.load(&heads.q, at, rows, heads.scale);
        self.dout.load(&given.dout, at, rows, R::ONE);
        // Rounded as in the forward pass, whose maximum and sum are given.
        if heads.queries < decode::QUERIES {
            decode::scores_of_rows(tile, &self.q, &heads.k, head, &mut self.scores);
        } else {
            tile.scores(&self.q.elements, heads.width, &self.keys, cols, &mut self.scores);
        }
        tile.scores(&self.dout.elements, heads.width, &self.values, cols, &mut self.dp);
        let row = head.mask_row + tile.query;
        let (softmax, delta) = (&given.softmax[2 * row..], &given.delta[row..]);
        score_grads(heads, head, tile, softmax, delta, &mut self.scores, &mut self.dp);
        tile.over_queries(&self.scores, &self.dout, &mut self.dv);
        tile.over_queries(&self.dp, &self.q, &mut self.dk);
        tile.over_keys(&self.dp, &self.k, &mut self.dq[dq_start..]);
    }

    pub(super) fn write_dq<E: Element<Real = R>>(
        &self,
        heads: &Heads<'_, E>,
        kv_index: usize,
        dq: &Output<'_, E>,
    ) {
        write_group(heads, kv_index, &self.dq, dq);
    }
}

/// Adds the stripes of `dq` of a group of heads, in order, and writes the sum.
pub(super) fn add_stripes<E: Element>(
    heads: &Heads<'_, E>,
    kv_index: usize,
    stripes: &[Vec<E::Real>],
    dq: &Output<'_, E>,
) {
    let mut total = vec![E::Real::ZERO; stripes[0].len()];
    for stripe in stripes {
        total.iter_mut().zip(stripe).for_each(|(total, x)| *total += *x);
    }
    write_group(heads, kv_index, &total, dq);
}

/// Writes the `dq` of a group of heads.
pub(super) fn write_group<E: Element>(
    heads: &Heads<'_, E>,
    kv_index: usize,
    rows: &[E::Real],
    dq: &Output<'_, E>,
) {
    for (at, row) in rows.chunks_exact(heads.width).enumerate() {
        let head = heads.head(kv_index * heads.group + at / heads.queries);
        // SAFETY: one task alone writes the rows of a group.
        unsafe { dq.write((head.batch, head.head, at % heads.queries), row, heads.scale) };
    }
}

vectorized! {
    /// Turns the scores of a tile into the kept weights, short of the drop scale, and `dp` into the
    /// gradient of the scaled scores.
    pub(super) fn score_grads<E: Element>(
        heads: &Heads<'_, E>,
        head: &Head<E::Real>,
        tile: Tile,
        softmax: &[E::Real],
        delta: &[E::Real],
        scores: &mut [E::Real],
        dp: &mut [E::Real],
    ) {
        let (from, to) = tile.columns::<E::Real>();
        let mut buffer = NO_DRAWS;
        let mut bend = [E::Real::ONE; KEYS];
        let capped = heads.softcap != E::Real::ZERO;
        let rows = scores.chunks_exact_mut(KEYS).zip(dp.chunks_exact_mut(KEYS));
        for (((scores, dp), (softmax, delta)), i) in
            rows.zip(softmax.chunks_exact(2).zip(delta)).zip(0..tile.queries)
        {
            let query = tile.query + i;
            let (begin, end) = tile.seen(heads.args, query, head.keys);
            for hidden in [from..begin, end..to] {
                scores[hidden.clone()].fill(E::Real::ZERO);
                dp[hidden].fill(E::Real::ZERO);
            }
            if begin == end {
                continue;
            }
            let (row, col) = (head.mask_row + query, tile.block + from);
            let draws = heads.drop.draws(row, col, to - from, &mut buffer);
            let (seen, bend) = (&mut scores[begin..end], &mut bend[begin..end]);
            logits(heads, head, query, tile.block + begin, seen, capped.then_some(&mut *bend));
            if heads.args.drops_keys() {
                hide_dropped(heads, &draws[begin - from..], seen);
            }
            let (max, normaliser) = (softmax[0], softmax[1]);
            for t in seen.iter_mut() {
                *t = (*t - max).exp_of_nonpositive() * normaliser;
            }
            if heads.drop.keeps_all() {
                for (p, dp) in scores[from..to].iter().zip(&mut dp[from..to]) {
                    let dt = *p * (*dp - *delta);
                    // By selection, for what arrives at a hidden key may be no number.
                    *dp = if *p != E::Real::ZERO { dt } else { E::Real::ZERO };
                }
            } else {
                let pairs = scores[from..to].iter_mut().zip(&mut dp[from..to]);
                for ((p, dp), draw) in pairs.zip(draws) {
                    let kept = heads.drop.keeps(*draw);
                    let passed = if kept { *dp * heads.drop_scale } else { E::Real::ZERO };
                    let dt = *p * (passed - *delta);
                    *dp = if *p != E::Real::ZERO { dt } else { E::Real::ZERO };
                    *p = if kept { *p } else { E::Real::ZERO };
                }
            }
            if capped {
                // By selection: the score of a dropped key may be no number.
                for (dp, bend) in dp[begin..end].iter_mut().zip(bend) {
                    *dp = if *dp != E::Real::ZERO { *dp * *bend } else { E::Real::ZERO };
                }
            }
        }
    }
}
