//! The naive formula of `drop_connect_conv2d`.

use candle_core::{DType, Result, Tensor};
use candle_nn::Conv2dConfig;

use crate::dropout;

/// `conv2d(x, keep ? weight * drop_scale : 0) + bias`, of an image padded and cut to what windows reach, since candle's
/// gradient of another one has another shape.
pub fn formula(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: Conv2dConfig,
    keep: &Tensor,
    drop_scale: f64,
) -> Result<Tensor> {
    let Conv2dConfig { padding, stride, dilation, groups, .. } = config;
    let mut x = x.clone();
    for dim in [2, 3] {
        x = x.pad_with_zeros(dim, padding, padding)?;
        let window = dilation * (weight.dim(dim)? - 1) + 1;
        x = x.narrow(dim, 0, (x.dim(dim)? - window) / stride * stride + window)?;
    }
    let weight = dropout::formula(weight, keep, drop_scale)?;
    // Candle has no product of bf16 on the CPU.
    let dtype = if x.dtype() == DType::BF16 { DType::F32 } else { x.dtype() };
    let (wide, weight) = (x.contiguous()?.to_dtype(dtype)?, weight.contiguous()?.to_dtype(dtype)?);
    let y = wide.conv2d(&weight, 0, stride, dilation, groups)?.to_dtype(x.dtype())?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, bias.dim(0)?, 1, 1))?),
        None => Ok(y),
    }
}
