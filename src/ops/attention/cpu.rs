//! Tiles of scores that never leave the caches: see [`fwd`] and [`bwd`].

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, Result};

use super::NAME;
use super::config::{AttentionArgs, AttentionLayout, HeadStrides};
use super::{GradLayout, Operands};
use crate::elem::{Element, Real, for_float_dtype, storage};
use crate::lanes::{lane_max, lane_sum, slice_sum};
use crate::mask::{MaskArgs, NO_DRAWS, RUN};
use crate::matmul::{Left, Product, Right, multiply, panel};
use crate::parallel::{Scattered, map_tasks, scattered};
use crate::simd::vectorized;

/// Queries of a tile.
const QUERIES: usize = 64;

/// Keys of a tile and of a block: whole panels, and no more than are drawn at a time.
const KEYS: usize = 256;
const _: () = assert!(KEYS.is_multiple_of(panel::<f32>()) && KEYS <= RUN);

/// Tiles of queries that share a block of keys once it is transposed.
const STRIPE: usize = 8;

/// Tasks below which stripes get shorter, so that many cores have something to do. Only the shape decides,
/// for the result may not depend on the number of threads.
const TASKS: usize = 16;

/// Multiplications of a product of all scores below which a second thread costs more than it saves.
const MIN_PRODUCTS: usize = 1 << 21;

/// `o` and `lse`.
///
/// A task holds the running sums of a stripe of queries and takes the keys block by block.
pub(super) fn fwd(
    args: &AttentionArgs,
    layout: &AttentionLayout,
    drop: &MaskArgs,
    operands: &Operands<CpuStorage>,
) -> Result<(CpuStorage, CpuStorage)> {
    for_float_dtype!(NAME, operands.q.0, |E| forward::<E>(args, layout, drop, operands))
}

fn forward<E: Element>(
    args: &AttentionArgs,
    layout: &AttentionLayout,
    drop: &MaskArgs,
    operands: &Operands<CpuStorage>,
) -> Result<(CpuStorage, CpuStorage)> {
    let heads = Heads::<E>::new(args, layout, drop, operands)?;
    let (queries, n_heads) = (heads.queries, args.batches as usize * args.heads as usize);
    let tiles = queries.div_ceil(QUERIES);
    let stripe = QUERIES * (n_heads * tiles / TASKS).clamp(1, STRIPE);
    let stripes = queries.div_ceil(stripe);
    // SAFETY: the stripes of all heads cover every row of `o`, each once.
    let ([o], lse) = unsafe {
        scattered([n_heads * queries * heads.head_size], |[o]| {
            let o = Output { part: o, start: 0, strides: layout.o, cols: heads.head_size };
            let state = || Forward::new(&heads, stripe.min(queries));
            map_tasks((n_heads * stripes, heads.in_parallel()), state, |state, task| {
                let start = task % stripes * stripe;
                let head = heads.head(task / stripes);
                state.run(&heads, &head, start, queries.min(start + stripe), &o)
            })
        })
    };
    Ok((storage(o), E::Real::storage(lse.concat())))
}

/// `dq`, `dk` and `dv`, or the one tensor that holds them all.
///
/// A task takes every `stripes`-th block of keys of one key and value head; each block meets all queries
/// of the group that see it: five products a tile. `dk` and `dv` are summed in the order of the queries,
/// `dq` in that of the blocks; where there are several stripes, their sums are added in order at the end.
#[expect(clippy::too_many_arguments)]
pub(super) fn bwd(
    args: &AttentionArgs,
    layout: &AttentionLayout,
    grads: &GradLayout,
    drop: &MaskArgs,
    operands: &Operands<CpuStorage>,
    lse: &CpuStorage,
    o: (&CpuStorage, usize),
    dout: (&CpuStorage, usize),
) -> Result<Vec<CpuStorage>> {
    for_float_dtype!(NAME, operands.q.0, |E| {
        backward::<E>(args, layout, grads, drop, operands, lse, o, dout)
    })
}

