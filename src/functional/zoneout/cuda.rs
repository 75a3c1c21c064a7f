use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use super::NAME;
use crate::check::rows_cols;
use crate::cuda::sizes::elementwise;
use crate::cuda::{Module, for_cuda_dtype, launch, multiprocessors, output, ptx, storage};
use crate::input::Input;
use crate::mask::MaskArgs;

const KERNELS: Module = Module::new(NAME, ptx::ZONEOUT);

pub(super) fn fwd(mask: &MaskArgs, new: &Tensor, old: &Tensor) -> Result<Storage> {
    let (rows, cols) = rows_cols(new.dims());
    let [new, old] = [new, old].map(|x| Input::new(NAME, x));
    let device = new.cuda_device()?;
    for_cuda_dtype!(new, |T| {
        let (new, old) = (new.view::<T>()?, old.view::<T>()?);
        // SAFETY: `zoneout_fwd` writes `rows * cols` elements.
        let y = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "zoneout_fwd")?;
        let sizes = [rows as u64, cols as u64];
        let mut list = kernel.args();
        list.arg(&new).arg(&old).arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(mask);
        // SAFETY: (fresh, old, y, rows, cols, mask); the tensors hold `rows * cols` elements each.
        unsafe { launch(list, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}

/// The gradients of `new` and of `old`.
pub(super) fn bwd(mask: &MaskArgs, dy: &Tensor) -> Result<[Storage; 2]> {
    let (rows, cols) = rows_cols(dy.dims());
    let dy = Input::new(NAME, dy);
    let device = dy.cuda_device()?;
    for_cuda_dtype!(dy, |T| {
        let dy = dy.view::<T>()?;
        // SAFETY: `zoneout_bwd` writes `rows * cols` elements of both.
        let dnew = unsafe { output::<T>(device, rows * cols) }?;
        // SAFETY: as above.
        let dold = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "zoneout_bwd")?;
        let sizes = [rows as u64, cols as u64];
        let mut list = kernel.args();
        list.arg(&dy).arg(&dnew).arg(&dold).arg(&sizes[0]).arg(&sizes[1]).arg(mask);
        // SAFETY: (dy, dnew, dold, rows, cols, mask); the tensors hold `rows * cols` elements each.
        unsafe { launch(list, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok([storage(dnew, device), storage(dold, device)])
    })
}
