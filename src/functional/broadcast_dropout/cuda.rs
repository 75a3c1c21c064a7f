use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{Result, Storage, Tensor};

use super::NAME;
use super::args::{Groups, Values};
use crate::cuda::sizes::elementwise;
use crate::cuda::{
    Module, for_cuda_dtype, launch, multiprocessors, optional_view, output, ptx, push_optional,
    storage,
};
use crate::input::Input;

const KERNELS: Module = Module::new(NAME, ptx::BROADCAST_DROPOUT);

pub(super) fn fwd(
    op: &'static str,
    groups: &Groups,
    values: Values,
    x: &Tensor,
    ids: Option<&Tensor>,
) -> Result<Storage> {
    let &Groups { mask, rows, cols, mask_cols, repeat } = groups;
    let (x, ids) = (Input::new(op, x), Input::optional(op, ids));
    let device = x.cuda_device()?;
    for_cuda_dtype!(x, |T| {
        let (x, ids) = (x.view::<T>()?, optional_view::<u32>(&ids)?);
        // SAFETY: `broadcast_dropout_fwd` writes `rows * cols` elements.
        let y = unsafe { output::<T>(device, rows * cols) }?;
        let kernel = KERNELS.kernel::<T>(device, "broadcast_dropout_fwd")?;
        let sizes = [rows, cols, mask_cols.unwrap_or(0), repeat].map(|size| size as u64);
        let values = [values.scale, values.shift, values.fill].map(|value| value as f32);
        let mut list = kernel.args();
        list.arg(&x);
        push_optional(&mut list, &ids);
        list.arg(&y);
        sizes.iter().for_each(|size| {
            list.arg(size);
        });
        list.arg(&values[0]).arg(&values[1]).arg(&values[2]).arg(&mask);
        // SAFETY: (x, ids, y, rows, cols, mask_cols, repeat, scale, shift, fill, mask); x and y hold `rows * cols` elements,
        // ids none or `rows`.
        unsafe { launch(list, elementwise(rows, cols, multiprocessors(device)?)) }?;
        Ok(storage(y, device))
    })
}
