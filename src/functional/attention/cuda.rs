use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaView, DeviceRepr, LaunchArgs, PushKernelArg};
use candle_core::{CudaDevice, Result, Storage, Tensor, WithDType, bail};

use super::NAME;
use super::args::{AttentionArgs, AttentionLayout, AttentionPass, HeadStrides};
use super::shape::{Attention, GradLayout, Inputs, Saved};
use crate::cuda::sizes::Launch;
use crate::cuda::{
    Kernel, Module, for_cuda_dtype, has_capability, launch, multiprocessors, optional_view, output,
    ptx, push_optional, storage,
};
use crate::input::Input;

const HALF: Module = Module::new(NAME, ptx::ATTENTION_HALF);
const F32: Module = Module::new(NAME, ptx::ATTENTION_F32);
const DELTA: Module = Module::new(NAME, ptx::ATTENTION_DELTA);

// SAFETY: `repr(C)` integers and floats without padding, laid out as `struct AttentionArgs` of the kernels.
unsafe impl DeviceRepr for AttentionArgs {}
// SAFETY: as above, for `struct AttentionLayout`.
unsafe impl DeviceRepr for AttentionLayout {}
// SAFETY: as above, for `struct HeadStrides`.
unsafe impl DeviceRepr for HeadStrides {}

/// The kernel of a pass for a dtype and the head size of `attention`, and how it is launched.
fn kernel<T: WithDType>(
    attention: &Attention,
    device: &CudaDevice,
    pass: AttentionPass,
) -> Result<(Kernel, Launch)> {
    let (args, is_half) = (&attention.args, size_of::<T>() == 2);
    let module = if is_half { HALF } else { F32 };
    if is_half {
        // The tensor cores' instructions for both halves, and asynchronous copies.
        if !has_capability(device, (8, 0))? {
            bail!(
                "{NAME}: q: expected a GPU of compute capability 8.0 or later for {:?}, got an earlier \
                 one; convert to f32 with to_dtype",
                T::DTYPE
            )
        }
        if let Some(built @ ..80) = module.target() {
            bail!(
                "{NAME}: q: expected kernels built for compute capability 8.0 or later for {:?}, got {}.{}; \
                 build with CUDA_COMPUTE_CAP=80 or later, or convert to f32 with to_dtype",
                T::DTYPE,
                built / 10,
                built % 10
            )
        }
    }
    let head_sizes: &[usize] = match is_half {
        true => &AttentionPass::HALF_HEAD_SIZES,
        false => &AttentionPass::F32_HEAD_SIZES,
    };
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
    let (heads, rows) = (args.batches as usize * heads as usize, rows as usize);
    let launch = match is_half {
        true => pass.launch_half(instance, heads, rows),
        false => pass.launch_f32(instance, heads, rows),
    };
    if launch.grid[0] > i32::MAX as u32 {
        bail!("{NAME}: q: expected at most 2^31 tiles of rows, got more; split the batch")
    }
    let nodrop = if attention.drop.keeps_all() { "_nodrop" } else { "" };
    let kernel = module.kernel::<T>(device, &format!("{}{nodrop}_d{instance}", pass.kernel()))?;
    kernel.allow_shared_memory(launch)?;
    Ok((kernel, launch))
}

impl Inputs<'_> {
    fn views<T: CudaDType>(&self, [q, k, v]: [usize; 3]) -> Result<Views<'_, T>> {
        Ok(Views {
            q: self.q.view_from(q)?,
            k: self.k.view_from(k)?,
            v: self.v.view_from(v)?,
            key_lengths: optional_view(&self.key_lengths)?,
            alibi_slopes: optional_view(&self.alibi_slopes)?,
        })
    }
}

/// The inputs from where each begins.
struct Views<'a, T> {
    q: CudaView<'a, T>,
    k: CudaView<'a, T>,
    v: CudaView<'a, T>,
    key_lengths: Option<CudaView<'a, u32>>,
    alibi_slopes: Option<CudaView<'a, f32>>,
}