#[expect(clippy::too_many_arguments)]
fn backward<E: Element>(
    args: &AttentionArgs,
    layout: &AttentionLayout,
    grads: &GradLayout,
    drop: &MaskArgs,
    operands: &Operands<CpuStorage>,
    lse: &CpuStorage,
    (o, o_start): (&CpuStorage, usize),
    (dout, dout_start): (&CpuStorage, usize),
) -> Result<Vec<CpuStorage>> {
    let heads = Heads::<E>::new(args, layout, drop, operands)?;
    let (batches, queries, cols) = (args.batches as usize, heads.queries, heads.head_size);
    let n_kv_heads = batches * args.kv_heads as usize;
    let rows = |storage, start, strides| Rows::<E>::new(storage, start, strides, cols);
    let (o, dout) = (rows(o, o_start, layout.o)?, rows(dout, dout_start, grads.strides.o)?);
    let delta = map_tasks(
        (n_kv_heads * heads.group, heads.in_parallel()),
        || (),
        |(), task| {
            let head = heads.head(task);
            let mut delta = vec![E::Real::ZERO; queries];
            dots(&o, &dout, head.batch, head.head, &mut delta);
            delta
        },
    );
    let saved = Saved { dout, lse: E::Real::elements(lse)?, delta: &delta.concat() };
    let stripes = (TASKS / n_kv_heads).clamp(1, (args.keys as usize).div_ceil(KEYS));
    let q_len = n_kv_heads * heads.group * queries * cols;
    let kv_len = n_kv_heads * args.keys as usize * cols;
    let (lens, starts) = match grads.packed {
        None => ([q_len, kv_len, kv_len], [(0, 0), (1, 0), (2, 0)]),
        Some([k, v]) => ([q_len + 2 * kv_len, 0, 0], [(0, 0), (0, k), (0, v)]),
    };
    // SAFETY: the blocks of all heads cover every row of `dk` and `dv`, and `dq` is written by the
    // only stripe or in the sum over stripes, each row once.
    let (vectors, ()) = unsafe {
        scattered(lens, |parts| {
            let output = |at: usize, strides| {
                let (part, start) = starts[at];
                Output { part: &parts[part], start, strides, cols }
            };
            let dq = output(0, grads.strides.q);
            let (dk, dv) = (output(1, grads.strides.k), output(2, grads.strides.v));
            let sums = map_tasks(
                (n_kv_heads * stripes, heads.in_parallel()),
                || Backward::new(&heads),
                |state, task| {
                    state.run(&heads, &saved, task / stripes, (task % stripes, stripes), &dk, &dv);
                    if stripes > 1 {
                        return state.dq.clone();
                    }
                    state.write_dq(&heads, task, &dq);
                    Vec::new()
                },
            );
            if stripes > 1 {
                map_tasks(
                    (n_kv_heads, heads.in_parallel()),
                    || (),
                    |(), kv_head| {
                        add_stripes(&heads, kv_head, &sums[kv_head * stripes..][..stripes], &dq);
                    },
                );
            }
        })
    };
    let wanted = if grads.packed.is_some() { 1 } else { 3 };
    Ok(vectors.into_iter().take(wanted).map(storage).collect())
}

/// The rows of a tensor `[B, H, S, D]`.
struct Rows<'a, E> {
    elements: &'a [E],
    strides: HeadStrides,
    cols: usize,
}

impl<'a, E: Element> Rows<'a, E> {
    fn new(
        storage: &'a CpuStorage,
        start: usize,
        strides: HeadStrides,
        cols: usize,
    ) -> Result<Self> {
        Ok(Self { elements: &E::cpu_storage_as_slice(storage)?[start..], strides, cols })
    }

    #[inline(always)]
    fn row(&self, batch: usize, head: usize, row: usize) -> &'a [E] {
        &self.elements[self.strides.at(batch, head, row)..][..self.cols]
    }
}

/// The rows of a tensor `[B, H, S, D]` that tasks write, each once.
struct Output<'a, E> {
    part: &'a Scattered<E>,
    start: usize,
    strides: HeadStrides,
    cols: usize,
}

