use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result};

use super::{Activation, NAME};
use crate::elem::rows_cols;
use crate::launch::config::elementwise;
use crate::launch::cuda::{
    for_cuda_dtype, kernel_name, launch, multiprocessors, optional_view, output, ptx,
    push_optional, view,
};
use crate::mask::MaskArgs;

/// Candle caches the compiled module under this name, for all crates of a program.
const MODULE: &str = concat!("candle_dropout ", env!("CARGO_PKG_VERSION"), "::activation_dropout");

type Input<'a> = (&'a CudaStorage, &'a Layout);

pub(super) fn fwd(
    mask: &MaskArgs,
    activation: Activation,
    (x, layout): Input,
    bias: Option<Input>,
) -> Result<CudaStorage> {
    let device = x.device();
    let (rows, x_cols) = rows_cols(layout.dims());
    let cols = activation.cols(x_cols);
    for_cuda_dtype!(NAME, x, |T| {
        let x = view::<T>(NAME, x, layout)?;
        let bias = optional_view::<T>(NAME, bias)?;
        // SAFETY: `activation_dropout_fwd` writes `rows * cols` elements.
        let y = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("activation_dropout_fwd"),
            MODULE,
            ptx::ACTIVATION_DROPOUT,
        )?;
        let sizes = [rows as u64, cols as u64];
        let code = activation as u32;
        let mut args = kernel.builder();
        args.arg(&x);
        push_optional(&mut args, &bias);
        args.arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(&code).arg(mask);
        // SAFETY: (x, bias, y, rows, cols, activation, mask); y holds `rows * cols` elements, x as many or
        // twice as many, as the activation wants, bias none or a row of x.
        unsafe { launch(args, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    })
}

pub(super) fn bwd(
    mask: &MaskArgs,
    activation: Activation,
    (x, layout): Input,
    bias: Option<Input>,
    (dy, dy_layout): Input,
) -> Result<CudaStorage> {
    let device = x.device();
    let (rows, x_cols) = rows_cols(layout.dims());
    let cols = activation.cols(x_cols);
    for_cuda_dtype!(NAME, x, |T| {
        let x = view::<T>(NAME, x, layout)?;
        let bias = optional_view::<T>(NAME, bias)?;
        let dy = view::<T>(NAME, dy, dy_layout)?;
        // SAFETY: `activation_dropout_bwd` writes `rows * x_cols` elements.
        let dx = unsafe { output::<T>(device, rows * x_cols) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("activation_dropout_bwd"),
            MODULE,
            ptx::ACTIVATION_DROPOUT,
        )?;
        let sizes = [rows as u64, cols as u64];
        let code = activation as u32;
        let mut args = kernel.builder();
        args.arg(&x);
        push_optional(&mut args, &bias);
        args.arg(&dy).arg(&dx).arg(&sizes[0]).arg(&sizes[1]).arg(&code).arg(mask);
        // SAFETY: (x, bias, dy, dx, rows, cols, activation, mask); dy holds `rows * cols` elements, x and dx
        // as many or twice as many, as the activation wants, bias none or a row of x.
        unsafe { launch(args, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(CudaStorage::wrap_cuda_slice(dx, device.clone()))
    })
}