impl<'a, T: CudaDType> Views<'a, T> {
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

/// `o` in the strides `layout.o`, and what the softmax of each row is made with.
pub(super) fn fwd(attention: &Attention, qkv: [&Tensor; 3]) -> Result<[Storage; 2]> {
    let Attention { args, layout, drop, .. } = attention;
    let inputs = Inputs::new(attention, qkv);
    let device = inputs.q.cuda_device()?;
    for_cuda_dtype!(inputs.q, |T| {
        let (kernel, sizes) = kernel::<T>(attention, device, AttentionPass::Fwd)?;
        let views = inputs.views::<T>(attention.starts)?;
        // SAFETY: `attention_fwd` writes the rows of all heads, `head_size` elements each.
        let o = unsafe { output::<T>(device, args.rows() * args.head_size as usize) }?;
        // SAFETY: it writes two numbers a row.
        let softmax = unsafe { output::<f32>(device, 2 * args.rows()) }?;
        let mut list = kernel.args();
        views.push(&mut list);
        list.arg(&o).arg(&softmax).arg(args).arg(layout).arg(drop);
        // SAFETY: (q, k, v, key_lengths, alibi_slopes, o, softmax, args, layout, drop); the tensors hold what
        // `layout` says from their first element on, o what `args` says, softmax two numbers a row.
        unsafe { launch(list, sizes) }?;
        Ok([storage(o, device), storage(softmax, device)])
    })
}

/// `[dq, dk, dv]`, or one tensor that holds them all if `grads.packed`.
pub(super) fn bwd(
    attention: &Attention,
    qkv: [&Tensor; 3],
    Saved { o, softmax, dout }: Saved<'_>,
    grads: &GradLayout,
) -> Result<Vec<Storage>> {
    let Attention { args, layout, drop, .. } = attention;
    let inputs = Inputs::new(attention, qkv);
    let device = inputs.q.cuda_device()?;
    let (strides, rows) = (&grads.strides, args.rows());
    let [o, softmax, dout] = [o, softmax, dout].map(|x| Input::new(NAME, x));
    for_cuda_dtype!(inputs.q, |T| {
        let (dkdv, dkdv_sizes) = kernel::<T>(attention, device, AttentionPass::BwdDkdv)?;
        let (dq, dq_sizes) = kernel::<T>(attention, device, AttentionPass::BwdDq)?;
        let delta_kernel = DELTA.kernel::<T>(device, "attention_bwd_delta")?;
        let views = inputs.views::<T>(attention.starts)?;
        let (o, dout, softmax) =
            (o.view_from::<T>(0)?, dout.view_from::<T>(0)?, softmax.view::<f32>()?);

        // SAFETY: `attention_bwd_delta` writes one number a row.
        let delta = unsafe { output::<f32>(device, rows) }?;
        let mut list = delta_kernel.args();
        list.arg(&o).arg(&dout).arg(&delta).arg(args).arg(&layout.o).arg(&strides.o);
        // SAFETY: (o, dout, delta, args, o_strides, dout_strides); o and dout hold what their strides say from
        // their first element on, delta one number a row.
        unsafe { launch(list, args.launch_delta(multiprocessors(device)?)) }?;

        let (batches, d) = (args.batches as usize, args.head_size as usize);
        let q_len = rows * d;
        let kv_len = batches * args.kv_heads as usize * args.keys as usize * d;
        let lengths = match grads.packed {
            Some(_) => vec![q_len + 2 * kv_len],
            None => vec![q_len, kv_len, kv_len],
        };
        // SAFETY: `attention_bwd_dq` and `attention_bwd_dkdv` write the rows of all heads, `head_size` elements
        // each; packed, they make up the one tensor.
        let new = |len| unsafe { output::<T>(device, len) };
        let outputs = lengths.into_iter().map(new).collect::<Result<Vec<_>>>()?;
        let whole = |at: usize| outputs[at].slice(..);
        let [dq_view, dk_view, dv_view] = match grads.packed {
            Some([k, v]) => [whole(0), outputs[0].slice(k..), outputs[0].slice(v..)],
            None => [whole(0), whole(1), whole(2)],
        };

        let mut list = dkdv.args();
        views.push(&mut list);
        list.arg(&dout).arg(&softmax).arg(&delta).arg(&dk_view).arg(&dv_view);
        list.arg(args).arg(layout).arg(strides).arg(drop);
        // SAFETY: (q, k, v, key_lengths, alibi_slopes, dout, softmax, delta, dk, dv, args, layout, grads, drop); the
        // tensors hold what `layout` and `strides` say from their first element on, softmax two
        // numbers a row, delta one.
        unsafe { launch(list, dkdv_sizes) }?;

        let mut list = dq.args();
        views.push(&mut list);
        list.arg(&dout).arg(&softmax).arg(&delta).arg(&dq_view);
        list.arg(args).arg(layout).arg(strides).arg(drop);
        // SAFETY: (q, k, v, key_lengths, alibi_slopes, dout, softmax, delta, dq, args, layout, grads, drop), as above.
        unsafe { launch(list, dq_sizes) }?;
        Ok(outputs.into_iter().map(|output| storage(output, device)).collect())
    })
}
