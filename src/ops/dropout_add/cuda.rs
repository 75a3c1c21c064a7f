use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result};

use super::NAME;
use crate::elem::rows_cols;
use crate::launch::config::{column_sums, column_totals, elementwise};
use crate::launch::cuda::{
    for_cuda_dtype, kernel_name, launch, multiprocessors, optional_view, output, ptx,
    push_optional, view,
};
use crate::mask::MaskArgs;

/// Candle caches the compiled module under this name, for all crates of a program.
const MODULE: &str = concat!("candle_dropout ", env!("CARGO_PKG_VERSION"), "::dropout_add");

pub(super) fn fwd(
    mask: &MaskArgs,
    (x, layout): (&CudaStorage, &Layout),
    (residual, residual_layout): (&CudaStorage, &Layout),
    bias: Option<(&CudaStorage, &Layout)>,
) -> Result<CudaStorage> {
    let device = x.device();
    let (rows, cols) = rows_cols(layout.dims());
    for_cuda_dtype!(NAME, x, |T| {
        let x = view::<T>(NAME, x, layout)?;
        let residual = view::<T>(NAME, residual, residual_layout)?;
        let bias = optional_view::<T>(NAME, bias)?;
        // SAFETY: `dropout_add_fwd` writes `rows * cols` elements.
        let y = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("dropout_add_fwd"),
            MODULE,
            ptx::DROPOUT_ADD,
        )?;
        let sizes = [rows as u64, cols as u64];
        let mut args = kernel.builder();
        args.arg(&x).arg(&residual);
        push_optional(&mut args, &bias);
        args.arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(mask);
        // SAFETY: (x, residual, bias, y, rows, cols, mask); x, residual and y hold `rows * cols`
        // elements, bias none or `cols`.
        unsafe { launch(args, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    })
}

pub(super) fn bwd_bias(mask: &MaskArgs, dy: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let device = dy.device();
    let (rows, cols) = rows_cols(layout.dims());
    let multiprocessors = multiprocessors(device)?;
    for_cuda_dtype!(NAME, dy, |T| {
        let dy = view::<T>(NAME, dy, layout)?;
        let config = column_sums(rows, cols, multiprocessors);
        let chunks = config.grid[1] as usize;
        // SAFETY: `dropout_add_bwd_bias` writes `chunks * cols` elements.
        let sums = unsafe { output::<f32>(device, chunks * cols) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("dropout_add_bwd_bias"),
            MODULE,
            ptx::DROPOUT_ADD,
        )?;
        let sizes = [rows as u64, cols as u64, chunks as u64];
        let mut args = kernel.builder();
        args.arg(&dy).arg(&sums).arg(&sizes[0]).arg(&sizes[1]).arg(mask);
        // SAFETY: (dy, sums, rows, cols, mask); dy holds `rows * cols` elements, sums `chunks * cols`.
        unsafe { launch(args, config) }?;

        // SAFETY: `dropout_add_bwd_bias_total` writes `cols` elements.
        let dbias = unsafe { output::<T>(device, cols) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("dropout_add_bwd_bias_total"),
            MODULE,
            ptx::DROPOUT_ADD,
        )?;
        let mut args = kernel.builder();
        args.arg(&sums).arg(&dbias).arg(&sizes[2]).arg(&sizes[1]);
        // SAFETY: (sums, dbias, chunks, cols); sums holds `chunks * cols` elements, dbias `cols`.
        unsafe { launch(args, column_totals(cols, multiprocessors)) }?;
        Ok(CudaStorage::wrap_cuda_slice(dbias, device.clone()))
    })
}
