use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use super::NAME;
use crate::cuda::sizes::elementwise;
use crate::cuda::{
    Module, for_cuda_dtype, launch, multiprocessors, optional_view, output, ptx, push_optional,
    storage,
};
use crate::input::Input;
use crate::mask::MaskArgs;

const KERNELS: Module = Module::new(NAME, ptx::DROP_PATH_ADD);

pub(super) fn fwd(
    mask: &MaskArgs,
    samples: usize,
    x: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Storage> {
    let size = x.elem_count() / samples.max(1);
    let (x, residual) = (Input::new(NAME, x), Input::optional(NAME, residual));
    let device = x.cuda_device()?;
    for_cuda_dtype!(x, |T| {
        let (x, residual) = (x.view::<T>()?, optional_view::<T>(&residual)?);
        // SAFETY: `drop_path_add_fwd` writes `samples * size` elements.
        let y = unsafe { output::<T>(device, samples * size) }?;
        let kernel = KERNELS.kernel::<T>(device, "drop_path_add_fwd")?;
        let sizes = [samples as u64, size as u64];
        let mut list = kernel.args();
        list.arg(&x);
        push_optional(&mut list, &residual);
        list.arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(mask);
        // SAFETY: (x, residual, y, samples, size, mask); x and y hold `samples * size` elements, residual
        // none or as many.
        unsafe { launch(list, elementwise(samples, size, multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}
