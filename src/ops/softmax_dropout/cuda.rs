use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result};

use super::NAME;
use super::mask::ScoreArgs;
use crate::elem::rows_cols;
use crate::launch::config::softmax;
use crate::launch::cuda::{
    for_cuda_dtype, kernel_name, launch, multiprocessors, optional_view, output, ptx,
    push_optional, view,
};
use crate::mask::MaskArgs;

/// Candle caches the compiled module under this name, for all crates of a program.
const MODULE: &str = concat!("candle_dropout ", env!("CARGO_PKG_VERSION"), "::softmax_dropout");

pub(super) fn fwd(
    drop: &MaskArgs,
    args: &ScoreArgs,
    (scores, layout): (&CudaStorage, &Layout),
    additive: Option<(&CudaStorage, &Layout)>,
) -> Result<CudaStorage> {
    let device = scores.device();
    let (rows, keys) = rows_cols(layout.dims());
    for_cuda_dtype!(NAME, scores, |T| {
        let scores = view::<T>(NAME, scores, layout)?;
        let additive = optional_view::<T>(NAME, additive)?;
        // SAFETY: `softmax_dropout_fwd` writes `rows * keys` elements.
        let y = unsafe { output::<T>(device, rows * keys) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("softmax_dropout_fwd"),
            MODULE,
            ptx::SOFTMAX_DROPOUT,
        )?;
        let sizes = [rows as u64, keys as u64];
        let mut list = kernel.builder();
        list.arg(&scores);
        push_optional(&mut list, &additive);
        list.arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(args).arg(drop);
        // SAFETY: (scores, additive, y, rows, keys, args, drop); scores and y hold `rows * keys` elements,
        // additive none or those that `args` was made for.
        unsafe { launch(list, softmax(rows, keys, multiprocessors(device)?)) }?;
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    })
}

pub(super) fn bwd(
    drop: &MaskArgs,
    args: &ScoreArgs,
    (scores, layout): (&CudaStorage, &Layout),
    additive: Option<(&CudaStorage, &Layout)>,
    (dy, dy_layout): (&CudaStorage, &Layout),
) -> Result<CudaStorage> {
    let device = scores.device();
    let (rows, keys) = rows_cols(layout.dims());
    for_cuda_dtype!(NAME, scores, |T| {
        let scores = view::<T>(NAME, scores, layout)?;
        let additive = optional_view::<T>(NAME, additive)?;
        let dy = view::<T>(NAME, dy, dy_layout)?;
        // SAFETY: `softmax_dropout_bwd` writes `rows * keys` elements.
        let dscores = unsafe { output::<T>(device, rows * keys) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("softmax_dropout_bwd"),
            MODULE,
            ptx::SOFTMAX_DROPOUT,
        )?;
        let sizes = [rows as u64, keys as u64];
        let mut list = kernel.builder();
        list.arg(&scores);
        push_optional(&mut list, &additive);
        list.arg(&dy).arg(&dscores).arg(&sizes[0]).arg(&sizes[1]).arg(args).arg(drop);
        // SAFETY: (scores, additive, dy, dscores, rows, keys, args, drop); scores, dy and dscores hold
        // `rows * keys` elements, additive none or those that `args` was made for.
        unsafe { launch(list, softmax(rows, keys, multiprocessors(device)?)) }?;
        Ok(CudaStorage::wrap_cuda_slice(dscores, device.clone()))
    })
}
