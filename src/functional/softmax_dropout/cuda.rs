use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::{Result, Storage, Tensor};

use super::NAME;
use super::args::ScoreArgs;
use crate::check::rows_cols;
use crate::cuda::{
    Module, for_cuda_dtype, launch, multiprocessors, optional_view, output, ptx, push_optional,
    storage,
};
use crate::input::Input;
use crate::mask::MaskArgs;

const KERNELS: Module = Module::new(NAME, ptx::SOFTMAX_DROPOUT);

// SAFETY: `repr(C)` integers and floats without padding, laid out as `struct ScoreArgs` of the kernels.
unsafe impl DeviceRepr for ScoreArgs {}

pub(super) fn fwd(
    drop: &MaskArgs,
    args: &ScoreArgs,
    scores: &Tensor,
    additive: Option<&Tensor>,
) -> Result<Storage> {
    let (rows, keys) = rows_cols(scores.dims());
    let (scores, additive) = (Input::new(NAME, scores), Input::optional(NAME, additive));
    let device = scores.cuda_device()?;
    for_cuda_dtype!(scores, |T| {
        let (scores, additive) = (scores.view::<T>()?, optional_view::<T>(&additive)?);
        // SAFETY: `softmax_dropout_fwd` writes `rows * keys` elements.
        let y = unsafe { output::<T>(device, rows * keys) }?;
        let kernel = KERNELS.kernel::<T>(device, "softmax_dropout_fwd")?;
        let sizes = [rows as u64, keys as u64];
        let mut list = kernel.args();
        list.arg(&scores);
        push_optional(&mut list, &additive);
        list.arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(args).arg(drop);
        // SAFETY: (scores, additive, y, rows, keys, args, drop); scores and y hold `rows * keys` elements,
        // additive none or those that `args` was made for.
        unsafe { launch(list, ScoreArgs::launch(rows, keys, multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}

pub(super) fn bwd(
    drop: &MaskArgs,
    args: &ScoreArgs,
    scores: &Tensor,
    additive: Option<&Tensor>,
    dy: &Tensor,
) -> Result<Storage> {
    let (rows, keys) = rows_cols(scores.dims());
    let (scores, additive) = (Input::new(NAME, scores), Input::optional(NAME, additive));
    let dy = Input::new(NAME, dy);
    let device = scores.cuda_device()?;
    for_cuda_dtype!(scores, |T| {
        let (scores, dy) = (scores.view::<T>()?, dy.view::<T>()?);
        let additive = optional_view::<T>(&additive)?;
        // SAFETY: `softmax_dropout_bwd` writes `rows * keys` elements.
        let dscores = unsafe { output::<T>(device, rows * keys) }?;
        let kernel = KERNELS.kernel::<T>(device, "softmax_dropout_bwd")?;
        let sizes = [rows as u64, keys as u64];
        let mut list = kernel.args();
        list.arg(&scores);
        push_optional(&mut list, &additive);
        list.arg(&dy).arg(&dscores).arg(&sizes[0]).arg(&sizes[1]).arg(args).arg(drop);
        // SAFETY: (scores, additive, dy, dscores, rows, keys, args, drop); scores, dy and dscores hold
        // `rows * keys` elements, additive none or those that `args` was made for.
        unsafe { launch(list, ScoreArgs::launch(rows, keys, multiprocessors(device)?)) }?;
        Ok(storage(dscores, device))
    })
}
