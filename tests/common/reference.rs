//! Naive formulas that take a mask, for tests and benches; no op uses them.
//!
//! This is test support and outside the crate's promise of stability: it may change in any release.
//!
//! Each is a chain of candle operations, written as the formula reads, so it works in every float
//! dtype: in f64 it is the reference, in the dtype of an op it shows which error the op may have. Its
//! gradients are candle's own. `keep` is 1 where an element is kept and 0 where it is dropped (u8, as
//! [`DropMask::to_tensor`](candle_dropout::DropMask::to_tensor) gives it); `drop_scale` is
//! [`Rate::scale`](candle_dropout::Rate::scale).

use candle_core::{D, DType, Device, Result, Tensor};

use candle_dropout::{
    Activation, AttentionConfig, AttentionMask, CrossEntropyConfig, Norm, RopeStyle,
};

/// `keep ? x * drop_scale : 0`; see [`dropout`](candle_dropout::dropout).
///
/// # Errors
/// `keep` has not the shape of `x`.
pub fn dropout(x: &Tensor, keep: &Tensor, drop_scale: f64) -> Result<Tensor> {
    let kept = (x * drop_scale)?;
    keep.where_cond(&kept, &kept.zeros_like()?)
}

/// `residual + (keep ? (x + bias) * drop_scale : 0)`; see [`dropout_add`](candle_dropout::dropout_add).
///
/// # Errors
/// The shapes or dtypes differ.
pub fn dropout_add(
    x: &Tensor,
    residual: &Tensor,
    bias: Option<&Tensor>,
    keep: &Tensor,
    drop_scale: f64,
) -> Result<Tensor> {
    let branch = match bias {
        Some(bias) if x.rank() == 0 => (x + bias.squeeze(0)?)?,
        Some(bias) => x.broadcast_add(bias)?,
        None => x.clone(),
    };
    let kept = (residual + (branch * drop_scale)?)?;
    keep.where_cond(&kept, residual)
}

