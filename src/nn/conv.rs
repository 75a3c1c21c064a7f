//! `candle_nn::conv`, with convolutions in one dimension whose values and gradients are right.

use candle_core::{Module, Result, Tensor, bail};
use candle_nn::VarBuilder;
pub use candle_nn::conv::*;

/// What no convolution has: candle divides by a stride or groups of 0, and wraps around at a kernel without length.
fn check_config(op: &str, [kernel, stride, dilation, groups]: [usize; 4]) -> Result<()> {
    let named = [("stride", stride), ("dilation", dilation), ("groups", groups)];
    for (arg, value) in named {
        if value == 0 {
            bail!("{op}: {arg}: expected at least 1, got 0; set it in the config")
        }
    }
    if kernel == 0 {
        bail!(
            "{op}: weight: expected a kernel of at least 1 position, got 0; build the layer with one"
        )
    }
    Ok(())
}

/// A convolution along the last dimension, in the place of [`candle_nn::Conv1d`], whose gradients are wrong on the CPU
/// for more than one sequence and more than one output channel: it takes the gradient that arrives, transposed, as if
/// it were not.
///
/// What tracks a gradient goes through candle's `conv2d` with a height of 1; the rest is candle's own `conv1d`.
///
/// # Shapes
/// `x [B, in, L]`, `weight [out, in / groups, K]`, `bias [out]`; the result `[B, out, L']`, where
/// `L' = (L + 2 padding - dilation (K - 1) - 1) / stride + 1`.
///
/// # Errors
/// Stride, dilation, groups or the kernel's length are 0; shapes do not fit, or the kernel is longer than the padded
/// sequence; dtypes or devices differ.
///
/// # Example
/// ```
/// use candle_core::{Device, Module, Tensor, Var};
/// use candle_dropout::nn::Conv1d;
///
/// # fn main() -> candle_core::Result<()> {
/// let weight = Var::new(&[[[1f32, 10.]]], &Device::Cpu)?;
/// let layer = Conv1d::new(weight.as_tensor().clone(), None, Default::default());
/// let y = layer.forward(&Tensor::new(&[[[1f32, 2., 3.]], [[4., 5., 6.]]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[21., 32.]], [[54., 65.]]]);
/// let grads = y.sum_all()?.backward()?;
/// assert_eq!(grads.get(&weight).expect("one").to_vec3::<f32>()?, [[[12., 16.]]]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Conv1d(candle_nn::Conv1d);

impl Conv1d {
    /// A layer with a weight `[out, in / groups, K]` and perhaps a bias `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: Conv1dConfig) -> Self {
        Self(candle_nn::Conv1d::new(weight, bias, config))
    }

    /// Padding, stride, dilation and groups.
    pub fn config(&self) -> &Conv1dConfig {
        self.0.config()
    }

    /// The weight.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.0.bias()
    }
}

impl From<candle_nn::Conv1d> for Conv1d {
    fn from(layer: candle_nn::Conv1d) -> Self {
        Self(layer)
    }
}

impl From<Conv1d> for candle_nn::Conv1d {
    fn from(layer: Conv1d) -> Self {
        layer.0
    }
}

impl Module for Conv1d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Conv1dConfig { padding, stride, dilation, groups, cudnn_fwd_algo } = *self.config();
        let (x_dims, weight_dims) = (x.dims(), self.weight().dims());
        let (&[_, _, len], &[_, _, kernel]) = (x_dims, weight_dims) else {
            bail!(
                "conv1d: x: expected [B, in, L] for a weight [out, in / groups, K], got {x_dims:?} for \
                 {weight_dims:?}; reshape it"
            )
        };
        check_config("conv1d", [kernel, stride, dilation, groups])?;
        let (padded, window) = (len + 2 * padding, dilation * (kernel - 1) + 1);
        if padded < window {
            bail!(
                "conv1d: x: expected at least {window} positions with their padding, got {padded}; pad it"
            )
        }
        // A strided kernel, too, is one that candle's conv1d takes as if it were not.
        let weight = self.weight().contiguous()?;
        let y = if x.track_op() || weight.track_op() {
            // Without what no window reaches: candle's gradient would be shorter than x.
            let used = (padded - window) / stride * stride + window;
            let x = x.pad_with_zeros(2, padding, padding)?.narrow(2, 0, used)?.unsqueeze(2)?;
            let weight = weight.unsqueeze(2)?;
            let y = x.conv2d_with_algo(&weight, 0, stride, dilation, groups, cudnn_fwd_algo)?;
            y.squeeze(2)?
        } else {
            x.conv1d_with_algo(&weight, padding, stride, dilation, groups, cudnn_fwd_algo)?
        };
        match self.bias() {
            Some(bias) => y.broadcast_add(&bias.reshape((1, bias.dims1()?, 1))?),
            None => Ok(y),
        }
    }
}

/// A [`Conv1d`] from the variables `weight` and `bias` of `vb`; if they do not exist they are drawn as
/// [`candle_nn::conv1d`] draws them.
///
/// # Errors
/// Stride, dilation, groups or the length of the kernel are 0; `vb` holds a variable of another shape.
pub fn conv1d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    cfg: Conv1dConfig,
    vb: VarBuilder,
) -> Result<Conv1d> {
    check_config("conv1d", [kernel_size, cfg.stride, cfg.dilation, cfg.groups])?;
    candle_nn::conv1d(in_channels, out_channels, kernel_size, cfg, vb).map(Conv1d)
}

/// A [`Conv1d`] without a bias; see [`conv1d`].
///
/// # Errors
/// Those of [`conv1d`].
pub fn conv1d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    cfg: Conv1dConfig,
    vb: VarBuilder,
) -> Result<Conv1d> {
    check_config("conv1d", [kernel_size, cfg.stride, cfg.dilation, cfg.groups])?;
    candle_nn::conv1d_no_bias(in_channels, out_channels, kernel_size, cfg, vb).map(Conv1d)
}

