//! `y = conv2d(x, keep ? W * scale : 0) + b`.

mod composed;

use candle_core::{Result, Storage, Tensor, bail};
use candle_nn::Conv2dConfig;

use super::{column_sums, dropout};
use crate::check::{check_alike, check_dtype};
use crate::composed::{composes, unmoved_by, wide};
use crate::graph::node;
use crate::mask::{DropMask, MaskArgs};

const NAME: &str = "drop_connect_conv2d";

/// A convolution in two dimensions of whose kernel connections are dropped: DropConnect.
///
/// ```text
/// V = keep ? W * scale : 0
/// y = conv2d(x, V) + b
/// dx = conv_transpose2d(dy, V)          dW = keep ? (x * dy) * scale : 0          db = sum of dy over all pixels
/// ```
///
/// One mask serves all images and all places of a window. `V` is made for each convolution and gone after it:
/// backward, which draws the mask again, keeps `x` and `W` alone. The convolutions are candle's. With
/// [`DropMask::none`] this is a `conv2d` whose gradient also fits images of which windows leave a rest, not the same
/// one in height and width, where candle's own fails.
///
/// # Shapes
/// `x [B, in, H, W]`, `weight [out, in / groups, KH, KW]`, the shape of the mask, too, `bias [out]`;
/// `y [B, out, H', W']`, where `H' = (H + 2 padding - dilation (KH - 1) - 1) / stride + 1`, and so `W'`. All strided or
/// not.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all tensors. Halves are computed in f32 on the CPU; on CUDA how their
/// products are summed up is candle's choice.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone. What is dropped becomes an exact 0 by selection. The bias is not
/// dropped.
///
/// # Errors
/// `x` is no float tensor, or f64 off the CPU; `x` or `weight` has not four dimensions; stride, dilation, groups or a
/// side of the kernel are 0; channels do not fit each other or the groups; the window is larger than the padded image;
/// `bias` has not the shape `[out]`; dtypes or devices differ; the window of `drop` does not fit `weight`.
///
/// Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of neural networks using DropConnect", ICML 2013, in the inverted
/// form, here for kernels that places share.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey};
/// use candle_dropout::functional::drop_connect_conv2d;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[1f32, 10., 100., 1000., 5.], &Device::Cpu)?.reshape((1, 1, 1, 5))?;
/// let weight = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?.reshape((1, 1, 1, 4))?;
/// let drop = DropMask::new(0.5, MaskKey::new(3))?; // drops the first of four
/// let y = drop_connect_conv2d(&x, &weight, None, Default::default(), &drop)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [2. * 4320., 2. * 3220.]);
/// # Ok(())
/// # }
/// ```
pub fn drop_connect_conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: Conv2dConfig,
    drop: &DropMask,
) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    check_alike(NAME, "weight", weight, "x", x)?;
    let geometry = Geometry::new(x, weight, config)?;
    let Geometry { outputs, height, width, .. } = geometry;
    if let Some(bias) = bias {
        check_alike(NAME, "bias", bias, "x", x)?;
        if bias.dims() != [outputs] {
            bail!(
                "{NAME}: bias: expected shape [{outputs}] for a weight of {:?}, got {:?}; reshape it",
                weight.dims(),
                bias.dims()
            )
        }
    }
    if let Some(repeats) = drop.repeats(NAME, x.dims(), None)? {
        return repeats
            .each(|part| drop_connect_conv2d(&part.of("x", x)?, weight, bias, config, &part.drop));
    }
    let mask = drop.args(NAME, weight.dims())?;
    let shape = (x.dim(0)?, outputs, height.steps, width.steps);
    if x.elem_count() == 0 || outputs == 0 {
        // Candle's own ops give what has no elements no gradient.
        let sums = Tensor::zeros(shape, x.dtype(), x.device())?;
        return match bias {
            Some(bias) if sums.elem_count() > 0 => {
                let y = sums.broadcast_add(&bias.reshape((1, outputs, 1, 1))?)?;
                unmoved_by([Some(x), Some(weight)], &y)
            }
            _ => unmoved_by([Some(x), Some(weight), bias], &sums),
        };
    }
    if composes(x.device()) {
        return composed::drop_connect_conv2d(x, weight, bias, &geometry, drop);
    }
    let (x_again, weight_again) = (x.detach(), weight.detach());
    let y = geometry.conv2d(&x_again, &left(&mask, &weight_again)?, bias)?;
    node(NAME, [Some(x), Some(weight), bias], (y, shape), move |back| {
        let dx = || geometry.dx(back.dy, &left(&mask, &weight_again)?);
        let dweight = || dropout::dx(mask, &geometry.dweight(&x_again, back.dy)?);
        let dbias = || {
            let dy = back.dy.permute((0, 2, 3, 1))?.contiguous()?;
            column_sums::sums(DropMask::none().args(NAME, dy.dims())?, &dy)
        };
        Ok([back.of(0, dx)?, back.of(1, dweight)?, back.of(2, dbias)?])
    })
}

/// What is left of the kernel.
fn left(mask: &MaskArgs, weight: &Tensor) -> Result<Tensor> {
    dropout::dx(*mask, &weight.contiguous()?)
}