/// `keep ? act(x + bias) * drop_scale : 0`; see [`activation_dropout`](candle_dropout::activation_dropout).
///
/// # Errors
/// The shapes or dtypes differ.
pub fn activation_dropout(
    x: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    keep: &Tensor,
    drop_scale: f64,
) -> Result<Tensor> {
    let u = match bias {
        Some(bias) => x.broadcast_add(bias)?.reshape(x.shape())?,
        None => x.clone(),
    };
    let halves = || u.chunk(2, D::Minus1);
    let a = match activation {
        Activation::GeluTanh => gelu(&u)?,
        Activation::GeluErf => {
            (&u * ((&u * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.)?)?.affine(0.5, 0.)?
        }
        Activation::Silu => u.silu()?,
        // Candle's own has the slope 1 at 0.
        Activation::Relu => (&u * u.gt(0.)?.to_dtype(u.dtype())?)?,
        Activation::SwiGlu => (halves()?[0].silu()? * &halves()?[1])?,
        Activation::GeGlu => (gelu(&halves()?[0])? * &halves()?[1])?,
    };
    dropout(&a, keep, drop_scale)
}

/// LayerNorm or RMSNorm over the last dimension; see [`Norm`].
///
/// # Errors
/// The shapes or dtypes differ.
pub fn norm(z: &Tensor, norm: &Norm) -> Result<Tensor> {
    if z.rank() == 0 {
        return self::norm(&z.unsqueeze(0)?, norm)?.squeeze(0);
    }
    let centered = match norm.remove_mean() {
        true => z.broadcast_sub(&z.mean_keepdim(D::Minus1)?)?,
        false => z.clone(),
    };
    let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
    let n = centered.broadcast_div(&(variance + norm.eps())?.sqrt()?)?;
    let n = n.broadcast_mul(norm.weight())?;
    match norm.bias() {
        Some(bias) => n.broadcast_add(bias),
        None => Ok(n),
    }
}

/// `z = residual + (keep ? (x + bias) * drop_scale : 0)` and its norm; see
/// [`dropout_add_norm`](candle_dropout::dropout_add_norm).
///
/// # Errors
/// The shapes or dtypes differ.
pub fn dropout_add_norm(
    x: &Tensor,
    residual: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &Norm,
    keep: &Tensor,
    drop_scale: f64,
) -> Result<(Tensor, Tensor)> {
    let z = match (residual, bias) {
        (Some(residual), bias) => dropout_add(x, residual, bias, keep, drop_scale)?,
        (None, Some(bias)) => {
            dropout(&x.broadcast_add(bias)?.reshape(x.shape())?, keep, drop_scale)?
        }
        (None, None) => dropout(x, keep, drop_scale)?,
    };
    let n = self::norm(&z, norm)?;
    Ok((z, n))
}

/// `keep ? softmax(scale * scores + mask) * drop_scale : 0`, with zeros in rows of which every key is
/// masked; see [`softmax_dropout`](candle_dropout::softmax_dropout).
///
/// # Errors
/// The shapes or dtypes differ.
pub fn softmax_dropout(
    scores: &Tensor,
    scale: f64,
    mask: &AttentionMask,
    keep: &Tensor,
    drop_scale: f64,
) -> Result<Tensor> {
    if scores.rank() == 0 {
        let (row, keep) = (scores.unsqueeze(0)?, keep.unsqueeze(0)?);
        return softmax_dropout(&row, scale, mask, &keep, drop_scale)?.squeeze(0);
    }
    let scaled = (scores * scale)?;
    let t = match mask {
        AttentionMask::None => scaled,
        AttentionMask::Additive(additive) => scaled.broadcast_add(additive)?,
        AttentionMask::Causal => {
            let masked = scaled.ones_like()?.affine(0., f64::NEG_INFINITY)?;
            let visible = causal(scaled.dim(D::Minus2)?, scaled.dim(D::Minus1)?, scores.device())?;
            visible.broadcast_as(scaled.shape())?.where_cond(&scaled, &masked)?
        }
    };
    dropout(&softmax(&t)?, keep, drop_scale)
}

/// Over the last dimension, with zeros in rows of which every element is -inf.
fn softmax(t: &Tensor) -> Result<Tensor> {
    let max = t.max_keepdim(D::Minus1)?.detach();
    let max = max.eq(f64::NEG_INFINITY)?.where_cond(&max.zeros_like()?, &max)?;
    let e = t.broadcast_sub(&max)?.exp()?;
    let sum = e.sum_keepdim(D::Minus1)?;
    let sum = sum.eq(0.)?.where_cond(&sum.ones_like()?, &sum)?;
    e.broadcast_div(&sum)
}

/// `o = y · v` with `y` the dropout of the softmax of the scores; see [`attention`](candle_dropout::attention()).
///
/// # Errors
/// The shapes or dtypes differ.
pub fn attention(
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
    let hidden = t.ones_like()?.affine(0., f64::NEG_INFINITY)?;
    let t = visible.broadcast_as(scores)?.contiguous()?.where_cond(&t, &hidden)?;
    dropout(&softmax(&t)?, keep, drop_scale)?.matmul(&shared(v)?)
}

/// `residual[n] + (keep[n] ? x[n] * drop_scale : 0)`; see [`drop_path_add`](candle_dropout::drop_path_add).
///
/// `keep` has one entry for each sample, or one for all.
///
/// # Errors
/// The shapes or dtypes differ.
pub fn drop_path_add(
    x: &Tensor,
    residual: &Tensor,
    keep: &Tensor,
    drop_scale: f64,
) -> Result<Tensor> {
    let mut per_sample = vec![1; x.rank()];
    if let Some(samples) = per_sample.first_mut() {
        *samples = keep.elem_count();
    }
    let keep = keep.reshape(per_sample)?.broadcast_as(x.shape())?;
    dropout_add(x, residual, None, &keep, drop_scale)
}

/// Mean of `-(1 - eps) log p[target] - eps / V Σ log p` over the rows whose target is not ignored, with
/// `p = softmax(logits)`; see [`cross_entropy`](candle_dropout::cross_entropy()).
///
/// # Errors
/// The shapes differ, or a target is no class.
pub fn cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    config: &CrossEntropyConfig,
) -> Result<Tensor> {
    let (rows, classes) = (targets.elem_count(), logits.dim(D::Minus1)?);
    let (logits, targets) = (logits.reshape((rows, classes))?, targets.flatten_all()?);
    let targets = targets.to_dtype(DType::I64)?;
    let counts = match config.ignore_index {
        Some(ignored) => targets.ne(ignored)?,
        None => targets.ones_like()?.to_dtype(DType::U8)?,
    };
    let classes_only = counts.where_cond(&targets, &targets.zeros_like()?)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let log_p = shifted.broadcast_sub(&log_sum)?;
    let of_target = log_p.gather(&classes_only.unsqueeze(1)?, 1)?.squeeze(1)?;
    let eps = config.label_smoothing;
    let losses = ((of_target * (eps - 1.))? - (log_p.mean(D::Minus1)? * eps)?)?;
    let losses = counts.where_cond(&losses, &losses.zeros_like()?)?;
    let count = counts.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
    // Candle ends the graph at a multiplication by 0.
    let mean = losses.sum_all()?.affine(1. / count.max(1.), 0.)?;
    mean.to_dtype(if logits.dtype() == DType::F64 { DType::F64 } else { DType::F32 })
}

