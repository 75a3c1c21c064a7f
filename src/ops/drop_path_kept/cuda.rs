use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result, Shape, Tensor};

use super::NAME;
use crate::claim::Input;
use crate::launch::config::elementwise;
use crate::launch::cuda::{
    for_cuda_dtype, kernel_name, launch, multiprocessors, optional_view, output, ptx,
    push_optional, view,
};

/// Candle caches the compiled module under this name, for all crates of a program.
const MODULE: &str = concat!("candle_dropout ", env!("CARGO_PKG_VERSION"), "::drop_path_kept");

/// An output of shape `shape`, whose sample n is `residual[n] + x[places[n]] * scale`.
pub(super) fn fwd(
    places: &Tensor,
    scale: f32,
    (x, layout): (&CudaStorage, &Layout),
    residual: Option<(&CudaStorage, &Layout)>,
    shape: &Shape,
) -> Result<CudaStorage> {
    let device = x.device();
    let samples = places.elem_count();
    let size = shape.elem_count() / samples.max(1);
    let places = Input::new(places);
    let (places, places_layout) = places.cuda(NAME)?;
    let places = view::<u32>(NAME, places, places_layout)?;
    for_cuda_dtype!(NAME, x, |T| {
        let x = view::<T>(NAME, x, layout)?;
        let residual = optional_view::<T>(NAME, residual)?;
        // SAFETY: `drop_path_kept_fwd` writes `samples * size` elements.
        let y = unsafe { output::<T>(device, samples * size) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("drop_path_kept_fwd"),
            MODULE,
            ptx::DROP_PATH_KEPT,
        )?;
        let sizes = [samples as u64, size as u64];
        let mut args = kernel.builder();
        args.arg(&x).arg(&places);
        push_optional(&mut args, &residual);
        args.arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(&scale);
        // SAFETY: (x, places, residual, y, samples, size, scale); places holds a number a sample, each of
        // them `NOWHERE` or a sample of x, y `samples * size` elements, residual none or as many.
        unsafe { launch(args, elementwise(samples, size, multiprocessors(device)?)) }?;
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    })
}