impl<E: Element> Output<'_, E> {
    /// Writes `scale * x` to a row.
    ///
    /// # Safety
    /// No other task writes this row at the same time.
    #[inline(always)]
    unsafe fn write(
        &self,
        (batch, head, row): (usize, usize, usize),
        x: &[E::Real],
        scale: E::Real,
    ) {
        let start = self.start + self.strides.at(batch, head, row);
        // SAFETY: rows do not overlap, and the caller has this one to itself.
        let out: &mut [MaybeUninit<E>] = unsafe { self.part.part(start, self.cols) };
        for (out, x) in out.iter_mut().zip(x) {
            out.write(E::store(*x * scale));
        }
    }
}

/// The arguments of a pass, as rows of its heads.
struct Heads<'a, E: Element> {
    args: &'a AttentionArgs,
    drop: &'a MaskArgs,
    q: Rows<'a, E>,
    k: Rows<'a, E>,
    v: Rows<'a, E>,
    key_lengths: Option<&'a [u32]>,
    alibi_slopes: Option<&'a [f32]>,
    scale: E::Real,
    drop_scale: E::Real,
    /// 0 for none.
    softcap: E::Real,
    queries: usize,
    head_size: usize,
    /// Columns of a widened row: the head size in whole panels.
    width: usize,
    /// Heads that share keys and values.
    group: usize,
}

/// What of its arguments is the same for all scores of a head.
struct Head<R> {
    batch: usize,
    head: usize,
    kv_head: usize,
    /// Keys of the sample.
    keys: usize,
    /// 0 for none.
    slope: R,
    /// The row of its first query in the mask.
    mask_row: usize,
}

impl<'a, E: Element> Heads<'a, E> {
    fn new(
        args: &'a AttentionArgs,
        layout: &AttentionLayout,
        drop: &'a MaskArgs,
        operands: &Operands<'a, CpuStorage>,
    ) -> Result<Self> {
        let head_size = args.head_size as usize;
        let rows = |(storage, start), strides| Rows::<E>::new(storage, start, strides, head_size);
        let key_lengths = operands.key_lengths.map(|(storage, start)| {
            Ok::<_, candle_core::Error>(&storage.as_slice::<u32>()?[start..])
        });
        let alibi_slopes = operands.alibi_slopes.map(|(storage, start)| {
            Ok::<_, candle_core::Error>(&storage.as_slice::<f32>()?[start..])
        });
        Ok(Self {
            args,
            drop,
            q: rows(operands.q, layout.q)?,
            k: rows(operands.k, layout.k)?,
            v: rows(operands.v, layout.v)?,
            key_lengths: key_lengths.transpose()?,
            alibi_slopes: alibi_slopes.transpose()?,
            scale: E::Real::from_f64(args.scale),
            drop_scale: E::Real::from_f32(drop.scale()),
            softcap: E::Real::from_f64(args.softcap),
            queries: args.queries as usize,
            head_size,
            width: head_size.next_multiple_of(panel::<E::Real>()),
            group: args.heads as usize / args.kv_heads as usize,
        })
    }

    /// Whether there is enough to do for several threads.
    fn in_parallel(&self) -> bool {
        let scores = self.queries.saturating_mul(self.args.keys as usize);
        let heads = self.args.batches as usize * self.args.heads as usize;
        scores.saturating_mul(heads * self.head_size) >= MIN_PRODUCTS
    }

    /// Rows of the scratch memory for a block of keys and for a tile of queries.
    fn tile_rows(&self) -> (usize, usize) {
        let keys = (self.args.keys as usize).next_multiple_of(panel::<E::Real>());
        (keys.min(KEYS), self.queries.min(QUERIES))
    }

    /// The head of this index in `[B, H]`.
    fn head(&self, index: usize) -> Head<E::Real> {
        let heads = self.args.heads as usize;
        let (batch, head) = (index / heads, index % heads);
        let keys = self.args.keys as usize;
        let slope = self.alibi_slopes.map_or(0., |slopes| slopes[head]);
        Head {
            batch,
            head,
            kv_head: head / self.group,
            keys: self.key_lengths.map_or(keys, |lengths| keys.min(lengths[batch] as usize)),
            slope: E::Real::from_f32(slope),
            mask_row: index * self.queries,
        }
    }

