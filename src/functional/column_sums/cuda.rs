use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use super::{ColumnSumsGrids, NAME};
use crate::check::rows_cols;
use crate::cuda::{Module, for_cuda_dtype, launch, multiprocessors, output, ptx, storage};
use crate::input::Input;
use crate::mask::MaskArgs;

const KERNELS: Module = Module::new(NAME, ptx::COLUMN_SUMS);

pub(super) fn fwd(mask: &MaskArgs, x: &Tensor) -> Result<Storage> {
    let (rows, cols) = rows_cols(x.dims());
    let x = Input::new(NAME, x);
    let device = x.cuda_device()?;
    let grids = ColumnSumsGrids::new(rows, cols, multiprocessors(device)?);
    let chunks = grids.sums.grid[1] as usize;
    for_cuda_dtype!(x, |T| {
        let x = x.view::<T>()?;
        // SAFETY: `column_sums_fwd` writes `chunks * cols` elements.
        let sums = unsafe { output::<f32>(device, chunks * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "column_sums_fwd")?;
        let sizes = [rows as u64, cols as u64, chunks as u64];
        let mut list = kernel.args();
        list.arg(&x).arg(&sums).arg(&sizes[0]).arg(&sizes[1]).arg(mask);
        // SAFETY: (x, sums, rows, cols, mask); x holds `rows * cols` elements, sums `chunks * cols`.
        unsafe { launch(list, grids.sums) }?;

        // SAFETY: `column_sums_fwd_total` writes `cols` elements.
        let y = unsafe { output::<T>(device, cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "column_sums_fwd_total")?;
        let mut list = kernel.args();
        list.arg(&sums).arg(&y).arg(&sizes[2]).arg(&sizes[1]);
        // SAFETY: (sums, y, chunks, cols); sums holds `chunks * cols` elements, y `cols`.
        unsafe { launch(list, grids.totals) }?;
        Ok(storage(y, device))
    })
}
