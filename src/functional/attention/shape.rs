//! An attention of known shape and strides: what its passes are given.

use candle_core::{DType, Device, Result, Shape, Tensor, bail};

use super::args::{AttentionArgs, AttentionLayout, HeadStrides};
use super::{AttentionConfig, NAME};
use crate::check::check_device;
use crate::input::Input;
use crate::mask::{DropMask, MaskArgs};

/// A view whose elements along the last dimension are neighbours.
pub(super) fn with_rows(x: &Tensor) -> Result<Tensor> {
    match x.dims() {
        [.., d] if *d > 1 && x.stride().last() != Some(&1) => x.contiguous(),
        _ => Ok(x.clone()),
    }
}

/// Of a tensor `[B, H, S, D]`.
pub(super) fn strides(strides: &[usize]) -> HeadStrides {
    HeadStrides { batch: strides[0] as u64, head: strides[1] as u64, row: strides[2] as u64 }
}

/// `[B, S, H, D]` to `[B, H, S, D]`, or back.
pub(super) fn transposed(dims: &[usize]) -> [usize; 4] {
    [dims[0], dims[2], dims[1], dims[3]]
}

/// What backward has beside q, k and v.
pub(super) struct Saved<'a> {
    pub(super) o: &'a Tensor,
    /// What the softmax of each row is made with, as forward left it.
    pub(super) softmax: &'a Tensor,
    pub(super) dout: &'a Tensor,
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
pub(super) struct Attention {
    pub(super) args: AttentionArgs,
    pub(super) layout: AttentionLayout,
    /// Where q, k and v begin behind the first elements of their tensors.
    pub(super) starts: [usize; 3],
    pub(super) drop: MaskArgs,
    pub(super) key_lengths: Option<Tensor>,
    pub(super) alibi_slopes: Option<Tensor>,
    /// The result is `[B, S, H, D]`, not `[B, H, S, D]`.
    pub(super) rows_before_heads: bool,
}

impl Attention {
    pub(super) fn new(
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
                 head of k and v serves the same number of heads; if positions come first, [B, S, H, D], \
                 transpose(1, 2) them"
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
        let limit = |keys: usize| u32::try_from(keys).unwrap_or(AttentionArgs::UNBOUNDED);
        let (left, right) =
            config.window.map_or((AttentionArgs::UNBOUNDED, AttentionArgs::UNBOUNDED), |(l, r)| {
                (limit(l), limit(r))
            });
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
            drop_key: u32::from(config.drop_key),
            padding: 0,
        };
        let mask = drop.args(NAME, &[b, h, queries, keys])?;
        let constant = |name, tensor: &Option<Tensor>, len, dtype| {
            tensor.as_ref().map(|x| constant(name, x, len, dtype, device)).transpose()
        };
        let key_lengths = constant("key_lengths", &config.key_lengths, b, DType::U32)?;
        // The kernels take no length beyond the keys; to ask for them would have the host wait.
        if let Some(lengths) = key_lengths.as_ref().filter(|_| device.is_cpu()) {
            check_lengths(&lengths.to_vec1()?, keys)?;
        }
        let none = HeadStrides { batch: 0, head: 0, row: 0 };
        Ok(Self {
            args,
            layout: AttentionLayout { q: none, k: none, v: none, o: none },
            drop: if config.drop_key { mask.unscaled() } else { mask },
            key_lengths,
            alibi_slopes: constant("alibi_slopes", &config.alibi_slopes, h, DType::F32)?,
            rows_before_heads: false,
            starts: [0; 3],
        })
    }

    pub(super) fn laid_out(
        mut self,
        [q, k, v]: [HeadStrides; 3],
        starts: [usize; 3],
        rows_before_heads: bool,
    ) -> Self {
        let o = self.contiguous(self.args.heads, self.args.queries, rows_before_heads);
        self.layout = AttentionLayout { q, k, v, o };
        self.starts = starts;
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
    pub(super) fn shape(&self) -> Shape {
        let AttentionArgs { batches, heads, queries, head_size, .. } = self.args;
        let dims = [batches, heads, queries, head_size].map(|dim| dim as usize);
        Shape::from_dims(&if self.rows_before_heads { transposed(&dims) } else { dims })
    }

    /// Nothing to compute: no element, or nothing that passes.
    pub(super) fn is_zero(&self) -> bool {
        self.shape().elem_count() == 0 || self.args.keys == 0 || self.drop.drops_all()
    }

    /// Where queries, keys and values begin in a tensor that holds them all.
    pub(super) fn packed_starts(&self, head_stride: usize) -> [usize; 3] {
        let (heads, kv_heads) = (self.args.heads as usize, self.args.kv_heads as usize);
        [0, heads * head_stride, (heads + kv_heads) * head_stride]
    }

    /// dq, dk and dv, each contiguous.
    pub(super) fn contiguous_grads(&self) -> GradLayout {
        let q = self.contiguous(self.args.heads, self.args.queries, false);
        let kv = self.contiguous(self.args.kv_heads, self.args.keys, false);
        GradLayout { strides: AttentionLayout { q, k: kv, v: kv, o: q }, packed: None }
    }

    /// All three in one contiguous tensor.
    pub(super) fn packed_grads(&self) -> GradLayout {
        let AttentionArgs { heads, kv_heads, queries, head_size, .. } = self.args;
        let strides = self.contiguous(heads + 2 * kv_heads, queries, true);
        let strides = AttentionLayout { q: strides, k: strides, v: strides, o: strides };
        let [_, k, v] = self.packed_starts(head_size as usize);
        GradLayout { strides, packed: Some([k, v]) }
    }
}

/// The tensors that a pass reads.
pub(super) struct Inputs<'a> {
    pub(super) q: Input<'a>,
    pub(super) k: Input<'a>,
    pub(super) v: Input<'a>,
    pub(super) key_lengths: Option<Input<'a>>,
    pub(super) alibi_slopes: Option<Input<'a>>,
}

impl<'a> Inputs<'a> {
    pub(super) fn new(attention: &'a Attention, qkv: [&'a Tensor; 3]) -> Self {
        let [q, k, v] = qkv.map(|x| Input::new(NAME, x));
        let [key_lengths, alibi_slopes] = [&attention.key_lengths, &attention.alibi_slopes]
            .map(|x| Input::optional(NAME, x.as_ref()));
        Self { q, k, v, key_lengths, alibi_slopes }
    }
}

fn check_lengths(lengths: &[u32], keys: usize) -> Result<()> {
    match lengths.iter().position(|length| *length as usize > keys) {
        None => Ok(()),
        Some(sample) => bail!(
            "{NAME}: key_lengths: expected at most Sk = {keys}, got {} for sample {sample}; it counts \
             the keys of a sample that are no padding",
            lengths[sample]
        ),
    }
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
    check_device(NAME, arg, x, "q", device)?;
    if x.track_op() {
        bail!("{NAME}: {arg}: expected a constant, got a tensor that tracks a gradient; detach it")
    }
    x.contiguous()
}