    /// The keys from `start` to `end` that the queries of a tile see, if any.
    fn seen(
        &self,
        head: &Head<E::Real>,
        (first, last): (usize, usize),
        (start, end): (usize, usize),
    ) -> Option<(usize, usize)> {
        let begin = self.args.visible(first, head.keys).0.max(start);
        let end = self.args.visible(last, head.keys).1.min(end).min(head.keys);
        (begin < end).then_some((begin, end))
    }
}

/// A tile of scores: its queries and the keys that any of them sees.
#[derive(Clone, Copy)]
struct Tile {
    query: usize,
    queries: usize,
    /// First key of its block.
    block: usize,
    begin: usize,
    end: usize,
}

impl Tile {
    /// Keys of the block before `begin`.
    #[inline(always)]
    fn skipped(&self) -> usize {
        self.begin - self.block
    }

    /// The columns that hold them, from and to whole panels.
    #[inline(always)]
    fn columns<R>(&self) -> (usize, usize) {
        let panel = panel::<R>();
        let end = (self.end - self.block).next_multiple_of(panel);
        (self.skipped() / panel * panel, end)
    }

    /// The columns that one of its queries sees.
    #[inline(always)]
    fn seen(&self, args: &AttentionArgs, query: usize, keys: usize) -> (usize, usize) {
        let (begin, end) = args.visible(query, keys);
        let begin = begin.clamp(self.begin, self.end);
        (begin - self.block, end.clamp(begin, self.end) - self.block)
    }

    /// `scores = left · keys`, in whole panels.
    fn scores<R: Real>(&self, left: &[R], width: usize, keys: &[R], cols: usize, scores: &mut [R]) {
        let (panel, (from, to)) = (panel::<R>(), self.columns::<R>());
        multiply(
            Product { m: self.queries, n: to - from, k: cols, add: false },
            Left { elements: left, row: width, col: 1 },
            // A key that is no number spoils its own scores alone.
            Right { elements: &keys[from * cols..], row: panel, panel: panel * cols, finite: true },
            &mut scores[from..],
            KEYS,
        );
    }

    /// `out += weights · rows`, over the keys.
    fn over_keys<R: Real>(&self, weights: &[R], rows: &Widened<R>, out: &mut [R]) {
        multiply(
            Product { m: self.queries, n: rows.width, k: self.end - self.begin, add: true },
            Left { elements: &weights[self.skipped()..], row: KEYS, col: 1 },
            rows.right(self.skipped()),
            out,
            rows.width,
        );
    }

    /// `out += weightsᵀ · rows`, over the queries.
    fn over_queries<R: Real>(&self, weights: &[R], rows: &Widened<R>, out: &mut [R]) {
        multiply(
            Product { m: self.end - self.begin, n: rows.width, k: self.queries, add: true },
            Left { elements: &weights[self.skipped()..], row: 1, col: KEYS },
            rows.right(0),
            &mut out[self.skipped() * rows.width..],
            rows.width,
        );
    }
}

/// Rows in the type of the arithmetic, each in whole panels, the rest zeros.
struct Widened<R> {
    elements: Vec<R>,
    width: usize,
    finite: bool,
}

impl<R: Real> Widened<R> {
    fn zeros(rows: usize, width: usize) -> Self {
        Self { elements: vec![R::ZERO; rows * width], width, finite: true }
    }

    /// The rows from `row` on, as an operand.
    fn right(&self, row: usize) -> Right<'_, R> {
        let elements = &self.elements[row * self.width..];
        Right { elements, row: self.width, panel: panel::<R>(), finite: self.finite }
    }

    /// Takes `scale` times the rows from `first` to `end`.
    fn load<E: Element<Real = R>>(
        &mut self,
        rows: &Rows<'_, E>,
        (batch, head): (usize, usize),
        (first, end): (usize, usize),
        scale: R,
    ) {
        self.finite = widen(rows, batch, head, first, end, scale, self.width, &mut self.elements);
    }
}

vectorized! {
    /// Loads rows, `width` elements apart, and tells whether all are finite.
    fn widen<E: Element>(
        rows: &Rows<'_, E>,
        batch: usize,
        head: usize,
        first: usize,
        end: usize,
        scale: E::Real,
        width: usize,
        out: &mut [E::Real],
    ) -> bool {
        let mut spoiled = E::Real::ZERO;
        for (row, out) in (first..end).zip(out.chunks_exact_mut(width)) {
            let row = rows.row(batch, head, row);
            for (out, x) in out.iter_mut().zip(row) {
                *out = x.load() * scale;
            }
            spoiled += slice_sum(&out[..row.len()], |x| x * E::Real::ZERO);
        }
        spoiled == E::Real::ZERO
    }
}

