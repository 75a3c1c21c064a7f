//! The naive formula of `attention`.

use candle_core::{DType, Result, Tensor};
use candle_dropout::functional::AttentionConfig;

use crate::dropout;
use crate::softmax_dropout::{drop_keys, softmax};

/// `o = y · v` with `y` the dropout of the softmax of the scores, or that of the scores whose keys are kept.
pub fn formula(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    config: &AttentionConfig,
    keep: &Tensor,
    drop_scale: f64,
) -> Result<Tensor> {
    let (b, h, queries, d) = q.dims4()?;
    let (_, kv_heads, keys, _) = k.dims4()?;
    let (device, scores) = (q.device(), (b, h, queries, keys));
    // Head h reads key and value head h / (H / Hkv).
    let shared = |x: &Tensor| {
        let group = h / kv_heads;
        x.unsqueeze(2)?.broadcast_as((b, kv_heads, group, keys, d))?.reshape((b, h, keys, d))
    };
    let scale = config.scale.unwrap_or(1. / (d as f64).sqrt());
    let mut t = (q.contiguous()?.matmul(&shared(k)?.t()?.contiguous()?)? * scale)?;
    if let Some(softcap) = config.softcap {
        t = ((t / softcap)?.tanh()? * softcap)?;
    }
    let diagonal = |i: usize| i as i64 + keys as i64 - queries as i64;
    if let Some(slopes) = &config.alibi_slopes {
        let distance = |i: usize, j: usize| (diagonal(i) - j as i64).abs() as f64;
        let distances: Vec<_> =
            (0..queries).flat_map(|i| (0..keys).map(move |j| distance(i, j))).collect();
        let distances = Tensor::from_vec(distances, (1, queries, keys), device)?;
        let slopes = slopes.to_dtype(DType::F64)?.reshape((h, 1, 1))?;
        t = t.broadcast_sub(&slopes.broadcast_mul(&distances)?.to_dtype(t.dtype())?)?;
    }
    let lengths = match &config.key_lengths {
        Some(lengths) => lengths.to_vec1::<u32>()?,
        None => vec![keys as u32; b],
    };
    let sees = |length: u32, i: usize, j: usize| {
        let ahead = j as i64 - diagonal(i);
        let far = |limit: usize| ahead.unsigned_abs() > limit as u64;
        let inside = config.window.is_none_or(|(l, r)| !far(if ahead < 0 { l } else { r }));
        u8::from(j < length as usize && inside && !(config.causal && ahead > 0))
    };
    let visible: Vec<_> = lengths
        .iter()
        .flat_map(|&length| (0..queries).flat_map(move |i| (0..keys).map(move |j| (length, i, j))))
        .map(|(length, i, j)| sees(length, i, j))
        .collect();
    let visible = Tensor::from_vec(visible, (b, 1, queries, keys), device)?;
    let t = drop_keys(&t, &visible.broadcast_as(scores)?.contiguous()?)?;
    let y = match config.drop_key {
        true => softmax(&drop_keys(&t, keep)?)?,
        false => dropout::formula(&softmax(&t)?, keep, drop_scale)?,
    };
    y.matmul(&shared(v)?)
}
