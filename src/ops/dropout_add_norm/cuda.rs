use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result};

use super::NAME;
use super::norm::NormArgs;
use crate::elem::rows_cols;
use crate::launch::config;
use crate::launch::cuda::{
    for_cuda_dtype, kernel_name, launch, multiprocessors, optional_view, output, ptx,
    push_optional, view,
};
use crate::mask::{DropMask, MaskArgs};

/// Candle caches the compiled module under this name, for all crates of a program.
const MODULE: &str = concat!("candle_dropout ", env!("CARGO_PKG_VERSION"), "::dropout_add_norm");

type Input<'a> = (&'a CudaStorage, &'a Layout);

/// `z` and `n`.
pub(super) fn fwd(
    mask: &MaskArgs,
    args: &NormArgs,
    (x, layout): Input,
    residual: Option<Input>,
    bias: Option<Input>,
    weight: Input,
    norm_bias: Option<Input>,
) -> Result<(CudaStorage, CudaStorage)> {
    let device = x.device();
    let (rows, cols) = rows_cols(layout.dims());
    for_cuda_dtype!(NAME, x, |T| {
        let x = view::<T>(NAME, x, layout)?;
        let residual = optional_view::<T>(NAME, residual)?;
        let bias = optional_view::<T>(NAME, bias)?;
        let (weight, weight_layout) = weight;
        let weight = view::<T>(NAME, weight, weight_layout)?;
        let norm_bias = optional_view::<T>(NAME, norm_bias)?;
        // SAFETY: `dropout_add_norm_fwd` writes `rows * cols` elements of each.
        let (z, n) =
            unsafe { (output::<T>(device, rows * cols)?, output::<T>(device, rows * cols)?) };
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("dropout_add_norm_fwd"),
            MODULE,
            ptx::DROPOUT_ADD_NORM,
        )?;
        let sizes = [rows as u64, cols as u64];
        let (eps, removes_mean) = (args.eps as f32, u32::from(args.removes_mean));
        let mut list = kernel.builder();
        list.arg(&x);
        push_optional(&mut list, &residual);
        push_optional(&mut list, &bias);
        list.arg(&weight);
        push_optional(&mut list, &norm_bias);
        list.arg(&z).arg(&n).arg(&sizes[0]).arg(&sizes[1]);
        list.arg(&eps).arg(&removes_mean).arg(mask);
        // SAFETY: (x, residual, bias, weight, norm_bias, z, n, rows, cols, eps, removes_mean, mask); x, z, n
        // and residual, if any, hold `rows * cols` elements, weight and the biases, if any, `cols`.
        unsafe { launch(list, config::norm(rows, cols, multiprocessors(device)?)) }?;
        let [z, n] = [z, n].map(|slice| CudaStorage::wrap_cuda_slice(slice, device.clone()));
        Ok((z, n))
    })
}

/// `n` alone, of a finished `z`.
pub(super) fn norm(
    args: &NormArgs,
    (z, layout): Input,
    weight: Input,
    bias: Option<Input>,
) -> Result<CudaStorage> {
    let device = z.device();
    let (rows, cols) = rows_cols(layout.dims());
    let mask = DropMask::none().args(NAME, layout.dims())?;
    for_cuda_dtype!(NAME, z, |T| {
        let z = view::<T>(NAME, z, layout)?;
        let (weight, weight_layout) = weight;
        let weight = view::<T>(NAME, weight, weight_layout)?;
        let bias = optional_view::<T>(NAME, bias)?;
        // SAFETY: `dropout_add_norm_fwd` writes `rows * cols` elements.
        let n = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("dropout_add_norm_fwd"),
            MODULE,
            ptx::DROPOUT_ADD_NORM,
        )?;
        let sizes = [rows as u64, cols as u64];
        let (eps, removes_mean) = (args.eps as f32, u32::from(args.removes_mean));
        let null = 0u64;
        let mut list = kernel.builder();
        list.arg(&z).arg(&null).arg(&null).arg(&weight);
        push_optional(&mut list, &bias);
        list.arg(&null).arg(&n).arg(&sizes[0]).arg(&sizes[1]);
        list.arg(&eps).arg(&removes_mean).arg(&mask);
        // SAFETY: (x, residual, bias, weight, norm_bias, z, n, rows, cols, eps, removes_mean, mask); x and n
        // hold `rows * cols` elements, weight and norm_bias, if any, `cols`; the others are absent.
        unsafe { launch(list, config::norm(rows, cols, multiprocessors(device)?)) }?;
        Ok(CudaStorage::wrap_cuda_slice(n, device.clone()))
    })
}

/// `dz`, `dweight` and `dbias`.
pub(super) fn bwd(
    args: &NormArgs,
    (z, layout): Input,
    (weight, weight_layout): Input,
    (dn, dn_layout): Input,
) -> Result<[CudaStorage; 3]> {
    let device = z.device();
    let (rows, cols) = rows_cols(layout.dims());
    for_cuda_dtype!(NAME, z, |T| {
        let z = view::<T>(NAME, z, layout)?;
        let weight = view::<T>(NAME, weight, weight_layout)?;
        let dn = view::<T>(NAME, dn, dn_layout)?;
        let config = config::norm_bwd(rows, cols, multiprocessors(device)?);
        let blocks = config.grid[0] as usize;
        // SAFETY: `dropout_add_norm_bwd` writes `rows * cols` elements.
        let dz = unsafe { output::<T>(device, rows * cols) }?;
        // SAFETY: it writes `2 * blocks * cols` elements.
        let sums = unsafe { output::<f32>(device, 2 * blocks * cols) }?;
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("dropout_add_norm_bwd"),
            MODULE,
            ptx::DROPOUT_ADD_NORM,
        )?;
        let sizes = [rows as u64, cols as u64, blocks as u64];
        let (eps, removes_mean) = (args.eps as f32, u32::from(args.removes_mean));
        let mut list = kernel.builder();
        list.arg(&z).arg(&weight).arg(&dn).arg(&dz).arg(&sums);
        list.arg(&sizes[0]).arg(&sizes[1]).arg(&eps).arg(&removes_mean);
        // SAFETY: (z, weight, dn, dz, sums, rows, cols, eps, removes_mean); z, dn and dz hold `rows * cols`
        // elements, weight `cols`, sums `2 * blocks * cols`.
        unsafe { launch(list, config) }?;

        // SAFETY: `dropout_add_norm_bwd_total` writes `cols` elements of each.
        let (dweight, dbias) = unsafe { (output::<T>(device, cols)?, output::<T>(device, cols)?) };
        let kernel = device.get_or_load_custom_func(
            &kernel_name::<T>("dropout_add_norm_bwd_total"),
            MODULE,
            ptx::DROPOUT_ADD_NORM,
        )?;
        let mut list = kernel.builder();
        list.arg(&sums).arg(&dweight).arg(&dbias).arg(&sizes[2]).arg(&sizes[1]);
        // SAFETY: (sums, dweight, dnorm_bias, blocks, cols); sums holds `2 * blocks * cols` elements, dweight
        // and dnorm_bias `cols` each.
        unsafe { launch(list, config::norm_totals(cols)) }?;
        Ok([dz, dweight, dbias].map(|slice| CudaStorage::wrap_cuda_slice(slice, device.clone())))
    })
}
