use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use super::rows::Rows;
use super::{Activation, NAME};
use crate::cuda::sizes::elementwise;
use crate::cuda::{
    Module, for_cuda_dtype, launch, multiprocessors, optional_view, output, ptx, push_optional,
    storage,
};
use crate::input::Input;
use crate::mask::MaskArgs;

const KERNELS: Module = Module::new(NAME, ptx::ACTIVATION_DROPOUT);

pub(super) fn fwd(mask: &MaskArgs, activation: Activation, of: &Rows) -> Result<Storage> {
    let [rows, cols, _] = of.sizes(activation);
    let [up, bias] = [&of.up, &of.bias].map(|x| Input::optional(NAME, x.as_ref()));
    let x = Input::new(NAME, &of.x);
    let device = x.cuda_device()?;
    for_cuda_dtype!(x, |T| {
        let up = up.as_ref().map(|up| up.view_from::<T>(0)).transpose()?;
        let (x, bias) = (x.view_from::<T>(0)?, optional_view::<T>(&bias)?);
        // SAFETY: `activation_dropout_fwd` writes `rows * cols` elements.
        let y = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "activation_dropout_fwd")?;
        let sizes = [rows as u64, cols as u64, of.stride as u64];
        let code = activation as u32;
        let mut list = kernel.args();
        list.arg(&x);
        push_optional(&mut list, &up);
        push_optional(&mut list, &bias);
        list.arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(&sizes[2]).arg(&code).arg(mask);
        // SAFETY: (x, up, bias, y, rows, cols, stride, activation, mask); y holds `rows * cols` elements; x `rows`
        // rows that begin `stride` elements apart, of `cols` elements or of twice as many where the values lie in
        // them; up none or rows of `cols` elements at that distance; bias none or a row of x.
        unsafe { launch(list, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}

/// The gradient of `x` and that of `up`.
pub(super) fn bwd(
    mask: &MaskArgs,
    activation: Activation,
    of: &Rows,
    dy: &Tensor,
) -> Result<(Storage, Option<Storage>)> {
    let [rows, cols, x_cols] = of.sizes(activation);
    let [up, bias] = [&of.up, &of.bias].map(|x| Input::optional(NAME, x.as_ref()));
    let [x, dy] = [&of.x, dy].map(|x| Input::new(NAME, x));
    let device = x.cuda_device()?;
    for_cuda_dtype!(x, |T| {
        let up = up.as_ref().map(|up| up.view_from::<T>(0)).transpose()?;
        let (x, dy, bias) = (x.view_from::<T>(0)?, dy.view::<T>()?, optional_view::<T>(&bias)?);
        // SAFETY: `activation_dropout_bwd` writes `rows * x_cols` elements.
        let dx = unsafe { output::<T>(device, rows * x_cols) }?;
        // SAFETY: as above, of both where there is an `up`.
        let dup = up.as_ref().map(|_| unsafe { output::<T>(device, rows * x_cols) }).transpose()?;
        let kernel = KERNELS.kernel::<T>(device, "activation_dropout_bwd")?;
        let sizes = [rows as u64, cols as u64, of.stride as u64];
        let code = activation as u32;
        let mut list = kernel.args();
        list.arg(&x);
        push_optional(&mut list, &up);
        push_optional(&mut list, &bias);
        list.arg(&dy).arg(&dx);
        match &dup {
            Some(dup) => list.arg(dup),
            None => list.arg(&0u64),
        };
        list.arg(&sizes[0]).arg(&sizes[1]).arg(&sizes[2]).arg(&code).arg(mask);
        // SAFETY: (x, up, bias, dy, dx, dup, rows, cols, stride, activation, mask); x, up and bias as forward; dy
        // holds `rows * cols` elements, dx and dup as many, or dx twice as many where the values lie in x and dup
        // is none.
        unsafe { launch(list, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok((storage(dx, device), dup.map(|dup| storage(dup, device))))
    })
}
