//! `o = dropout(softmax(scale * q·kᵀ)) · v`, tile by tile.

pub(super) mod args;
mod composed;
mod config;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod shape;

use candle_core::{Result, Storage, Tensor, bail};

pub use args::{AttentionArgs, AttentionLayout, AttentionPass, HeadStrides};
pub use config::AttentionConfig;

use crate::check::{check_alike, check_dtype};
use crate::composed::composes;
use crate::graph::{Backward, detached, node, run_pass, zeros};
use crate::mask::DropMask;
use shape::{Attention, GradLayout, Saved, strides, transposed, with_rows};

const NAME: &str = "attention";

/// Attention with dropout on its weights, in memory that grows with the length of the sequence and not
/// with its square.
///
/// ```text
/// s = scale * q·k          s = softcap * tanh(s / softcap)          t = s - slope * |i + Sk - Sq - j|
/// P = softmax(t) over the visible keys          y = keep ? P * drop_scale : 0          o = y · v
/// dP = keep ? (do · v) * drop_scale : 0          dt = P * (dP - Σ do * o)
/// dq = scale * Σ ds k          dk = scale * Σ ds q          dv = Σ y do
/// ```
///
/// with `ds` what `dt` becomes on its way back through the soft cap. With `drop_key` keys are dropped instead, before
/// the softmax: `t = keep ? t : -inf`, and `y = P`. See [`AttentionConfig`] for which keys
/// are visible. No score is stored: backward computes them again from `q`, `k` and two numbers a query, a
/// reference near the largest `t` and 1 over the sum of the exponentials of the distances from it.
///
/// # Shapes
/// `q` of shape `[B, H, Sq, D]`, `k` and `v` `[B, Hkv, Sk, D]`, where `Hkv` divides `H`: head `h` attends to
/// head `h / (H / Hkv)` of `k` and `v` (multi-query and grouped-query attention). The result has the shape of
/// `q`, and lies in memory like it: where `q` is a `[B, S, H, D]` tensor, transposed, so is the result, and
/// transposing it back costs nothing. No view is copied whose elements along `D` are neighbours. Heads come before
/// positions: `[B, S, H, D]` is read as `S` heads of `H` positions, and every size fits; see
/// [`expect_dims`](super::expect_dims).
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for `q`, `k` and `v`. Scores, softmax and sums are f32 (f64 for
/// f64). CUDA computes halves on tensor cores, from compute capability 8.0 on, where weights are rounded to
/// the half before they meet `v`; it takes any `D` up to 256.
///
/// # Randomness
/// The mask is that of shape `[B, H, Sq, Sk]`, so a weight is kept where
/// `dropout(softmax(scores), drop)` keeps it, bit for bit. Backward draws it again.
///
/// A query that sees no key, or whose keys are all dropped, gives zeros and zero gradients. On the CPU a weight of 0, be it hidden, dropped
/// or too small for a number, passes nothing on, even if the value or gradient it meets is infinite or NaN.
/// On CUDA no infinity or NaN in a key or value beyond `key_lengths`, or one that no query of a tile sees,
/// reaches a result; what arrives infinite or NaN in a query or in the gradient of its result may reach the
/// gradients of the keys and values that share a tile with one it sees. On Metal, where all scores are held in
/// memory, none beyond `key_lengths` reaches a result; one that is hidden otherwise may.
///
/// # Errors
/// A tensor is no float tensor, or f64 off the CPU; dtypes or devices differ; a tensor has not four dimensions;
/// `k` or `v` do not fit `q` or one another; `scale` is not finite as an f32; `softcap` is not finite and
/// positive; `key_lengths` is not u32 of shape `[B]` or `alibi_slopes` not f32 of shape `[H]`, or one is on
/// another device or tracks a gradient; on the CPU a length is above `Sk`; the window of `drop` does not fit
/// `[B, H, Sq, Sk]`; a size is 2^31 - 256 or more. On CUDA also: `D` is above 256, or the dtype is a half
/// and the GPU, or what the crate was built for, has a compute capability below 8.0.
///
/// Dao, "FlashAttention-2", 2023, arXiv 2307.08691 (algorithms 1 and 2); Shazeer, "Fast Transformer
/// decoding: one write-head is all you need", 2019, arXiv 1911.02150; Ainslie et al., "GQA", 2023, arXiv
/// 2305.13245.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::DropMask;
/// use candle_dropout::functional::{AttentionConfig, attention};
///
/// # fn main() -> candle_core::Result<()> {
/// let q = Tensor::new(&[[[[0f32, 0.], [0., 8.]]]], &Device::Cpu)?; // [1, 1, 2, 2]
/// let k = Tensor::new(&[[[[5f32, 0.], [5., 0.]]]], &Device::Cpu)?;
/// let v = Tensor::new(&[[[[1f32, 2.], [3., 6.]]]], &Device::Cpu)?;
/// let config = AttentionConfig { causal: true, ..Default::default() };
/// let o = attention(&q, &k, &v, &config, &DropMask::none())?;
/// assert_eq!(o.flatten_all()?.to_vec1::<f32>()?, [1., 2., 2., 4.]);
/// # Ok(())
/// # }
/// ```
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    config: &AttentionConfig,
    drop: &DropMask,
) -> Result<Tensor> {
    check_dtype(NAME, "q", q)?;
    for (arg, tensor) in [("q", q), ("k", k), ("v", v)] {
        check_alike(NAME, arg, tensor, "q", q)?;
        if tensor.rank() != 4 {
            let dims = tensor.dims();
            bail!(
                "{NAME}: {arg}: expected [B, H, S, D], got {dims:?}; reshape it and transpose S and H"
            )
        }
    }
    let (b, h, queries, d) = q.dims4()?;
    let (kv_heads, keys) = (k.dim(1)?, k.dim(2)?);
    if k.dims() != [b, kv_heads, keys, d] {
        bail!(
            "{NAME}: k: expected [{b}, Hkv, Sk, {d}] like q {:?}, got {:?}; reshape it",
            q.dims(),
            k.dims()
        )
    }
    if v.dims() != k.dims() {
        bail!("{NAME}: v: expected shape {:?} like k, got {:?}; reshape it", k.dims(), v.dims())
    }
    if let Some(repeats) = drop.repeats(NAME, q.dims(), Some(0))? {
        return repeats.each(|part| {
            let [q, k, v] = [part.of("q", q)?, part.of("k", k)?, part.of("v", v)?];
            attention(&q, &k, &v, &config.of_repeat(part)?, &part.drop)
        });
    }
    let attention = Attention::new([b, h, kv_heads, queries, keys, d], config, drop, q.device())?;
    if composes(q.device()) {
        let o = composed::attention(&attention, [q, k, v])?;
        // In memory as q lies.
        let rows_before_heads = q.stride()[1] < q.stride()[2];
        return if rows_before_heads {
            o.transpose(1, 2)?.contiguous()?.transpose(1, 2)
        } else {
            Ok(o)
        };
    }
    let qkv = [with_rows(q)?, with_rows(k)?, with_rows(v)?];
    let rows_before_heads = qkv[0].stride()[1] < qkv[0].stride()[2];
    let of_qkv = [0, 1, 2].map(|at| strides(qkv[at].stride()));
    let attention = attention.laid_out(of_qkv, [0; 3], rows_before_heads);
    let (o, softmax) = attention.fwd(qkv.each_ref())?;
    let (shape, again) = (attention.shape(), qkv.each_ref().map(Tensor::detach));
    let o = node(NAME, qkv.each_ref().map(Some), (o, shape), move |back| {
        let (qkv, softmax) = (again.each_ref(), softmax.as_ref());
        // Contiguous whatever the arguments are: candle adds them to contiguous zeros.
        let grads = attention.bwd(qkv, softmax, &back, attention.contiguous_grads())?;
        let mut grads = grads.into_iter();
        Ok([grads.next(), grads.next(), grads.next()])
    })?;
    if rows_before_heads { o.transpose(1, 2) } else { Ok(o) }
}

