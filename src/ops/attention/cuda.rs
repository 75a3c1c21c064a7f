use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaView, LaunchArgs, PushKernelArg,
};
use candle_core::{CudaDevice, CudaStorage, Result, WithDType, bail};

use super::config::{AttentionArgs, AttentionLayout};
use super::{GradLayout, NAME, Operands};
use crate::launch::config::{
    ATTENTION_F32_HEAD_SIZES, ATTENTION_HALF_HEAD_SIZES, AttentionPass, Launch, attention_delta,
    attention_f32, attention_half,
};
use crate::launch::cuda::{
    for_cuda_dtype, has_capability, kernel_name, launch, load_with_shared_memory, multiprocessors,
    output, ptx, push_optional,
};
use crate::launch::ptx_text;
use crate::mask::MaskArgs;

/// Candle caches the compiled modules under these names, for all crates of a program.
const HALF: &str = concat!("candle_dropout ", env!("CARGO_PKG_VERSION"), "::attention");
const F32: &str = concat!("candle_dropout ", env!("CARGO_PKG_VERSION"), "::attention_f32");
const DELTA: &str = concat!("candle_dropout ", env!("CARGO_PKG_VERSION"), "::attention_delta");

/// The kernel of a pass for a dtype and the head size of `args`, and how it is launched.
fn kernel<T: WithDType>(
    device: &CudaDevice,
    pass: AttentionPass,
    args: &AttentionArgs,
    drop: &MaskArgs,
) -> Result<(CudaFunction, Launch)> {
    let is_half = size_of::<T>() == 2;
    let module = if is_half { (HALF, ptx::ATTENTION) } else { (F32, ptx::ATTENTION_F32) };
    if is_half {
        // The tensor cores' instructions for both halves, and asynchronous copies.
        if !has_capability(device, (8, 0))? {
            bail!(
                "{NAME}: q: expected a GPU of compute capability 8.0 or later for {:?}, got an earlier \
                 one; convert to f32 with to_dtype",
                T::DTYPE
            )
        }
        if let Some(built @ ..80) = ptx_text::target(module.1) {
            bail!(
                "{NAME}: q: expected kernels built for compute capability 8.0 or later for {:?}, got {}.{}; \
                 build with CUDA_COMPUTE_CAP=80 or later, or convert to f32 with to_dtype",
                T::DTYPE,
                built / 10,
                built % 10
            )
        }
    }
    let head_sizes: &[usize] =
        if is_half { &ATTENTION_HALF_HEAD_SIZES } else { &ATTENTION_F32_HEAD_SIZES };
    let wanted = args.head_size as usize;
    let Some(&instance) = head_sizes.iter().find(|size| **size >= wanted) else {
        bail!(
            "{NAME}: q: expected a head size (last dimension) of at most 256 on CUDA, got {wanted}; use \
             more heads or move it to the CPU"
        )
    };
    let (heads, rows) = match pass {
        AttentionPass::Fwd | AttentionPass::BwdDq => (args.heads, args.queries),
        AttentionPass::BwdDkdv => (args.kv_heads, args.keys),
    };
    let heads = args.batches as usize * heads as usize;
    let sizes = if is_half { attention_half } else { attention_f32 };
    let launch = sizes(pass, instance, heads, rows as usize);
    if launch.grid[0] > i32::MAX as u32 {
        bail!("{NAME}: q: expected at most 2^31 tiles of rows, got more; split the batch")
    }
    let nodrop = if drop.keeps_all() { "_nodrop" } else { "" };
    let kernel = kernel_name::<T>(&format!("{}{nodrop}_d{instance}", pass.kernel()));
    Ok((load_with_shared_memory(NAME, device, &kernel, module, launch)?, launch))
}

/// What every pass reads, from the first element of each tensor on.
struct Views<'a, T> {
    q: CudaView<'a, T>,
    k: CudaView<'a, T>,
    v: CudaView<'a, T>,
    key_lengths: Option<CudaView<'a, u32>>,
    alibi_slopes: Option<CudaView<'a, f32>>,
}

fn view<'a, T: CudaDType>((storage, start): (&'a CudaStorage, usize)) -> Result<CudaView<'a, T>> {
    Ok(storage.as_cuda_slice::<T>()?.slice(start..))
}

impl<'a, T: CudaDType> Views<'a, T> {
    fn new(operands: &Operands<'a, CudaStorage>) -> Result<Self> {
        let Operands { q, k, v, key_lengths, alibi_slopes } = *operands;
        Ok(Self {
            q: view(q)?,
            k: view(k)?,
            v: view(v)?,
            key_lengths: key_lengths.map(view).transpose()?,
            alibi_slopes: alibi_slopes.map(view).transpose()?,
        })
    }

    /// Adds (q, k, v, key_lengths, alibi_slopes).
    fn push<'l>(&'l self, list: &mut LaunchArgs<'l>)
    where
        'a: 'l,
    {
        list.arg(&self.q).arg(&self.k).arg(&self.v);
        push_optional(list, &self.key_lengths);
        push_optional(list, &self.alibi_slopes);
    }
}

fn rows(args: &AttentionArgs) -> usize {
    args.batches as usize * args.heads as usize * args.queries as usize
}

