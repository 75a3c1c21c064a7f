use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result, Tensor};

use super::{NAME, RopeArgs};
use crate::claim::Input;
use crate::launch::config::rope;
use crate::launch::cuda::{
    for_cuda_dtype, kernel_name, launch, multiprocessors, output, ptx, strided_view, view,
};

/// Candle caches the compiled module under this name, for all crates of a program.
const MODULE: &str = concat!("candle_dropout ", env!("CARGO_PKG_VERSION"), "::rope");

pub(super) fn fwd(
    args: &RopeArgs,
    (x, layout): (&CudaStorage, &Layout),
    cos: &Tensor,
    sin: &Tensor,
) -> Result<CudaStorage> {
    let device = x.device();
    let (cos, sin) = (Input::new(cos), Input::new(sin));
    let ((cos, cos_layout), (sin, sin_layout)) = (cos.cuda(NAME)?, sin.cuda(NAME)?);
    let (cos, sin) = (view::<f32>(NAME, cos, cos_layout)?, view::<f32>(NAME, sin, sin_layout)?);
    let [batches, heads, positions, half] =
        [args.batches, args.heads, args.positions, args.half].map(|size| size as usize);
    for_cuda_dtype!(NAME, x, |T| {
        let x = strided_view::<T>(x, layout)?;
        // SAFETY: `rope_fwd` writes all elements of every row.
        let y = unsafe { output::<T>(device, layout.shape().elem_count()) }?;
        let kernel =
            device.get_or_load_custom_func(&kernel_name::<T>("rope_fwd"), MODULE, ptx::ROPE)?;
        let mut list = kernel.builder();
        list.arg(&x).arg(&cos).arg(&sin).arg(&y).arg(args);
        let config = rope(batches, heads, positions, half, multiprocessors(device)?);
        // SAFETY: (x, cos, sin, y, args); args describes where the rows of x and of the tables lie, as
        // their layouts say, and y holds `batches * heads * positions * 2 * half` elements.
        unsafe { launch(list, config) }?;
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    })
}
