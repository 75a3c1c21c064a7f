use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result};

use super::NAME;
use crate::launch::config::elementwise;
use crate::launch::cuda::{
    for_cuda_dtype, kernel_name, launch, multiprocessors, optional_view, output, ptx,
    push_optional, view,
};
use crate::mask::MaskArgs;

/// Candle caches the compiled module under this name, for all crates of a program.
const MODULE: &str = concat!("candle_dropout ", env!("CARGO_PKG_VERSION"), "::drop_path_add");

pub(super) fn fwd(
    mask: &MaskArgs,
    samples: usize,
    (x, layout): (&CudaStorage, &Layout),
    residual: Option<(&CudaStorage, &Layout)>,
) -> Result<CudaStorage> {
    let device = x.device();
    let size = layout.shape().elem_count() / samples.max(1);
    for_cuda_dtype!(NAME, x, |T| {
        let x = view::<T>(NAME, x, layout)?;
        let residual = optional_view::<T>(NAME, residual)?;
        // SAFETY: `drop_path_add_fwd` writes `samples * size` elements.
        let y = unsafe { output::<T>(device, samples * size) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("drop_path_add_fwd"),
            MODULE,
            ptx::DROP_PATH_ADD,
        )?;
        let sizes = [samples as u64, size as u64];
        let mut args = kernel.builder();
        args.arg(&x);
        push_optional(&mut args, &residual);
        args.arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(mask);
        // SAFETY: (x, residual, y, samples, size, mask); x and y hold `samples * size` elements, residual
        // none or as many.
        unsafe { launch(args, elementwise(samples, size, multiprocessors(device)?)) }?;
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    })
}