/// Refuses what no convolution has: candle divides by a stride or groups of 0, and wraps around at a kernel without
/// width.
pub(crate) fn check_conv2d(
    config: Conv2dConfig,
    [inputs, outputs]: [usize; 2],
    [height, width]: [usize; 2],
) -> Result<()> {
    let Conv2dConfig { stride, dilation, groups, .. } = config;
    for (arg, value) in [("stride", stride), ("dilation", dilation), ("groups", groups)] {
        if value == 0 {
            bail!("{NAME}: {arg}: expected at least 1, got 0; set it in the config")
        }
    }
    if height == 0 || width == 0 {
        bail!(
            "{NAME}: weight: expected a kernel of at least 1 by 1, got {height} by {width}; build the layer with \
             one"
        )
    }
    if inputs % groups != 0 || outputs % groups != 0 {
        bail!(
            "{NAME}: groups: expected a divisor of {inputs} and {outputs} channels, got {groups}; change the config"
        )
    }
    Ok(())
}

/// As candle convolves it: on the CPU it has no product of bf16, and adds up in the dtype where it has one of f16.
fn computed(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() { wide(x) } else { Ok(x.clone()) }
}

/// Windows over an image, and which channels they take.
#[derive(Clone, Copy)]
struct Geometry {
    config: Conv2dConfig,
    outputs: usize,
    height: Axis,
    width: Axis,
}

/// Windows along one dimension.
#[derive(Clone, Copy)]
struct Axis {
    size: usize,
    kernel: usize,
    /// How many windows there are.
    steps: usize,
    /// Where the last one ends in the padded image.
    reached: usize,
}

impl Axis {
    fn new(name: &str, size: usize, kernel: usize, config: Conv2dConfig) -> Result<Self> {
        let Conv2dConfig { padding, stride, dilation, .. } = config;
        let (padded, window) = (size + 2 * padding, dilation * (kernel - 1) + 1);
        let Some(rest) = padded.checked_sub(window) else {
            bail!(
                "{NAME}: x: expected a {name} of at least {window} with its padding, got {padded}; pad it"
            )
        };
        let steps = rest / stride;
        Ok(Self { size, kernel, steps: steps + 1, reached: steps * stride + window })
    }
}

impl Geometry {
    fn new(x: &Tensor, weight: &Tensor, config: Conv2dConfig) -> Result<Self> {
        let (x_dims, weight_dims) = (x.dims(), weight.dims());
        let (&[_, inputs, h, w], &[outputs, of_group, kh, kw]) = (x_dims, weight_dims) else {
            bail!(
                "{NAME}: x, weight: expected [B, in, H, W] and [out, in / groups, KH, KW], got {x_dims:?} and \
                 {weight_dims:?}; reshape them"
            )
        };
        check_conv2d(config, [of_group * config.groups, outputs], [kh, kw])?;
        if inputs != of_group * config.groups {
            bail!(
                "{NAME}: x: expected {} channels, {of_group} for each of {} groups of a weight of {weight_dims:?}, \
                 got {inputs}; build the layer for them",
                of_group * config.groups,
                config.groups
            )
        }
        let height = Axis::new("height", h, kh, config)?;
        let width = Axis::new("width", w, kw, config)?;
        Ok(Self { config, outputs, height, width })
    }

    /// A finished result from detached tensors.
    fn conv2d(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Storage> {
        let Conv2dConfig { padding, stride, dilation, groups, cudnn_fwd_algo } = self.config;
        let (wide_x, weight) = (computed(x)?, computed(weight)?);
        let y =
            wide_x.conv2d_with_algo(&weight, padding, stride, dilation, groups, cudnn_fwd_algo)?;
        let y = match bias {
            Some(bias) => {
                y.broadcast_add(&computed(&bias.detach())?.reshape((1, self.outputs, 1, 1))?)?
            }
            None => y,
        };
        // A copy, since candle hands out no storage: little beside a convolution.
        let y = y.to_dtype(x.dtype())?;
        let (storage, layout) = y.storage_and_layout();
        storage.try_clone(layout)
    }

    fn dx(&self, dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let Conv2dConfig { padding, stride, dilation, groups, .. } = self.config;
        // Candle takes one rest for both dimensions: the larger, of which the other's share is cut off.
        let rest = |axis: Axis| axis.size + 2 * padding - axis.reached;
        let rest = rest(self.height).max(rest(self.width));
        let of_group = |(dy, weight): (&Tensor, &Tensor)| {
            let (dy, weight) = (computed(dy)?.contiguous()?, computed(weight)?.contiguous()?);
            let dx = dy.conv_transpose2d(&weight, padding, rest, stride, dilation)?;
            dx.narrow(2, 0, self.height.size)?.narrow(3, 0, self.width.size)
        };
        let (dtype, dy, weight) = (dy.dtype(), dy.chunk(groups, 1)?, weight.chunk(groups, 0)?);
        let dx = dy.iter().zip(&weight).map(of_group).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&dx, 1)?.contiguous()?.to_dtype(dtype)
    }

    /// Of the whole kernel.
    fn dweight(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let Conv2dConfig { padding, stride, dilation, groups, .. } = self.config;
        // Images are the channels of this convolution: dy, its kernel, has the stride for a dilation.
        let of_group = |(x, dy): (&Tensor, &Tensor)| {
            let (x, dy) = (computed(x)?, computed(dy)?);
            let (x, dy) = (x.transpose(0, 1)?, dy.transpose(0, 1)?.contiguous()?);
            let dweight = x.conv2d(&dy, padding, dilation, stride, 1)?.transpose(0, 1)?;
            dweight.narrow(2, 0, self.height.kernel)?.narrow(3, 0, self.width.kernel)
        };
        let (dtype, x, dy) = (x.dtype(), x.chunk(groups, 1)?, dy.chunk(groups, 1)?);
        let dweight = x.iter().zip(&dy).map(of_group).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&dweight, 0)?.contiguous()?.to_dtype(dtype)
    }
}
