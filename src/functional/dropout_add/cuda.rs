use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use super::NAME;
use crate::check::rows_cols;
use crate::cuda::sizes::elementwise;
use crate::cuda::{
    Module, for_cuda_dtype, launch, multiprocessors, optional_view, output, ptx, push_optional,
    storage,
};
use crate::input::Input;
use crate::mask::MaskArgs;

const KERNELS: Module = Module::new(NAME, ptx::DROPOUT_ADD);

pub(super) fn fwd(
    mask: &MaskArgs,
    x: &Tensor,
    residual: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Storage> {
    let (rows, cols) = rows_cols(x.dims());
    let (x, residual) = (Input::new(NAME, x), Input::new(NAME, residual));
    let bias = Input::optional(NAME, bias);
    let device = x.cuda_device()?;
    for_cuda_dtype!(x, |T| {
        let (x, residual) = (x.view::<T>()?, residual.view::<T>()?);
        let bias = optional_view::<T>(&bias)?;
        // SAFETY: `dropout_add_fwd` writes `rows * cols` elements.
        let y = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "dropout_add_fwd")?;
        let sizes = [rows as u64, cols as u64];
        let mut list = kernel.args();
        list.arg(&x).arg(&residual);
        push_optional(&mut list, &bias);
        list.arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(mask);
        // SAFETY: (x, residual, bias, y, rows, cols, mask); x, residual and y hold `rows * cols`
        // elements, bias none or `cols`.
        unsafe { launch(list, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}