vectorized! {
    /// Loads rows as columns of panels: element `d` of row `r` at `(r / panel * cols + d) * panel + r % panel`.
    fn transpose<E: Element>(
        rows: &Rows<'_, E>,
        batch: usize,
        head: usize,
        first: usize,
        end: usize,
        out: &mut [E::Real],
    ) {
        let panel = panel::<E::Real>();
        for row in first..end {
            let (at, column) = ((row - first) / panel, (row - first) % panel);
            let out = out[at * panel * rows.cols..][..panel * rows.cols].chunks_exact_mut(panel);
            for (out, x) in out.zip(rows.row(batch, head, row)) {
                out[column] = x.load();
            }
        }
    }
}

/// What a task of the forward pass holds.
struct Forward<R> {
    q: Widened<R>,
    /// A block of keys, transposed.
    keys: Vec<R>,
    values: Widened<R>,
    scores: Vec<R>,
    o: Vec<R>,
    max: Vec<R>,
    sum: Vec<R>,
}

impl<R: Real> Forward<R> {
    fn new<E: Element<Real = R>>(heads: &Heads<'_, E>, stripe: usize) -> Self {
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

    /// Writes the rows of `o` from `start` to `end` and returns their `lse`.
    fn run<E: Element<Real = R>>(
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
                let blind = *sum == R::ZERO;
                let factor = if blind { R::ZERO } else { heads.drop_scale * sum.recip() };
                // SAFETY: the task of this head and stripe alone writes this row.
                unsafe { o.write((head.batch, head.head, query), row, factor) };
                if blind { R::INFINITY } else { *max + sum.ln() }
            })
            .collect()
    }
}

vectorized! {
    /// Turns the scores of a tile into `exp(t - max)` where they are kept and 0 elsewhere, and brings
    /// `max`, `sum` and `o` up to date.
    fn weigh<E: Element>(
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
            let seen = &mut scores[begin..end];
            logits(heads, head, query, tile.block + begin, seen, None);
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
                let (row, col) = (head.mask_row + query, tile.block + from);
                let draws = heads.drop.draws(row, col, to - from, &mut buffer);
                for (p, draw) in scores[from..to].iter_mut().zip(draws) {
                    *p = if heads.drop.keeps(*draw) { *p } else { E::Real::ZERO };
                }
            }
        }
    }
}

/// Turns scaled scores of a query, from key `key` on, into what the softmax gets; `bend` takes the
/// derivative of the soft cap.
#[inline(always)]
fn logits<E: Element>(
    heads: &Heads<'_, E>,
    head: &Head<E::Real>,
    query: usize,
    key: usize,
    scores: &mut [E::Real],
    bend: Option<&mut [E::Real]>,
) {
    let softcap = heads.softcap;
    if softcap != E::Real::ZERO {
        let per_cap = softcap.recip();
        match bend {
            None => scores.iter_mut().for_each(|s| *s = softcap * (*s * per_cap).tanh()),
            Some(bend) => {
                for (s, bend) in scores.iter_mut().zip(bend) {
                    let tanh = (*s * per_cap).tanh();
                    *s = softcap * tanh;
                    *bend = E::Real::ONE - tanh * tanh;
                }
            }
        }
    }
    if head.slope != E::Real::ZERO {
        let diagonal = query as i64 + i64::from(heads.args.keys) - i64::from(heads.args.queries);
        let first = diagonal - key as i64;
        for (j, s) in scores.iter_mut().enumerate() {
            let distance = (first - j as i64).unsigned_abs();
            *s = *s - head.slope * E::Real::from_f64(distance as f64);
        }
    }
}

/// What backward needs beside the arguments.
struct Saved<'a, E: Element> {
    dout: Rows<'a, E>,
    lse: &'a [E::Real],
    /// `Σ do * o` of every row.
    delta: &'a [E::Real],
}

