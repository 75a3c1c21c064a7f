//! `o = dropout(softmax(scale * q·kᵀ)) · v`, tile by tile.

mod config;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use std::sync::OnceLock;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CustomOp1, CustomOp3, DType, Device, Layout, Result, Shape, Storage, Tensor, bail,
};

use crate::claim::{Input, detached};
use crate::elem::{check_alike, check_dtype};
use crate::mask::{DropMask, MaskArgs};
pub use config::AttentionConfig;
use config::UNBOUNDED;
pub(crate) use config::{AttentionArgs, AttentionLayout, HeadStrides};

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
/// with `ds` what `dt` becomes on its way back through the soft cap. See [`AttentionConfig`] for which keys
/// are visible. No score is stored: backward computes them again from `q`, `k` and one number a query, the
/// logarithm of the softmax's denominator.
///
/// # Shapes
/// `q` of shape `[B, H, Sq, D]`, `k` and `v` `[B, Hkv, Sk, D]`, where `Hkv` divides `H`: head `h` attends to
/// head `h / (H / Hkv)` of `k` and `v` (multi-query and grouped-query attention). The result has the shape of
/// `q`, and lies in memory like it: where `q` is a `[B, S, H, D]` tensor, transposed, so is the result, and
/// transposing it back costs nothing. No view is copied whose elements along `D` are neighbours.
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
/// A query that sees no key gives zeros and zero gradients. On the CPU a weight of 0, be it hidden, dropped
/// or too small for a number, passes nothing on, even if the value or gradient it meets is infinite or NaN.
/// On CUDA no infinity or NaN in a key or value beyond `key_lengths`, or one that no query of a tile sees,
/// reaches a result; what arrives infinite or NaN in a query or in the gradient of its result may reach the
/// gradients of the keys and values that share a tile with one it sees.
///
/// # Errors
/// A tensor is no float tensor, or f64 on CUDA; dtypes or devices differ; a tensor has not four dimensions;
/// `k` or `v` do not fit `q` or one another; `scale` is not finite as an f32; `softcap` is not finite and
/// positive; `key_lengths` is not u32 of shape `[B]` or `alibi_slopes` not f32 of shape `[H]`, or one is on
/// another device or tracks a gradient; the window of `drop` does not fit `[B, H, Sq, Sk]`; a size is
/// 2^31 - 256 or more. On CUDA also: `D` is above 256, or the dtype is a half and the GPU, or what the
/// crate was built for, has a compute capability below 8.0.
///
/// Dao, "FlashAttention-2", 2023, arXiv 2307.08691 (algorithms 1 and 2); Shazeer, "Fast Transformer
/// decoding: one write-head is all you need", 2019, arXiv 1911.02150; Ainslie et al., "GQA", 2023, arXiv
/// 2305.13245.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{AttentionConfig, DropMask, attention};
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
        check_alike(NAME, arg, tensor, q)?;
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
        bail!("{NAME}: k: expected [{b}, Hkv, Sk, {d}] like q {:?}, got {:?}", q.dims(), k.dims())
    }
    if v.dims() != k.dims() {
        bail!("{NAME}: v: expected shape {:?} like k, got {:?}", k.dims(), v.dims())
    }
    let op = Attention::new([b, h, kv_heads, queries, keys, d], config, drop, q.device())?;
    let (q, k, v) = (with_rows(q)?, with_rows(k)?, with_rows(v)?);
    let rows_before_heads = q.stride()[1] < q.stride()[2];
    let op = op.laid_out([&q, &k, &v].map(|x| strides(x.stride())), rows_before_heads);
    let o = q.apply_op3(&k, &v, op)?;
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
/// use candle_dropout::{AttentionConfig, DropMask, attention_qkv};
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
    let op = Attention::new([b, heads, kv_heads, s, s, d], config, drop, qkv.device())?;
    let qkv = with_rows(qkv)?;
    let of_heads = strides(&transposed(qkv.stride()));
    qkv.apply_op1(op.laid_out([of_heads; 3], true))
}

/// A view whose elements along the last dimension are neighbours.
fn with_rows(x: &Tensor) -> Result<Tensor> {
    match x.dims() {
        [.., d] if *d > 1 && x.stride().last() != Some(&1) => x.contiguous(),
        _ => Ok(x.clone()),
    }
}

/// Of a tensor `[B, H, S, D]`.
fn strides(strides: &[usize]) -> HeadStrides {
    HeadStrides { batch: strides[0] as u64, head: strides[1] as u64, row: strides[2] as u64 }
}

/// `[B, S, H, D]` to `[B, H, S, D]`, or back.
fn transposed(dims: &[usize]) -> [usize; 4] {
    [dims[0], dims[2], dims[1], dims[3]]
}

