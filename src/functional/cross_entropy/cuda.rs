use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::{Result, Storage, Tensor};

use super::{CrossEntropyArgs, Forward, Kept, NAME};
use crate::cuda::{Module, for_cuda_dtype, launch, multiprocessors, output, ptx, storage};
use crate::input::Input;

const KERNELS: Module = Module::new(NAME, ptx::CROSS_ENTROPY);

// SAFETY: `repr(C)` integers and floats, laid out as `struct CrossEntropyArgs` of the kernels.
unsafe impl DeviceRepr for CrossEntropyArgs {}

pub(super) fn fwd(args: &CrossEntropyArgs, logits: &Tensor, targets: &Tensor) -> Result<Forward> {
    let rows = args.rows as usize;
    let (logits, targets) = (Input::new(NAME, logits), Input::new(NAME, targets));
    let device = logits.cuda_device()?;
    let targets = targets.view::<i64>()?;
    for_cuda_dtype!(logits, |T| {
        let logits = logits.view::<T>()?;
        // SAFETY: `cross_entropy_fwd` writes two numbers of every row.
        let statistics = unsafe { output::<f32>(device, 2 * rows) }?;
        // SAFETY: and its loss.
        let row_loss = unsafe { output::<f32>(device, rows) }?;
        let kernel = KERNELS.kernel::<T>(device, "cross_entropy_fwd")?;
        let mut list = kernel.args();
        list.arg(&logits).arg(&targets).arg(&statistics).arg(&row_loss).arg(args);
        // SAFETY: (logits, targets, statistics, row_loss, args); args says how many rows and classes logits
        // has, targets and row_loss hold a number a row, statistics two.
        unsafe { launch(list, args.launch(multiprocessors(device)?)) }?;

        // SAFETY: `cross_entropy_fwd_total` writes it.
        let loss = unsafe { output::<f32>(device, 1) }?;
        // SAFETY: as above.
        let row_weight = unsafe { output::<f32>(device, 1) }?;
        let total = KERNELS.kernel_named(device, "cross_entropy_fwd_total")?;
        let mut list = total.args();
        list.arg(&row_loss).arg(&targets).arg(&loss).arg(&row_weight).arg(args);
        // SAFETY: (row_loss, targets, loss, row_weight, args): a number a row, twice, and two numbers.
        unsafe { launch(list, CrossEntropyArgs::launch_total()) }?;
        let [loss, statistics, row_weight] =
            [loss, statistics, row_weight].map(|output| storage(output, device));
        Ok(Forward { loss, statistics, row_weight })
    })
}

pub(super) fn bwd(
    args: &CrossEntropyArgs,
    logits: &Tensor,
    targets: &Tensor,
    kept: &Kept,
    dloss: &Tensor,
) -> Result<Storage> {
    let len = logits.elem_count();
    let [logits, targets, statistics, row_weight, dloss] =
        [logits, targets, &kept.statistics, &kept.row_weight, dloss].map(|x| Input::new(NAME, x));
    let device = logits.cuda_device()?;
    let targets = targets.view::<i64>()?;
    let (statistics, row_weight) = (statistics.view::<f32>()?, row_weight.view::<f32>()?);
    let dloss = dloss.view::<f32>()?;
    for_cuda_dtype!(logits, |T| {
        let logits = logits.view::<T>()?;
        // SAFETY: `cross_entropy_bwd` writes `rows * classes` elements.
        let dlogits = unsafe { output::<T>(device, len) }?;
        let kernel = KERNELS.kernel::<T>(device, "cross_entropy_bwd")?;
        let mut list = kernel.args();
        list.arg(&logits).arg(&targets).arg(&statistics).arg(&row_weight).arg(&dloss);
        list.arg(&dlogits).arg(args);
        // SAFETY: (logits, targets, statistics, row_weight, dloss, dlogits, args); logits and dlogits have the
        // rows and classes that args says, targets a number a row, statistics two, the others one.
        unsafe { launch(list, args.launch(multiprocessors(device)?)) }?;
        Ok(storage(dlogits, device))
    })
}
