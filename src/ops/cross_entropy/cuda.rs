use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result, Tensor};

use super::{CrossEntropyArgs, Forward, Kept, NAME};
use crate::claim::Input;
use crate::launch::config::{cross_entropy, cross_entropy_total};
use crate::launch::cuda::{
    for_cuda_dtype, kernel_name, launch, multiprocessors, output, ptx, view,
};

/// Candle caches the compiled module under this name, for all crates of a program.
const MODULE: &str = concat!("candle_dropout ", env!("CARGO_PKG_VERSION"), "::cross_entropy");

pub(super) fn fwd(
    args: &CrossEntropyArgs,
    (logits, layout): (&CudaStorage, &Layout),
    targets: &Tensor,
) -> Result<Forward<CudaStorage>> {
    let device = logits.device();
    let (rows, classes) = (args.rows as usize, args.classes as usize);
    let targets = Input::new(targets);
    let (targets, targets_layout) = targets.cuda(NAME)?;
    let targets = view::<i64>(NAME, targets, targets_layout)?;
    for_cuda_dtype!(NAME, logits, |T| {
        let logits = view::<T>(NAME, logits, layout)?;
        // SAFETY: `cross_entropy_fwd` writes the log-sum-exp of every row.
        let lse = unsafe { output::<f32>(device, rows) }?;
        // SAFETY: and its loss.
        let row_loss = unsafe { output::<f32>(device, rows) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("cross_entropy_fwd"),
            MODULE,
            ptx::CROSS_ENTROPY,
        )?;
        let mut list = kernel.builder();
        list.arg(&logits).arg(&targets).arg(&lse).arg(&row_loss).arg(args);
        // SAFETY: (logits, targets, lse, row_loss, args); args says how many rows and classes logits
        // has, and the others hold a number a row.
        unsafe { launch(list, cross_entropy(rows, classes, multiprocessors(device)?)) }?;

        // SAFETY: `cross_entropy_fwd_total` writes it.
        let loss = unsafe { output::<f32>(device, 1) }?;
        // SAFETY: as above.
        let inverse_count = unsafe { output::<f32>(device, 1) }?;
        let total = device.get_or_load_custom_func(
            "cross_entropy_fwd_total",
            MODULE,
            ptx::CROSS_ENTROPY,
        )?;
        let mut list = total.builder();
        list.arg(&row_loss).arg(&targets).arg(&loss).arg(&inverse_count).arg(args);
        // SAFETY: (row_loss, targets, loss, inverse_count, args): a number a row, twice, and two numbers.
        unsafe { launch(list, cross_entropy_total()) }?;
        let [loss, lse, inverse_count] = [loss, lse, inverse_count]
            .map(|slice| CudaStorage::wrap_cuda_slice(slice, device.clone()));
        Ok(Forward { loss, lse, inverse_count })
    })
}

pub(super) fn bwd(
    args: &CrossEntropyArgs,
    (logits, layout): (&CudaStorage, &Layout),
    targets: &Tensor,
    kept: &Kept,
    (dloss, dloss_layout): (&CudaStorage, &Layout),
) -> Result<CudaStorage> {
    let device = logits.device();
    let (rows, classes) = (args.rows as usize, args.classes as usize);
    let [targets, lse, inverse_count] = [targets, &kept.lse, &kept.inverse_count].map(Input::new);
    let (targets, targets_layout) = targets.cuda(NAME)?;
    let targets = view::<i64>(NAME, targets, targets_layout)?;
    let (lse, lse_layout) = lse.cuda(NAME)?;
    let lse = view::<f32>(NAME, lse, lse_layout)?;
    let (inverse_count, count_layout) = inverse_count.cuda(NAME)?;
    let inverse_count = view::<f32>(NAME, inverse_count, count_layout)?;
    let dloss = view::<f32>(NAME, dloss, dloss_layout)?;
    for_cuda_dtype!(NAME, logits, |T| {
        let logits = view::<T>(NAME, logits, layout)?;
        // SAFETY: `cross_entropy_bwd` writes `rows * classes` elements.
        let dlogits = unsafe { output::<T>(device, rows * classes) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("cross_entropy_bwd"),
            MODULE,
            ptx::CROSS_ENTROPY,
        )?;
        let mut list = kernel.builder();
        list.arg(&logits).arg(&targets).arg(&lse).arg(&inverse_count).arg(&dloss);
        list.arg(&dlogits).arg(args);
        // SAFETY: (logits, targets, lse, inverse_count, dloss, dlogits, args); logits and dlogits have the
        // rows and classes that args says, targets and lse a number a row, the others one.
        unsafe { launch(list, cross_entropy(rows, classes, multiprocessors(device)?)) }?;
        Ok(CudaStorage::wrap_cuda_slice(dlogits, device.clone()))
    })
}
