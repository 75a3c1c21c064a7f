use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use super::NAME;
use crate::cuda::sizes::elementwise;
use crate::cuda::{
    Module, for_cuda_dtype, launch, multiprocessors, optional_view, output, ptx, push_optional,
    storage,
};
use crate::input::Input;

const KERNELS: Module = Module::new(NAME, ptx::DROP_PATH_KEPT);

/// An output of `len` elements, whose sample n is `residual[n] + x[places[n]] * scale`.
pub(super) fn fwd(
    places: &Tensor,
    scale: f32,
    x: &Tensor,
    residual: Option<&Tensor>,
    len: usize,
) -> Result<Storage> {
    let samples = places.elem_count();
    let size = len / samples.max(1);
    let (places, x) = (Input::new(NAME, places), Input::new(NAME, x));
    let (places, residual) = (places.view::<u32>()?, Input::optional(NAME, residual));
    let device = x.cuda_device()?;
    for_cuda_dtype!(x, |T| {
        let (x, residual) = (x.view::<T>()?, optional_view::<T>(&residual)?);
        // SAFETY: `drop_path_kept_fwd` writes `samples * size` elements.
        let y = unsafe { output::<T>(device, samples * size) }?;
        let kernel = KERNELS.kernel::<T>(device, "drop_path_kept_fwd")?;
        let sizes = [samples as u64, size as u64];
        let mut list = kernel.args();
        list.arg(&x).arg(&places);
        push_optional(&mut list, &residual);
        list.arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(&scale);
        // SAFETY: (x, places, residual, y, samples, size, scale); places holds a number a sample, each of
        // them `NOWHERE` or a sample of x, y `samples * size` elements, residual none or as many.
        unsafe { launch(list, elementwise(samples, size, multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}
