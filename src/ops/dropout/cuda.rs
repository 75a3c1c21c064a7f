use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result};

use super::NAME;
use crate::elem::rows_cols;
use crate::launch::config::elementwise;
use crate::launch::cuda::{
    for_cuda_dtype, kernel_name, launch, multiprocessors, output, ptx, view,
};
use crate::mask::MaskArgs;

/// Candle caches the compiled module under this name, for all crates of a program.
const MODULE: &str = concat!("candle_dropout ", env!("CARGO_PKG_VERSION"), "::dropout");

pub(super) fn fwd(mask: &MaskArgs, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let device = x.device();
    let (rows, cols) = rows_cols(layout.dims());
    for_cuda_dtype!(NAME, x, |T| {
        let x = view::<T>(NAME, x, layout)?;
        // SAFETY: `dropout_fwd` writes `rows * cols` elements.
        let y = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("dropout_fwd"),
            MODULE,
            ptx::DROPOUT,
        )?;
        let sizes = [rows as u64, cols as u64];
        let mut args = kernel.builder();
        args.arg(&x).arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(mask);
        // SAFETY: (x, y, rows, cols, mask); x and y hold `rows * cols` elements.
        unsafe { launch(args, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    })
}
