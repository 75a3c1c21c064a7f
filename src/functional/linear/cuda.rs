use candle_core::backend::BackendStorage;
use candle_core::op::Add;
use candle_core::{Layout, Result, Storage, Tensor};

use super::NAME;
use crate::input::Input;

/// From a matrix x.
pub(super) fn fwd(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Storage> {
    let ((rows, inputs), outputs) = (x.dims2()?, weight.dim(1)?);
    let (x, weight) = (Input::new(NAME, x), Input::new(NAME, weight));
    let size = (1, rows, outputs, inputs);
    let y = x.cuda()?.matmul(weight.cuda()?, size, x.layout(), weight.layout())?;
    let Some(bias) = Input::optional(NAME, bias) else {
        return Ok(Storage::Cuda(y));
    };
    let layout = Layout::contiguous((rows, outputs));
    let bias_layout = bias.layout().broadcast_as(layout.shape().clone())?;
    Ok(Storage::Cuda(y.binary_impl::<Add>(bias.cuda()?, &layout, &bias_layout)?))
}