/// `(x1 cos - x2 sin, x1 sin + x2 cos)` for each pair; see [`rope`](candle_dropout::rope()).
///
/// # Errors
/// The shapes or dtypes differ.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, style: RopeStyle) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    // Tables for each batch entry are those of all its heads.
    let is_per_head = cos.rank() == 3 && x.rank() == 4;
    let table = |table: &Tensor| if is_per_head { table.unsqueeze(1) } else { Ok(table.clone()) };
    let (cos, sin) = (table(cos)?, table(sin)?);
    let rotated = |x1: &Tensor, x2: &Tensor| -> Result<[Tensor; 2]> {
        let y1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
        let y2 = (x1.broadcast_mul(&sin)? + x2.broadcast_mul(&cos)?)?;
        Ok([y1, y2])
    };
    match style {
        RopeStyle::HalfSplit => {
            let part = |at: usize| x.narrow(D::Minus1, at * half, half);
            Tensor::cat(&rotated(&part(0)?, &part(1)?)?, D::Minus1)
        }
        RopeStyle::Interleaved => {
            let mut pairs = x.dims().to_vec();
            pairs.truncate(x.rank() - 1);
            pairs.extend([half, 2]);
            let pairs = x.reshape(pairs)?;
            let part = |at: usize| pairs.narrow(D::Minus1, at, 1)?.squeeze(D::Minus1);
            Tensor::stack(&rotated(&part(0)?, &part(1)?)?, D::Minus1)?.reshape(x.shape())
        }
    }
}

/// The tanh form; the gradient of candle's own is that of constants rounded to six digits.
fn gelu(u: &Tensor) -> Result<Tensor> {
    let w = (u * u.sqr()?.affine(0.044715, 1.)?)?.affine(std::f64::consts::FRAC_2_PI.sqrt(), 0.)?;
    (u * (w.tanh()? + 1.)?)?.affine(0.5, 0.)
}

/// 1 where query `i` sees key `j`: `j <= i + keys - queries`.
fn causal(queries: usize, keys: usize, device: &Device) -> Result<Tensor> {
    let visible = |i: usize, j: usize| u8::from(j + queries <= i + keys);
    let visible: Vec<_> =
        (0..queries).flat_map(|i| (0..keys).map(move |j| visible(i, j))).collect();
    Tensor::from_vec(visible, (queries, keys), device)
}
