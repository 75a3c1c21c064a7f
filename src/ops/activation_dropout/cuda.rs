use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use super::{Activation, NAME};
use crate::check::rows_cols;
use crate::cuda::sizes::elementwise;
use crate::cuda::{
    Module, for_cuda_dtype, launch, multiprocessors, optional_view, output, ptx, push_optional,
    storage,
};
use crate::input::Input;
use crate::mask::MaskArgs;

const KERNELS: Module = Module::new(NAME, ptx::ACTIVATION_DROPOUT);

pub(super) fn fwd(
    mask: &MaskArgs,
    activation: Activation,
    x: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Storage> {
    let (rows, x_cols) = rows_cols(x.dims());
    let cols = activation.cols(x_cols);
    let (x, bias) = (Input::new(NAME, x), Input::optional(NAME, bias));
    let device = x.cuda_device()?;
    for_cuda_dtype!(x, |T| {
        let (x, bias) = (x.view::<T>()?, optional_view::<T>(&bias)?);
        // SAFETY: `activation_dropout_fwd` writes `rows * cols` elements.
        let y = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "activation_dropout_fwd")?;
        let (sizes, code) = ([rows as u64, cols as u64], activation as u32);
        let mut list = kernel.args();
        list.arg(&x);
        push_optional(&mut list, &bias);
        list.arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(&code).arg(mask);
        // SAFETY: (x, bias, y, rows, cols, activation, mask); y holds `rows * cols` elements, x as many or
        // twice as many, as the activation wants, bias none or a row of x.
        unsafe { launch(list, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}

pub(super) fn bwd(
    mask: &MaskArgs,
    activation: Activation,
    x: &Tensor,
    bias: Option<&Tensor>,
    dy: &Tensor,
) -> Result<Storage> {
    let (rows, x_cols) = rows_cols(x.dims());
    let cols = activation.cols(x_cols);
    let (x, bias, dy) = (Input::new(NAME, x), Input::optional(NAME, bias), Input::new(NAME, dy));
    let device = x.cuda_device()?;
    for_cuda_dtype!(x, |T| {
        let (x, dy, bias) = (x.view::<T>()?, dy.view::<T>()?, optional_view::<T>(&bias)?);
        // SAFETY: `activation_dropout_bwd` writes `rows * x_cols` elements.
        let dx = unsafe { output::<T>(device, rows * x_cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "activation_dropout_bwd")?;
        let (sizes, code) = ([rows as u64, cols as u64], activation as u32);
        let mut list = kernel.args();
        list.arg(&x);
        push_optional(&mut list, &bias);
        list.arg(&dy).arg(&dx).arg(&sizes[0]).arg(&sizes[1]).arg(&code).arg(mask);
        // SAFETY: (x, bias, dy, dx, rows, cols, activation, mask); dy holds `rows * cols` elements, x and dx
        // as many or twice as many, as the activation wants, bias none or a row of x.
        unsafe { launch(list, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(storage(dx, device))
    })
}
