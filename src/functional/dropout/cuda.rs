use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use super::NAME;
use crate::check::rows_cols;
use crate::cuda::sizes::elementwise;
use crate::cuda::{Module, for_cuda_dtype, launch, multiprocessors, output, ptx, storage};
use crate::input::Input;
use crate::mask::MaskArgs;

const KERNELS: Module = Module::new(NAME, ptx::DROPOUT);

pub(super) fn fwd(mask: &MaskArgs, x: &Tensor) -> Result<Storage> {
    let (rows, cols) = rows_cols(x.dims());
    let x = Input::new(NAME, x);
    let device = x.cuda_device()?;
    for_cuda_dtype!(x, |T| {
        let x = x.view::<T>()?;
        // SAFETY: `dropout_fwd` writes `rows * cols` elements.
        let y = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "dropout_fwd")?;
        let sizes = [rows as u64, cols as u64];
        let mut list = kernel.args();
        list.arg(&x).arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(mask);
        // SAFETY: (x, y, rows, cols, mask); x and y hold `rows * cols` elements.
        unsafe { launch(list, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}