vectorized! {
    fn dots<E: Element>(
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
struct Backward<R> {
    /// A block of keys and values, transposed.
    keys: Vec<R>,
    values: Vec<R>,
    /// The keys again, as they are.
    k: Widened<R>,
    dk: Vec<R>,
    dv: Vec<R>,
    q: Widened<R>,
    dout: Widened<R>,
    scores: Vec<R>,
    dp: Vec<R>,
    /// `[group, queries, width]`.
    dq: Vec<R>,
}

impl<R: Real> Backward<R> {
    fn new<E: Element<Real = R>>(heads: &Heads<'_, E>) -> Self {
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
    fn run<E: Element<Real = R>>(
        &mut self,
        heads: &Heads<'_, E>,
        saved: &Saved<'_, E>,
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
            transpose(&heads.k, kv_head.0, kv_head.1, keys.0, keys.1, &mut self.keys);
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
                    self.tile(heads, &head, saved, tile, dq_row * width);
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

    fn tile<E: Element<Real = R>>(
        &mut self,
        heads: &Heads<'_, E>,
        head: &Head<R>,
        saved: &Saved<'_, E>,
        tile: Tile,
        dq_start: usize,
    ) {
        let (at, cols) = ((head.batch, head.head), heads.head_size);
        let rows = (tile.query, tile.query + tile.queries);
        self.q.load(&heads.q, at, rows, heads.scale);
        self.dout.load(&saved.dout, at, rows, R::ONE);
        tile.scores(&self.q.elements, heads.width, &self.keys, cols, &mut self.scores);
        tile.scores(&self.dout.elements, heads.width, &self.values, cols, &mut self.dp);
        let row = head.mask_row + tile.query;
        let (lse, delta) = (&saved.lse[row..], &saved.delta[row..]);
        score_grads(heads, head, tile, lse, delta, &mut self.scores, &mut self.dp);
        tile.over_queries(&self.scores, &self.dout, &mut self.dv);
        tile.over_queries(&self.dp, &self.q, &mut self.dk);
        tile.over_keys(&self.dp, &self.k, &mut self.dq[dq_start..]);
    }

    fn write_dq<E: Element<Real = R>>(
        &self,
        heads: &Heads<'_, E>,
        kv_index: usize,
        dq: &Output<'_, E>,
    ) {
        write_group(heads, kv_index, &self.dq, dq);
    }
}

/// Adds the stripes of `dq` of a group of heads, in order, and writes the sum.
fn add_stripes<E: Element>(
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
fn write_group<E: Element>(
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
    fn score_grads<E: Element>(
        heads: &Heads<'_, E>,
        head: &Head<E::Real>,
        tile: Tile,
        lse: &[E::Real],
        delta: &[E::Real],
        scores: &mut [E::Real],
        dp: &mut [E::Real],
    ) {
        let (from, to) = tile.columns::<E::Real>();
        let mut buffer = NO_DRAWS;
        let mut bend = [E::Real::ONE; KEYS];
        let capped = heads.softcap != E::Real::ZERO;
        let rows = scores.chunks_exact_mut(KEYS).zip(dp.chunks_exact_mut(KEYS));
        for (((scores, dp), (lse, delta)), i) in
            rows.zip(lse.iter().zip(delta)).zip(0..tile.queries)
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
            let (seen, bend) = (&mut scores[begin..end], &mut bend[begin..end]);
            logits(heads, head, query, tile.block + begin, seen, capped.then_some(&mut *bend));
            for t in seen.iter_mut() {
                *t = (*t - *lse).exp_of_nonpositive();
            }
            if heads.drop.keeps_all() {
                for (p, dp) in scores[from..to].iter().zip(&mut dp[from..to]) {
                    let dt = *p * (*dp - *delta);
                    // By selection, for what arrives at a hidden key may be no number.
                    *dp = if *p != E::Real::ZERO { dt } else { E::Real::ZERO };
                }
            } else {
                let (row, col) = (head.mask_row + query, tile.block + from);
                let draws = heads.drop.draws(row, col, to - from, &mut buffer);
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
                for (dp, bend) in dp[begin..end].iter_mut().zip(bend) {
                    *dp = *dp * *bend;
                }
            }
        }
    }
}
