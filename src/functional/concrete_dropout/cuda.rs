use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use super::NAME;
use crate::check::rows_cols;
use crate::cuda::sizes::{Launch, THREADS, elementwise};
use crate::cuda::{Module, for_cuda_dtype, launch, multiprocessors, output, ptx, storage};
use crate::input::Input;
use crate::mask::MaskArgs;

const KERNELS: Module = Module::new(NAME, ptx::CONCRETE_DROPOUT);

pub(super) fn fwd(
    mask: &MaskArgs,
    inverse_temperature: f64,
    x: &Tensor,
    logit_p: &Tensor,
) -> Result<Storage> {
    let (rows, cols) = rows_cols(x.dims());
    let [x, logit_p] = [x, logit_p].map(|x| Input::new(NAME, x));
    let device = x.cuda_device()?;
    let (logit_p, inverse_temperature) = (logit_p.view::<f32>()?, inverse_temperature as f32);
    for_cuda_dtype!(x, |T| {
        let x = x.view::<T>()?;
        // SAFETY: `concrete_dropout_fwd` writes `rows * cols` elements.
        let y = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "concrete_dropout_fwd")?;
        let sizes = [rows as u64, cols as u64];
        let mut list = kernel.args();
        list.arg(&x).arg(&logit_p).arg(&y).arg(&sizes[0]).arg(&sizes[1]);
        list.arg(&inverse_temperature).arg(mask);
        // SAFETY: (x, logit_p, y, rows, cols, inverse_temperature, mask); x and y hold `rows * cols` elements, logit_p
        // one.
        unsafe { launch(list, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}

/// The gradients of `x` and of `logit_p`.
pub(super) fn bwd(
    mask: &MaskArgs,
    inverse_temperature: f64,
    x: &Tensor,
    logit_p: &Tensor,
    dy: &Tensor,
) -> Result<(Storage, Storage)> {
    let (rows, cols) = rows_cols(x.dims());
    let [x, logit_p, dy] = [x, logit_p, dy].map(|x| Input::new(NAME, x));
    let device = x.cuda_device()?;
    let (logit_p, inverse_temperature) = (logit_p.view::<f32>()?, inverse_temperature as f32);
    let grid = elementwise(rows, cols, multiprocessors(device)?);
    let blocks = u64::from(grid.grid[0]);
    for_cuda_dtype!(x, |T| {
        let (x, dy) = (x.view::<T>()?, dy.view::<T>()?);
        // SAFETY: `concrete_dropout_bwd` writes `rows * cols` elements.
        let dx = unsafe { output::<T>(device, rows * cols) }?;
        // SAFETY: and a number a block.
        let sums = unsafe { output::<f64>(device, blocks as usize) }?;
        let kernel = KERNELS.kernel::<T>(device, "concrete_dropout_bwd")?;
        let sizes = [rows as u64, cols as u64];
        let mut list = kernel.args();
        list.arg(&x).arg(&logit_p).arg(&dy).arg(&dx).arg(&sums).arg(&sizes[0]).arg(&sizes[1]);
        list.arg(&inverse_temperature).arg(mask);
        // SAFETY: (x, logit_p, dy, dx, sums, rows, cols, inverse_temperature, mask); x, dy and dx hold `rows * cols`
        // elements, logit_p one, sums one a block.
        unsafe { launch(list, grid) }?;

        // SAFETY: `concrete_dropout_bwd_total` writes it.
        let dlogit_p = unsafe { output::<f32>(device, 1) }?;
        let total = KERNELS.kernel_named(device, "concrete_dropout_bwd_total")?;
        let mut list = total.args();
        list.arg(&sums).arg(&dlogit_p).arg(&blocks);
        // SAFETY: (sums, dlogit_p, count); sums holds `count` elements, dlogit_p one.
        unsafe { launch(list, Launch::new([1; 3], [THREADS, 1, 1])) }?;
        Ok((storage(dx, device), storage(dlogit_p, device)))
    })
}
