//! Tiles of scores that never leave the caches: see [`fwd`] and [`bwd`].

mod backward;
mod decode;
mod forward;
mod heads;
mod tile;

use candle_core::{Result, Storage, Tensor};

use super::NAME;
use super::shape::{Attention, GradLayout, Inputs, Saved};
use crate::cpu::{Element, Real, Scattered, for_float_dtype, map_tasks, panel, scattered, storage};
use crate::input::Input;
use crate::mask::RUN;
use backward::{Backward, Given, add_stripes, dots};
use forward::Forward;
use heads::{Head, Heads, Output, Rows};

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

/// `o`, and of each row the largest `t` and the reciprocal of the sum of `exp(t - max)`.
///
/// A task holds the running sums of a stripe of queries and takes the keys block by block. A few queries, all of a text
/// that is generated, go another way: see [`decode`].
pub(super) fn fwd(attention: &Attention, qkv: [&Tensor; 3]) -> Result<[Storage; 2]> {
    let inputs = Inputs::new(attention, qkv);
    for_float_dtype!(inputs.q, |E| forward::<E>(attention, &inputs))
}

fn forward<E: Element>(attention: &Attention, inputs: &Inputs<'_>) -> Result<[Storage; 2]> {
    let heads = Heads::<E>::new(attention, inputs)?;
    let args = &attention.args;
    let (queries, n_heads) = (heads.queries, args.batches as usize * args.heads as usize);
    if queries < decode::QUERIES {
        let fill = |[o]: &[Scattered<E>; 1]| decode::decode(&heads, &output(attention, o));
        // SAFETY: every row of all heads is finished, each once.
        let ([o], softmax) = unsafe { scattered([n_heads * queries * heads.head_size], fill) };
        return Ok([storage(o), Storage::Cpu(E::Real::storage(softmax))]);
    }
    let tiles = queries.div_ceil(QUERIES);
    let stripe = QUERIES * (n_heads * tiles / TASKS).clamp(1, STRIPE);
    let stripes = queries.div_ceil(stripe);
    let fill = |[o]: &[Scattered<E>; 1]| {
        let o = output(attention, o);
        let state = || Forward::new(&heads, stripe.min(queries));
        map_tasks((n_heads * stripes, heads.in_parallel()), state, |state, task| {
            let start = task % stripes * stripe;
            let head = heads.head(task / stripes);
            state.run(&heads, &head, start, queries.min(start + stripe), &o)
        })
    };
    // SAFETY: the stripes of all heads cover every row of `o`, each once.
    let ([o], softmax) = unsafe { scattered([n_heads * queries * heads.head_size], fill) };
    Ok([storage(o), Storage::Cpu(E::Real::storage(softmax.concat()))])
}

/// The rows of `o`, all of its memory.
fn output<'a, E>(attention: &Attention, part: &'a Scattered<E>) -> Output<'a, E> {
    let cols = attention.args.head_size as usize;
    Output { part, start: 0, strides: attention.layout.o, cols }
}

/// `dq`, `dk` and `dv`, or the one tensor that holds them all.
///
/// A task takes every `stripes`-th block of keys of one key and value head; each block meets all queries
/// of the group that see it: five products a tile. `dk` and `dv` are summed in the order of the queries,
/// `dq` in that of the blocks; where there are several stripes, their sums are added in order at the end.
pub(super) fn bwd(
    attention: &Attention,
    qkv: [&Tensor; 3],
    saved: Saved<'_>,
    grads: &GradLayout,
) -> Result<Vec<Storage>> {
    let inputs = Inputs::new(attention, qkv);
    for_float_dtype!(inputs.q, |E| backward::<E>(attention, &inputs, saved, grads))
}

fn backward<E: Element>(
    attention: &Attention,
    inputs: &Inputs<'_>,
    Saved { o, softmax, dout }: Saved<'_>,
    grads: &GradLayout,
) -> Result<Vec<Storage>> {
    let heads = Heads::<E>::new(attention, inputs)?;
    let args = &attention.args;
    let (batches, queries, cols) = (args.batches as usize, heads.queries, heads.head_size);
    let n_kv_heads = batches * args.kv_heads as usize;
    let [o, softmax, dout] = [o, softmax, dout].map(|x| Input::new(NAME, x));
    let o = Rows::<E>::new(&o, 0, attention.layout.o, cols)?;
    let dout = Rows::<E>::new(&dout, 0, grads.strides.o, cols)?;
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
    let given = Given { dout, softmax: softmax.reals()?, delta: &delta.concat() };
    let stripes = (TASKS / n_kv_heads).clamp(1, (args.keys as usize).div_ceil(KEYS));
    let q_len = n_kv_heads * heads.group * queries * cols;
    let kv_len = n_kv_heads * args.keys as usize * cols;
    let (lens, starts) = match grads.packed {
        None => ([q_len, kv_len, kv_len], [(0, 0), (1, 0), (2, 0)]),
        Some([k, v]) => ([q_len + 2 * kv_len, 0, 0], [(0, 0), (0, k), (0, v)]),
    };
    let fill = |parts: &[Scattered<E>; 3]| {
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
                state.run(&heads, &given, task / stripes, (task % stripes, stripes), &dk, &dv);
                if stripes > 1 {
                    return state.dq.clone();
                }
                state.write_dq(&heads, task, &dq);
                Vec::new()
            },
        );
        if stripes > 1 {
            let add = |(): &mut (), kv_head: usize| {
                add_stripes(&heads, kv_head, &sums[kv_head * stripes..][..stripes], &dq);
            };
            map_tasks((n_kv_heads, heads.in_parallel()), || (), add);
        }
    };
    // SAFETY: the blocks of all heads cover every row of `dk` and `dv`, and `dq` is written by the only
    // stripe or in the sum over stripes, each row once.
    let (vectors, ()) = unsafe { scattered(lens, fill) };
    let wanted = if grads.packed.is_some() { 1 } else { 3 };
    Ok(vectors.into_iter().take(wanted).map(storage).collect())
}

/// Selects -inf for the keys that are dropped. They have a weight of 0 when the dropout of weights comes to them, so
/// that nothing else differs.
#[inline(always)]
fn hide_dropped<E: Element>(heads: &Heads<'_, E>, draws: &[u16], t: &mut [E::Real]) {
    for (t, draw) in t.iter_mut().zip(draws) {
        *t = if heads.drop.keeps(*draw) { *t } else { E::Real::NEG_INFINITY };
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