/// [`attention`] of queries, keys and values in one tensor, as one projection makes them.
///
/// `qkv` of shape `[B, S, H + 2 Hkv, D]`: for each token `heads` queries, then as many keys and as many
/// values as share the rest. The result has shape `[B, S, H, D]`. Nothing is copied, neither here nor on the
/// way back, where one gradient of the shape of `qkv` arises in one piece.
///
/// # Errors
/// Those of [`attention`]; `qkv` has not four dimensions, or its heads cannot be shared out.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::DropMask;
/// use candle_dropout::functional::{AttentionConfig, attention_qkv};
///
/// # fn main() -> candle_core::Result<()> {
/// let (b, s, heads, d) = (2, 5, 4, 8);
/// let qkv = Tensor::zeros((b, s, 3 * heads * d), DType::F32, &Device::Cpu)?; // of a linear layer
/// let qkv = qkv.reshape((b, s, 3 * heads, d))?;
/// let o = attention_qkv(&qkv, heads, &AttentionConfig::default(), &DropMask::none())?;
/// assert_eq!(o.dims(), [b, s, heads, d]);
/// # Ok(())
/// # }
/// ```
pub fn attention_qkv(
    qkv: &Tensor,
    heads: usize,
    config: &AttentionConfig,
    drop: &DropMask,
) -> Result<Tensor> {
    check_dtype(NAME, "qkv", qkv)?;
    let &[b, s, all_heads, d] = qkv.dims() else {
        bail!("{NAME}: qkv: expected [B, S, H + 2 Hkv, D], got {:?}; reshape it", qkv.dims())
    };
    let kv_heads = all_heads.saturating_sub(heads) / 2;
    let is_shared_out = heads.is_multiple_of(kv_heads);
    if heads + 2 * kv_heads != all_heads || !is_shared_out {
        bail!(
            "{NAME}: qkv: expected {heads} heads of queries, and as many of keys as of values, whose \
             number divides that, got {all_heads} in all; give the number of query heads"
        )
    }
    if let Some(repeats) = drop.repeats(NAME, qkv.dims(), Some(0))? {
        return repeats.each(|part| {
            attention_qkv(&part.of("qkv", qkv)?, heads, &config.of_repeat(part)?, &part.drop)
        });
    }
    let attention = Attention::new([b, heads, kv_heads, s, s, d], config, drop, qkv.device())?;
    if composes(qkv.device()) {
        let part = |start, heads| qkv.narrow(2, start, heads)?.transpose(1, 2);
        let (q, k) = (part(0, heads)?, part(heads, kv_heads)?);
        let v = part(heads + kv_heads, kv_heads)?;
        return composed::attention(&attention, [&q, &k, &v])?.transpose(1, 2)?.contiguous();
    }
    let qkv = with_rows(qkv)?;
    let of_heads = strides(&transposed(qkv.stride()));
    let starts = attention.packed_starts(qkv.stride()[2]);
    let attention = attention.laid_out([of_heads; 3], starts, true);
    let (o, softmax) = attention.fwd([&qkv; 3])?;
    let (shape, again) = (attention.shape(), qkv.detach());
    node(NAME, [Some(&qkv)], (o, shape), move |back| {
        let grads =
            attention.bwd([&again; 3], softmax.as_ref(), &back, attention.packed_grads())?;
        Ok([grads.into_iter().next()])
    })
}

