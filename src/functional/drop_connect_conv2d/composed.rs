use candle_core::{Result, Tensor};
use candle_nn::Conv2dConfig;

use super::Geometry;
use crate::composed::wide;
use crate::functional::dropout::dropout;
use crate::mask::DropMask;

pub(super) fn drop_connect_conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    geometry: &Geometry,
    drop: &DropMask,
) -> Result<Tensor> {
    let Conv2dConfig { padding, stride, dilation, groups, cudnn_fwd_algo } = geometry.config;
    // What windows reach of the padded image alone: of the rest candle makes a gradient of another shape.
    let x = x.pad_with_zeros(2, padding, padding)?.pad_with_zeros(3, padding, padding)?;
    let x = x.narrow(2, 0, geometry.height.reached)?.narrow(3, 0, geometry.width.reached)?;
    let (wide_x, weight) = (wide(&x.contiguous()?)?, wide(&dropout(weight, drop)?.contiguous()?)?);
    let y = wide_x.conv2d_with_algo(&weight, 0, stride, dilation, groups, cudnn_fwd_algo)?;
    let y = match bias {
        // Candle's sum over all pixels, the gradient of a bias, is one of f32 at least.
        Some(bias) => y.broadcast_add(&wide(bias)?.reshape((1, geometry.outputs, 1, 1))?)?,
        None => y,
    };
    y.to_dtype(x.dtype())
}
