use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::{Device, Result, Storage, Tensor};

use super::{DropBlockArgs, NAME};
use crate::cuda::{
    Module, for_cuda_dtype, launch, multiprocessors, optional_view, output, ptx, push_optional,
    storage,
};
use crate::input::Input;
use crate::mask::MaskArgs;

const KERNELS: Module = Module::new(NAME, ptx::DROP_BLOCK);

// SAFETY: `repr(C)` integers without padding, laid out as `struct DropBlockArgs` of the kernels.
unsafe impl DeviceRepr for DropBlockArgs {}

/// How many elements of a mask of `args.elements` are dropped.
pub(super) fn count(mask: &MaskArgs, args: &DropBlockArgs, device: &Device) -> Result<Storage> {
    let device = device.as_cuda_device()?;
    let dropped = device.cuda_stream().alloc_zeros::<i64>(1).w()?;
    let kernel = KERNELS.kernel_named(device, "drop_block_count")?;
    let mut list = kernel.args();
    list.arg(&dropped).arg(args).arg(mask);
    // SAFETY: (dropped, args, mask); dropped holds one element of 64 bits, which is 0.
    unsafe { launch(list, args.count_launch(multiprocessors(device)?)) }?;
    Ok(storage(dropped, device))
}

pub(super) fn fwd(
    mask: &MaskArgs,
    args: &DropBlockArgs,
    x: &Tensor,
    dropped: Option<&Tensor>,
) -> Result<Storage> {
    let len = x.elem_count();
    let (x, dropped) = (Input::new(NAME, x), Input::optional(NAME, dropped));
    let device = x.cuda_device()?;
    for_cuda_dtype!(x, |T| {
        let (x, dropped) = (x.view::<T>()?, optional_view::<i64>(&dropped)?);
        // SAFETY: `drop_block_fwd` writes all elements of x.
        let y = unsafe { output::<T>(device, len) }?;
        let kernel = KERNELS.kernel::<T>(device, "drop_block_fwd")?;
        let mut list = kernel.args();
        list.arg(&x).arg(&y);
        push_optional(&mut list, &dropped);
        list.arg(args).arg(mask);
        // SAFETY: (x, y, dropped, args, mask); x and y hold `channels` planes for each of the mask, dropped none or
        // one element of 64 bits.
        unsafe { launch(list, args.fwd_launch(multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}