impl Attention {
    /// `o`, and what the softmax of each row is made with, if there is anything to compute.
    fn fwd(&self, qkv: [&Tensor; 3]) -> Result<(Storage, Option<Tensor>)> {
        let [q, ..] = qkv;
        if self.is_zero() {
            return Ok((zeros(self.shape(), q.dtype(), q.device())?, None));
        }
        let [o, softmax] = run_pass!(NAME, q, fwd(self, qkv))?;
        Ok((o, Some(detached(softmax, (self.args.rows(), 2)))))
    }

    /// `dq`, `dk` and `dv`, or the one tensor that holds them.
    fn bwd<const N: usize>(
        &self,
        qkv: [&Tensor; 3],
        softmax: Option<&Tensor>,
        back: &Backward<'_, N>,
        grads: GradLayout,
    ) -> Result<Vec<Tensor>> {
        let [q, ..] = qkv;
        let Some(softmax) = softmax else {
            return qkv.into_iter().take(N).map(Tensor::zeros_like).collect();
        };
        let dout = with_rows(back.dy)?;
        let o = match self.rows_before_heads {
            true => strides(&transposed(dout.stride())),
            false => strides(dout.stride()),
        };
        let grads = GradLayout { strides: AttentionLayout { o, ..grads.strides }, ..grads };
        let saved = Saved { o: back.y, softmax, dout: &dout };
        let grads = run_pass!(NAME, q, bwd(self, qkv, saved, &grads))?;
        Ok(grads.into_iter().zip(qkv).map(|(grad, x)| detached(grad, x.shape())).collect())
    }
}
