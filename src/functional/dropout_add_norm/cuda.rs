use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use super::NAME;
use crate::check::rows_cols;
use crate::cuda::{
    Module, for_cuda_dtype, launch, multiprocessors, optional_view, output, ptx, push_optional,
    storage,
};
use crate::functional::norm::Norm;
use crate::functional::norm::args::NormArgs;
use crate::input::Input;
use crate::mask::MaskArgs;

const KERNELS: Module = Module::new(NAME, ptx::DROPOUT_ADD_NORM);

/// `z` and `n`.
pub(super) fn fwd(
    mask: &MaskArgs,
    x: &Tensor,
    residual: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &Norm,
) -> Result<[Storage; 2]> {
    let (rows, cols) = rows_cols(x.dims());
    let (x, weight) = (Input::new(NAME, x), Input::new(NAME, norm.weight()));
    let [residual, bias, norm_bias] =
        [residual, bias, norm.bias()].map(|input| Input::optional(NAME, input));
    let device = x.cuda_device()?;
    for_cuda_dtype!(x, |T| {
        let (x, weight) = (x.view::<T>()?, weight.view::<T>()?);
        let (residual, bias) = (optional_view::<T>(&residual)?, optional_view::<T>(&bias)?);
        let norm_bias = optional_view::<T>(&norm_bias)?;
        // SAFETY: `dropout_add_norm_fwd` writes `rows * cols` elements.
        let z = unsafe { output::<T>(device, rows * cols) }?;
        // SAFETY: and as many here.
        let n = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "dropout_add_norm_fwd")?;
        let sizes = [rows as u64, cols as u64];
        let args = norm.args();
        let (eps, removes_mean) = (args.eps as f32, u32::from(args.removes_mean));
        let mut list = kernel.args();
        list.arg(&x);
        push_optional(&mut list, &residual);
        push_optional(&mut list, &bias);
        list.arg(&weight);
        push_optional(&mut list, &norm_bias);
        list.arg(&z).arg(&n).arg(&sizes[0]).arg(&sizes[1]);
        list.arg(&eps).arg(&removes_mean).arg(mask);
        // SAFETY: (x, residual, bias, weight, norm_bias, z, n, rows, cols, eps, removes_mean, mask); x, z, n
        // and residual, if any, hold `rows * cols` elements, weight and the biases, if any, `cols`.
        unsafe { launch(list, NormArgs::launch(rows, cols, multiprocessors(device)?)) }?;
        Ok([storage(z, device), storage(n, device)])
    })
}
