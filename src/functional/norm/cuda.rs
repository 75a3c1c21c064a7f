use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use super::NAME;
use super::args::NormArgs;
use crate::check::rows_cols;
use crate::cuda::{
    Module, for_cuda_dtype, launch, multiprocessors, optional_view, output, ptx, push_optional,
    storage,
};
use crate::input::Input;

const KERNELS: Module = Module::new(NAME, ptx::NORM);

pub(super) fn fwd(
    args: &NormArgs,
    z: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Storage> {
    let (rows, cols) = rows_cols(z.dims());
    let (z, weight) = (Input::new(NAME, z), Input::new(NAME, weight));
    let bias = Input::optional(NAME, bias);
    let device = z.cuda_device()?;
    for_cuda_dtype!(z, |T| {
        let (z, weight) = (z.view::<T>()?, weight.view::<T>()?);
        let bias = optional_view::<T>(&bias)?;
        // SAFETY: `norm_fwd` writes `rows * cols` elements.
        let n = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "norm_fwd")?;
        let sizes = [rows as u64, cols as u64];
        let (eps, removes_mean) = (args.eps as f32, u32::from(args.removes_mean));
        let mut list = kernel.args();
        list.arg(&z).arg(&weight);
        push_optional(&mut list, &bias);
        list.arg(&n).arg(&sizes[0]).arg(&sizes[1]).arg(&eps).arg(&removes_mean);
        // SAFETY: (z, weight, bias, n, rows, cols, eps, removes_mean); z and n hold `rows * cols` elements,
        // weight and bias, if any, `cols`.
        unsafe { launch(list, NormArgs::launch(rows, cols, multiprocessors(device)?)) }?;
        Ok(storage(n, device))
    })
}

/// `dz`, `dweight` and `dbias`.
pub(super) fn bwd(
    args: &NormArgs,
    z: &Tensor,
    weight: &Tensor,
    dn: &Tensor,
) -> Result<[Storage; 3]> {
    let (rows, cols) = rows_cols(z.dims());
    let [z, weight, dn] = [z, weight, dn].map(|x| Input::new(NAME, x));
    let device = z.cuda_device()?;
    let config = NormArgs::launch_bwd(rows, cols, multiprocessors(device)?);
    let blocks = config.grid[0] as usize;
    for_cuda_dtype!(z, |T| {
        let (z, weight, dn) = (z.view::<T>()?, weight.view::<T>()?, dn.view::<T>()?);
        // SAFETY: `norm_bwd` writes `rows * cols` elements.
        let dz = unsafe { output::<T>(device, rows * cols) }?;
        // SAFETY: it writes `2 * blocks * cols` elements.
        let sums = unsafe { output::<f32>(device, 2 * blocks * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "norm_bwd")?;
        let sizes = [rows as u64, cols as u64, blocks as u64];
        let (eps, removes_mean) = (args.eps as f32, u32::from(args.removes_mean));
        let mut list = kernel.args();
        list.arg(&z).arg(&weight).arg(&dn).arg(&dz).arg(&sums);
        list.arg(&sizes[0]).arg(&sizes[1]).arg(&eps).arg(&removes_mean);
        // SAFETY: (z, weight, dn, dz, sums, rows, cols, eps, removes_mean); z, dn and dz hold `rows * cols`
        // elements, weight `cols`, sums `2 * blocks * cols`.
        unsafe { launch(list, config) }?;

        // SAFETY: `norm_bwd_total` writes `cols` elements.
        let dweight = unsafe { output::<T>(device, cols) }?;
        // SAFETY: and as many here.
        let dbias = unsafe { output::<T>(device, cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "norm_bwd_total")?;
        let mut list = kernel.args();
        list.arg(&sums).arg(&dweight).arg(&dbias).arg(&sizes[2]).arg(&sizes[1]);
        // SAFETY: (sums, dweight, dbias, blocks, cols); sums holds `2 * blocks * cols` elements, dweight and
        // dbias `cols` each.
        unsafe { launch(list, NormArgs::launch_bwd_total(cols)) }?;
        Ok([storage(dz, device), storage(dweight, device), storage(dbias, device)])
    })
}
