use candle_core::backend::BackendStorage;
use candle_core::op::Add;
use candle_core::{Layout, Result, Storage, Tensor};

use super::{NAME, Size};
use crate::input::Input;

/// From a contiguous x.
pub(super) fn fwd(
    size: Size,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Storage> {
    let (x, weight) = (Input::new(NAME, x), Input::new(NAME, weight));
    let rows = Layout::contiguous_with_offset((size.rows, size.inputs), x.start());
    let y = x.cuda()?.matmul(weight.cuda()?, size.of_product(), &rows, weight.layout())?;
    let Some(bias) = Input::optional(NAME, bias) else {
        return Ok(Storage::Cuda(y));
    };
    let layout = Layout::contiguous((size.rows, size.outputs));
    let bias_layout = bias.layout().broadcast_as(layout.shape().clone())?;
    Ok(Storage::Cuda(y.binary_impl::<Add>(bias.cuda()?, &layout, &bias_layout)?))
}
