use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use crate::check::rows_cols;
use crate::cuda::sizes::elementwise;
use crate::cuda::{
    Module, for_cuda_dtype, launch, multiprocessors, optional_view, output, ptx, push_optional,
    storage,
};
use crate::input::Input;
use crate::mask::MaskArgs;

const KERNELS: Module = Module::new("gaussian", ptx::GAUSSIAN);

pub(super) fn fwd(
    op: &'static str,
    mask: &MaskArgs,
    scale: f64,
    like: &Tensor,
    a: Option<&Tensor>,
    b: Option<&Tensor>,
) -> Result<Storage> {
    let (rows, cols) = rows_cols(like.dims());
    let (a, b) = (Input::optional(op, a), Input::optional(op, b));
    let like = Input::new(op, like);
    let device = like.cuda_device()?;
    for_cuda_dtype!(like, |T| {
        let (a, b) = (optional_view::<T>(&a)?, optional_view::<T>(&b)?);
        // SAFETY: `gaussian_fwd` writes `rows * cols` elements.
        let y = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "gaussian_fwd")?;
        let (sizes, scale) = ([rows as u64, cols as u64], scale as f32);
        let mut list = kernel.args();
        push_optional(&mut list, &a);
        push_optional(&mut list, &b);
        list.arg(&y).arg(&sizes[0]).arg(&sizes[1]).arg(&scale).arg(mask);
        // SAFETY: (a, b, y, rows, cols, scale, mask); y and what is there of a and b hold `rows * cols` elements.
        unsafe { launch(list, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}