/// The tensors that a pass reads: their storages, and where the first element of each lies.
pub(super) struct Operands<'a, S> {
    pub(super) q: (&'a S, usize),
    pub(super) k: (&'a S, usize),
    pub(super) v: (&'a S, usize),
    pub(super) key_lengths: Option<(&'a S, usize)>,
    pub(super) alibi_slopes: Option<(&'a S, usize)>,
}

/// Where a backward pass puts its results.
#[derive(Clone, Copy, Debug)]
pub(super) struct GradLayout {
    /// Of dq, dk, dv and, as o, of the gradient that arrives.
    pub(super) strides: AttentionLayout,
    /// All three lie in one tensor, dk and dv from these elements on; else each in its own.
    pub(super) packed: Option<[usize; 2]>,
}

/// An attention of known shape and, once [`Attention::laid_out`], strides.
struct Attention {
    args: AttentionArgs,
    layout: AttentionLayout,
    drop: MaskArgs,
    key_lengths: Option<Tensor>,
    alibi_slopes: Option<Tensor>,
    /// The result is `[B, S, H, D]`, not `[B, H, S, D]`.
    rows_before_heads: bool,
    /// Of each query; what backward needs beside the tensors.
    lse: OnceLock<Storage>,
}

impl Attention {
    fn new(
        [b, h, kv_heads, queries, keys, d]: [usize; 6],
        config: &AttentionConfig,
        drop: &DropMask,
        device: &Device,
    ) -> Result<Self> {
        if device.is_cuda() && d > 256 {
            bail!(
                "{NAME}: q: expected a head size (last dimension) of at most 256 on CUDA, got {d}; use \
                 more heads or move it to the CPU"
            )
        }
        if h > 0 && (kv_heads == 0 || h % kv_heads != 0) {
            bail!(
                "{NAME}: k: expected a number of heads that divides the {h} of q, got {kv_heads}; every \
                 head of k and v serves the same number of heads"
            )
        }
        let size = |name: &str, size: usize| match u32::try_from(size) {
            // Kernels count in i32, up to a tile beyond the end.
            Ok(size) if size < (1 << 31) - 256 => Ok(size),
            _ => {
                bail!("{NAME}: {name}: expected less than 2^31 - 256, got {size}; split the tensor")
            }
        };
        let scale = config.scale.unwrap_or(1. / (d.max(1) as f64).sqrt());
        if !(scale as f32).is_finite() {
            bail!("{NAME}: scale: expected a finite f32, got {scale}; the usual one is 1/sqrt(D)")
        }
        if let Some(softcap) = config.softcap
            && !(softcap as f32 > 0. && (softcap as f32).is_finite())
        {
            bail!(
                "{NAME}: softcap: expected a finite number above 0, got {softcap}; None is no cap"
            )
        }
        let limit = |keys: usize| u32::try_from(keys).unwrap_or(UNBOUNDED);
        let (left, right) =
            config.window.map_or((UNBOUNDED, UNBOUNDED), |(l, r)| (limit(l), limit(r)));
        let args = AttentionArgs {
            scale,
            softcap: config.softcap.unwrap_or(0.),
            batches: size("B", b)?,
            heads: size("H", h)?,
            kv_heads: size("Hkv", kv_heads)?,
            queries: size("Sq", queries)?,
            keys: size("Sk", keys)?,
            head_size: size("D", d)?,
            left,
            right: if config.causal { 0 } else { right },
        };
        let constant = |name, tensor: &Option<Tensor>, len, dtype| {
            tensor.as_ref().map(|x| constant(name, x, len, dtype, device)).transpose()
        };
        let none = HeadStrides { batch: 0, head: 0, row: 0 };
        Ok(Self {
            args,
            layout: AttentionLayout { q: none, k: none, v: none, o: none },
            drop: drop.args(NAME, &[b, h, queries, keys])?,
            key_lengths: constant("key_lengths", &config.key_lengths, b, DType::U32)?,
            alibi_slopes: constant("alibi_slopes", &config.alibi_slopes, h, DType::F32)?,
            rows_before_heads: false,
            lse: OnceLock::new(),
        })
    }

    fn laid_out(mut self, [q, k, v]: [HeadStrides; 3], rows_before_heads: bool) -> Self {
        let o = self.contiguous(self.args.heads, self.args.queries, rows_before_heads);
        self.layout = AttentionLayout { q, k, v, o };
        self.rows_before_heads = rows_before_heads;
        self
    }

    /// Of a `[B, heads, rows, D]` tensor that lies as `[B, rows, heads, D]` or as it stands.
    fn contiguous(&self, heads: u32, rows: u32, rows_before_heads: bool) -> HeadStrides {
        let (heads, rows, d) = (u64::from(heads), u64::from(rows), u64::from(self.args.head_size));
        match rows_before_heads {
            true => HeadStrides { batch: rows * heads * d, head: d, row: heads * d },
            false => HeadStrides { batch: heads * rows * d, head: rows * d, row: d },
        }
    }

    /// Of the result.
    fn shape(&self) -> Shape {
        let AttentionArgs { batches, heads, queries, head_size, .. } = self.args;
        let dims = [batches, heads, queries, head_size].map(|dim| dim as usize);
        Shape::from_dims(&if self.rows_before_heads { transposed(&dims) } else { dims })
    }

    /// Nothing to compute: no element, or nothing that passes.
    fn is_zero(&self) -> bool {
        self.shape().elem_count() == 0 || self.args.keys == 0 || self.drop.drops_all()
    }

    /// Where queries, keys and values begin in a tensor that holds them all.
    fn packed_starts(&self, head_stride: usize) -> [usize; 3] {
        let (heads, kv_heads) = (self.args.heads as usize, self.args.kv_heads as usize);
        [0, heads * head_stride, (heads + kv_heads) * head_stride]
    }

    /// The arguments of a pass; `start` gives the storage of a tensor and where its first element lies.
    fn operands<'a, 'i, S>(
        &self,
        [q, k, v]: [(&'a S, usize); 3],
        constants: &'a [Option<Input<'i>>; 2],
        start: Start<'i, S>,
    ) -> Result<Operands<'a, S>> {
        let [key_lengths, alibi_slopes] =
            constants.each_ref().map(|x| x.as_ref().map(|x| start(x, NAME)).transpose());
        Ok(Operands { q, k, v, key_lengths: key_lengths?, alibi_slopes: alibi_slopes? })
    }

    fn constants(&self) -> [Option<Input<'_>>; 2] {
        [&self.key_lengths, &self.alibi_slopes].map(|tensor| tensor.as_ref().map(Input::new))
    }

    fn cpu_pass(&self, qkv: [(&CpuStorage, usize); 3]) -> Result<(CpuStorage, Shape)> {
        if self.is_zero() {
            let (q, _) = qkv[0];
            return Ok((q.device().zeros_impl(&self.shape(), q.dtype())?, self.shape()));
        }
        let constants = self.constants();
        let operands = self.operands(qkv, &constants, Input::cpu_start)?;
        let (o, lse) = cpu::fwd(&self.args, &self.layout, &self.drop, &operands)?;
        self.lse.get_or_init(|| Storage::Cpu(lse));
        Ok((o, self.shape()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_pass(&self, qkv: [(&CudaStorage, usize); 3]) -> Result<(CudaStorage, Shape)> {
        if self.is_zero() {
            let (q, _) = qkv[0];
            return Ok((q.device().zeros_impl(&self.shape(), q.dtype())?, self.shape()));
        }
        let constants = self.constants();
        let operands = self.operands(qkv, &constants, Input::cuda_start)?;
        let (o, lse) = cuda::fwd(&self.args, &self.layout, &self.drop, &operands)?;
        self.lse.get_or_init(|| Storage::Cuda(lse));
        Ok((o, self.shape()))
    }

    /// `dq`, `dk` and `dv`, or the one tensor that holds them; `starts` says where q, k and v lie from the
    /// first element of their tensors on.
    fn grads(
        &self,
        inputs: [&Tensor; 3],
        starts: [usize; 3],
        o: &Tensor,
        dout: &Tensor,
        grads: GradLayout,
    ) -> Result<Vec<Storage>> {
        let dout = with_rows(dout)?;
        let o_strides = match self.rows_before_heads {
            true => strides(&transposed(dout.stride())),
            false => strides(dout.stride()),
        };
        let strides = AttentionLayout { o: o_strides, ..grads.strides };
        let grads = GradLayout { strides, ..grads };
        let (args, layout, drop) = (&self.args, &self.layout, &self.drop);
        let constants = self.constants();
        let (inputs, o, dout) = (inputs.map(Input::new), Input::new(o), Input::new(&dout));
        match self.lse.get() {
            Some(Storage::Cpu(lse)) => {
                let qkv = offset(&inputs, starts, Input::cpu_start)?;
                let operands = self.operands(qkv, &constants, Input::cpu_start)?;
                let (o, dout) = (o.cpu_start(NAME)?, dout.cpu_start(NAME)?);
                let grads = cpu::bwd(args, layout, &grads, drop, &operands, lse, o, dout)?;
                Ok(grads.into_iter().map(Storage::Cpu).collect())
            }
            #[cfg(feature = "cuda")]
            Some(Storage::Cuda(lse)) => {
                let qkv = offset(&inputs, starts, Input::cuda_start)?;
                let operands = self.operands(qkv, &constants, Input::cuda_start)?;
                let (o, dout) = (o.cuda_start(NAME)?, dout.cuda_start(NAME)?);
                let grads = cuda::bwd(args, layout, &grads, drop, &operands, lse, o, dout)?;
                Ok(grads.into_iter().map(Storage::Cuda).collect())
            }
            _ => {
                bail!("{NAME}: backward: expected a forward pass before it, got none; apply the op")
            }
        }
    }
}

/// What gives the storage of a tensor and where its first element lies in it.
type Start<'i, S> = for<'a, 'b> fn(&'a Input<'i>, &'b str) -> Result<(&'a S, usize)>;

/// The storages of q, k and v, and where each begins.
fn offset<'a, 'i, S>(
    inputs: &'a [Input<'i>; 3],
    starts: [usize; 3],
    start: Start<'i, S>,
) -> Result<[(&'a S, usize); 3]> {
    let at =
        |i: usize| start(&inputs[i], NAME).map(|(storage, first)| (storage, first + starts[i]));
    Ok([at(0)?, at(1)?, at(2)?])
}

/// A tensor of `len` numbers that no gradient flows to.
fn constant(arg: &str, x: &Tensor, len: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    if x.dtype() != dtype || x.dims() != [len] {
        bail!(
            "{NAME}: {arg}: expected {dtype:?} of shape [{len}], got {:?} of shape {:?}; convert it with \
             to_dtype and reshape",
            x.dtype(),
            x.dims()
        )
    }
    if !x.device().same_device(device) {
        bail!(
            "{NAME}: {arg}: expected device {:?} like q, got {:?}; move it with to_device",
            device.location(),
            x.device().location()
        )
    }
    if x.track_op() {
        bail!("{NAME}: {arg}: expected a constant, got a tensor that tracks a gradient; detach it")
    }
    x.contiguous()
}

/// Of queries, keys and values in three tensors.
impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k) = ((q, q_layout.start_offset()), (k, k_layout.start_offset()));
        self.cpu_pass([q, k, (v, v_layout.start_offset())])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (q, k) = ((q, q_layout.start_offset()), (k, k_layout.start_offset()));
        self.cuda_pass([q, k, (v, v_layout.start_offset())])
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let wanted = |x: &Tensor, grad: Tensor| x.track_op().then_some(grad);
        if self.is_zero() {
            let zeros = |x: &Tensor| Ok::<_, candle_core::Error>(wanted(x, x.zeros_like()?));
            return Ok((zeros(q)?, zeros(k)?, zeros(v)?));
        }
        // Contiguous whatever the arguments are: candle adds them to contiguous zeros.
        let of_q = self.contiguous(self.args.heads, self.args.queries, false);
        let of_kv = self.contiguous(self.args.kv_heads, self.args.keys, false);
        let strides = AttentionLayout { q: of_q, k: of_kv, v: of_kv, o: of_q };
        let grads = GradLayout { strides, packed: None };
        let mut grads = self.grads([q, k, v], [0; 3], o, dout, grads)?.into_iter();
        let mut grad =
            |x: &Tensor| grads.next().and_then(|grad| wanted(x, detached(grad, x.shape())));
        Ok((grad(q), grad(k), grad(v)))
    }
}

/// Of all in one tensor.
impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let start = layout.start_offset();
        self.cpu_pass(self.packed_starts(layout.stride()[2]).map(|at| (qkv, start + at)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, qkv: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let start = layout.start_offset();
        self.cuda_pass(self.packed_starts(layout.stride()[2]).map(|at| (qkv, start + at)))
    }

    fn bwd(&self, qkv: &Tensor, o: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        if self.is_zero() {
            return qkv.zeros_like().map(Some);
        }
        let AttentionArgs { heads, kv_heads, queries, head_size, .. } = self.args;
        let strides = self.contiguous(heads + 2 * kv_heads, queries, true);
        let [_, k, v] = self.packed_starts(head_size as usize);
        let strides = AttentionLayout { q: strides, k: strides, v: strides, o: strides };
        let grads = GradLayout { strides, packed: Some([k, v]) };
        let starts = self.packed_starts(qkv.stride()[2]);
        let grads = self.grads([qkv; 3], starts, o, dout, grads)?;
        Ok(grads.into_iter().next().map(|grad| detached(grad, qkv.shape())))
    }
}