/// `o` in the strides `layout.o`, and `lse`.
pub(super) fn fwd(
    args: &AttentionArgs,
    layout: &AttentionLayout,
    drop: &MaskArgs,
    operands: &Operands<CudaStorage>,
) -> Result<(CudaStorage, CudaStorage)> {
    let device = operands.q.0.device();
    let stream = device.cuda_stream();
    for_cuda_dtype!(NAME, operands.q.0, |T| {
        let (kernel, sizes) = kernel::<T>(device, AttentionPass::Fwd, args, drop)?;
        let views = Views::<T>::new(operands)?;
        // SAFETY: `attention_fwd` writes the rows of all heads, `head_size` elements each.
        let o = unsafe { output::<T>(device, rows(args) * args.head_size as usize) }?;
        // SAFETY: it writes one number a row.
        let lse = unsafe { output::<f32>(device, rows(args)) }?;
        let mut list = stream.launch_builder(&kernel);
        views.push(&mut list);
        list.arg(&o).arg(&lse).arg(args).arg(layout).arg(drop);
        // SAFETY: (q, k, v, key_lengths, alibi_slopes, o, lse, args, layout, drop); the tensors hold what
        // `layout` says from their first element on, o and lse what `args` says.
        unsafe { launch(list, sizes) }?;
        let lse = CudaStorage::wrap_cuda_slice(lse, device.clone());
        Ok((CudaStorage::wrap_cuda_slice(o, device.clone()), lse))
    })
}

/// `[dq, dk, dv]`, or one tensor that holds them all if `grads.packed`.
#[expect(clippy::too_many_arguments)]
pub(super) fn bwd(
    args: &AttentionArgs,
    layout: &AttentionLayout,
    grads: &GradLayout,
    drop: &MaskArgs,
    operands: &Operands<CudaStorage>,
    lse: &CudaStorage,
    o: (&CudaStorage, usize),
    dout: (&CudaStorage, usize),
) -> Result<Vec<CudaStorage>> {
    let device = operands.q.0.device();
    let stream = device.cuda_stream();
    let strides = &grads.strides;
    for_cuda_dtype!(NAME, operands.q.0, |T| {
        let (dkdv, dkdv_sizes) = kernel::<T>(device, AttentionPass::BwdDkdv, args, drop)?;
        let (dq, dq_sizes) = kernel::<T>(device, AttentionPass::BwdDq, args, drop)?;
        let name = kernel_name::<T>("attention_bwd_delta");
        let delta_kernel = device.get_or_load_custom_func(&name, DELTA, ptx::ATTENTION_DELTA)?;
        let views = Views::<T>::new(operands)?;
        let (o, dout) = (view::<T>(o)?, view::<T>(dout)?);
        let lse = lse.as_cuda_slice::<f32>()?;

        // SAFETY: `attention_bwd_delta` writes one number a row.
        let delta = unsafe { output::<f32>(device, rows(args)) }?;
        let delta_sizes =
            attention_delta(rows(args), args.head_size as usize, multiprocessors(device)?);
        let mut list = delta_kernel.builder();
        list.arg(&o).arg(&dout).arg(&delta).arg(args).arg(&layout.o).arg(&strides.o);
        // SAFETY: (o, dout, delta, args, o_strides, dout_strides); o and dout hold what their strides say from
        // their first element on, delta one number a row.
        unsafe { launch(list, delta_sizes) }?;

        let (batches, d) = (args.batches as usize, args.head_size as usize);
        let q_len = rows(args) * d;
        let kv_len = batches * args.kv_heads as usize * args.keys as usize * d;
        let lengths = if grads.packed.is_some() {
            vec![q_len + 2 * kv_len]
        } else {
            vec![q_len, kv_len, kv_len]
        };
        // SAFETY: `attention_bwd_dq` and `attention_bwd_dkdv` write the rows of all heads, `head_size` elements
        // each; packed, they make up the one tensor.
        let outputs = (lengths.into_iter())
            .map(|len| unsafe { output::<T>(device, len) })
            .collect::<Result<Vec<_>>>()?;
        let whole = |at: usize| outputs[at].slice(..);
        let [dq_view, dk_view, dv_view] = match grads.packed {
            Some([k, v]) => [whole(0), outputs[0].slice(k..), outputs[0].slice(v..)],
            None => [whole(0), whole(1), whole(2)],
        };

        let mut list = stream.launch_builder(&dkdv);
        views.push(&mut list);
        list.arg(&dout).arg(lse).arg(&delta).arg(&dk_view).arg(&dv_view);
        list.arg(args).arg(layout).arg(strides).arg(drop);
        // SAFETY: (q, k, v, key_lengths, alibi_slopes, dout, lse, delta, dk, dv, args, layout, grads, drop); the
        // tensors hold what `layout` and `strides` say from their first element on, lse and delta one
        // number a row.
        unsafe { launch(list, dkdv_sizes) }?;

        let mut list = stream.launch_builder(&dq);
        views.push(&mut list);
        list.arg(&dout).arg(lse).arg(&delta).arg(&dq_view);
        list.arg(args).arg(layout).arg(strides).arg(drop);
        // SAFETY: (q, k, v, key_lengths, alibi_slopes, dout, lse, delta, dq, args, layout, grads, drop), as above.
        unsafe { launch(list, dq_sizes) }?;
        let wrap = |output| CudaStorage::wrap_cuda_slice(output, device.clone());
        Ok(outputs.into_iter().map(wrap).collect())
    })
}