/// A transposed convolution along the last dimension, in the place of [`candle_nn::ConvTranspose1d`], which has no
/// gradient, and wrong values on the CPU without padding for more than one sequence.
///
/// It goes through candle's `conv_transpose2d` with a height of 1.
///
/// # Shapes
/// `x [B, in, L]`, `weight [in, out / groups, K]`, `bias [out]`; the result `[B, out, L']`, where
/// `L' = (L - 1) stride - 2 padding + dilation (K - 1) + output_padding + 1`.
///
/// # Errors
/// Stride, dilation, groups, the kernel's or the sequence's length are 0; shapes do not fit, or the padding takes all
/// of the result; dtypes or devices differ.
///
/// # Example
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_dropout::nn::ConvTranspose1d;
///
/// # fn main() -> candle_core::Result<()> {
/// let weight = Tensor::new(&[[[1f32, 10.]]], &Device::Cpu)?;
/// let layer = ConvTranspose1d::new(weight, None, Default::default());
/// let y = layer.forward(&Tensor::new(&[[[1f32, 2.]], [[3., 4.]]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[1., 12., 20.]], [[3., 34., 40.]]]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ConvTranspose1d(candle_nn::ConvTranspose1d);

impl ConvTranspose1d {
    /// A layer with a weight `[in, out / groups, K]` and perhaps a bias `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: ConvTranspose1dConfig) -> Self {
        Self(candle_nn::ConvTranspose1d::new(weight, bias, config))
    }

    /// Padding, stride, dilation and groups.
    pub fn config(&self) -> &ConvTranspose1dConfig {
        self.0.config()
    }

    /// The weight.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.0.bias()
    }
}

impl From<candle_nn::ConvTranspose1d> for ConvTranspose1d {
    fn from(layer: candle_nn::ConvTranspose1d) -> Self {
        Self(layer)
    }
}

impl From<ConvTranspose1d> for candle_nn::ConvTranspose1d {
    fn from(layer: ConvTranspose1d) -> Self {
        layer.0
    }
}

impl Module for ConvTranspose1d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let ConvTranspose1dConfig { padding, output_padding, stride, dilation, groups } =
            *self.config();
        let (x_dims, weight_dims) = (x.dims(), self.weight().dims());
        let (&[_, inputs, len], &[weight_inputs, _, kernel]) = (x_dims, weight_dims) else {
            bail!(
                "conv_transpose1d: x: expected [B, in, L] for a weight [in, out / groups, K], got {x_dims:?} for \
                 {weight_dims:?}; reshape it"
            )
        };
        check_config("conv_transpose1d", [kernel, stride, dilation, groups])?;
        if len == 0 {
            bail!(
                "conv_transpose1d: x: expected at least 1 position, got {x_dims:?}; leave the call out"
            )
        }
        if inputs != weight_inputs || inputs % groups != 0 {
            bail!(
                "conv_transpose1d: x: expected {weight_inputs} channels, a multiple of the {groups} groups, got \
                 {inputs}; build the layer for them"
            )
        }
        let (x, weight) = (x.unsqueeze(2)?, self.weight().unsqueeze(2)?);
        let of_group = |group: usize| {
            let (start, len) = (group * (inputs / groups), inputs / groups);
            let (x, weight) = (x.narrow(1, start, len)?, weight.narrow(0, start, len)?);
            x.contiguous()?.conv_transpose2d(&weight.contiguous()?, 0, 0, stride, dilation)
        };
        let parts = (0..groups).map(of_group).collect::<Result<Vec<_>>>()?;
        let whole = Tensor::cat(&parts, 1)?.squeeze(2)?;
        // Padding takes from both ends; the other padding gives back at the end, and zeros beyond it.
        let len = whole.dim(2)?;
        let Some(wanted) = (len + output_padding)
            .checked_sub(2 * padding)
            .filter(|wanted| *wanted > 0 && padding <= len)
        else {
            bail!(
                "conv_transpose1d: padding: expected less than half of {len} positions, got {padding}"
            )
        };
        let there = wanted.min(len - padding);
        let y = whole.narrow(2, padding, there)?.pad_with_zeros(2, 0, wanted - there)?;
        match self.bias() {
            Some(bias) => y.broadcast_add(&bias.reshape((1, bias.dims1()?, 1))?),
            None => Ok(y),
        }
    }
}

/// A [`ConvTranspose1d`] from the variables `weight` and `bias` of `vb`; if they do not exist they are drawn as
/// [`candle_nn::conv_transpose1d`] draws them.
///
/// # Errors
/// Stride, dilation, groups or the length of the kernel are 0; `vb` holds a variable of another shape.
pub fn conv_transpose1d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    cfg: ConvTranspose1dConfig,
    vb: VarBuilder,
) -> Result<ConvTranspose1d> {
    check_config("conv_transpose1d", [kernel_size, cfg.stride, cfg.dilation, cfg.groups])?;
    candle_nn::conv_transpose1d(in_channels, out_channels, kernel_size, cfg, vb)
        .map(ConvTranspose1d)
}

/// A [`ConvTranspose1d`] without a bias; see [`conv_transpose1d`].
///
/// # Errors
/// Those of [`conv_transpose1d`].
pub fn conv_transpose1d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    cfg: ConvTranspose1dConfig,
    vb: VarBuilder,
) -> Result<ConvTranspose1d> {
    check_config("conv_transpose1d", [kernel_size, cfg.stride, cfg.dilation, cfg.groups])?;
    candle_nn::conv_transpose1d_no_bias(in_channels, out_channels, kernel_size, cfg, vb)
        .map(ConvTranspose1d)
}
