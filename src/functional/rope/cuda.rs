use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::{Result, Storage, Tensor};

use super::{NAME, RopeArgs};
use crate::cuda::{Module, for_cuda_dtype, launch, multiprocessors, output, ptx, storage};
use crate::input::Input;

const KERNELS: Module = Module::new(NAME, ptx::ROPE);

// SAFETY: `repr(C)` integers and floats without padding, laid out as `struct RopeArgs` of the kernels.
unsafe impl DeviceRepr for RopeArgs {}

pub(super) fn fwd(args: &RopeArgs, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Storage> {
    let len = x.elem_count();
    let [x, cos, sin] = [x, cos, sin].map(|x| Input::new(NAME, x));
    let device = x.cuda_device()?;
    for_cuda_dtype!(x, |T| {
        let (x, cos, sin) = (x.view_from::<T>(0)?, cos.view::<f32>()?, sin.view::<f32>()?);
        // SAFETY: `rope_fwd` writes all elements of every row.
        let y = unsafe { output::<T>(device, len) }?;
        let kernel = KERNELS.kernel::<T>(device, "rope_fwd")?;
        let mut list = kernel.args();
        list.arg(&x).arg(&cos).arg(&sin).arg(&y).arg(args);
        // SAFETY: (x, cos, sin, y, args); args describes where the rows of x and of the tables lie, as their
        // layouts say, and y holds `batches * heads * positions * 2 * half` elements.
        unsafe { launch(list, args.launch(multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}
