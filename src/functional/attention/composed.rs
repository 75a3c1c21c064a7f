use candle_core::{Result, Tensor};

use super::args::AttentionArgs;
use super::shape::Attention;
use crate::composed::{Keep, select, times, unmoved_by, wide};
use crate::functional::softmax_dropout::composed::softmax;

/// `q`, `k` and `v` as `[B, H, S, D]`, and so is the result. All scores are held in memory.
///
/// No infinity or NaN in a key or value beyond `key_lengths` reaches a result; one that is hidden otherwise may.
pub(super) fn attention(attention: &Attention, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
    let (b, h, queries, d) = q.dims4()?;
    let (kv_heads, keys) = (k.dim(1)?, k.dim(2)?);
    if attention.is_zero() {
        return unmoved_by([q, k, v].map(Some), &q.zeros_like()?);
    }
    let args = &attention.args;
    let [q_wide, mut k, mut v] = [wide(q)?, wide(k)?, wide(v)?];
    let is_real = attention.key_lengths.as_ref().map(|lengths| {
        let at = Tensor::arange(0, keys as u32, q.device())?.reshape((1, keys))?;
        at.broadcast_lt(&lengths.reshape((b, 1))?) // [B, Sk]
    });
    let is_real = is_real.transpose()?;
    if let Some(is_real) = &is_real {
        let is_real = is_real.reshape((b, 1, keys, 1))?;
        (k, v) = (select(&is_real, &k, 0.)?, select(&is_real, &v, 0.)?);
    }
    // Queries that share their keys are the rows of one matrix.
    let rows = h / kv_heads * queries;
    let q_rows = q_wide.contiguous()?.reshape((b, kv_heads, rows, d))?;
    let scores = q_rows.matmul(&k.contiguous()?.t()?)?.reshape((b, h, queries, keys))?;
    let mut t = times(&scores, args.scale)?;
    if args.softcap != 0. {
        t = ((t / args.softcap)?.tanh()? * args.softcap)?;
    }
    if let Some(slopes) = &attention.alibi_slopes {
        let slopes = slopes.to_dtype(t.dtype())?.reshape((h, 1, 1))?;
        t = t.broadcast_sub(&slopes.broadcast_mul(&distances(args, &t)?)?)?;
    }
    if let Some(seen) = seen(args, &t)? {
        t = select(&seen, &t, f64::NEG_INFINITY)?;
    }
    if let Some(is_real) = is_real {
        t = select(&is_real.reshape((b, 1, 1, keys))?, &t, f64::NEG_INFINITY)?;
    }
    let keep = Keep::new(&attention.drop, t.dims(), t.device())?;
    if args.drops_keys() {
        t = keep.or(&t, f64::NEG_INFINITY)?;
    }
    let y = keep.drop(&softmax(&t)?)?.reshape((b, kv_heads, rows, keys))?;
    y.matmul(&v.contiguous()?)?.reshape(q.shape())?.to_dtype(q.dtype())
}

/// `|i + Sk - Sq - j|`, `[Sq, Sk]`.
fn distances(args: &AttentionArgs, t: &Tensor) -> Result<Tensor> {
    let (queries, keys) = (args.queries as usize, args.keys as usize);
    let at = |rows: usize, first: i64| -> Result<Tensor> {
        let at: Vec<f32> = (0..rows).map(|row| (row as i64 + first) as f32).collect();
        Tensor::from_vec(at, rows, t.device())?.to_dtype(t.dtype())
    };
    let own = at(queries, keys as i64 - queries as i64)?.unsqueeze(1)?;
    own.broadcast_sub(&at(keys, 0)?)?.abs()
}

/// Which keys each query sees, `[Sq, Sk]`, but for the lengths of samples; nothing if it sees all.
fn seen(args: &AttentionArgs, t: &Tensor) -> Result<Option<Tensor>> {
    let (queries, keys) = (args.queries as usize, args.keys as usize);
    if (0..queries).all(|query| args.visible(query, keys) == (0, keys)) {
        return Ok(None);
    }
    let seen = (0..queries).flat_map(|query| {
        let (begin, end) = args.visible(query, keys);
        (0..keys).map(move |key| u8::from((begin..end).contains(&key)))
    });
    Tensor::from_vec(seen.collect::<Vec<_>>(), (queries, keys), t.device()).map(Some)
}
