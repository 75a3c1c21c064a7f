use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::{Conv2d, Conv2dConfig, VarBuilder, conv2d};

use super::{mean_of_samples, odds};
use crate::composed::{times, wide};
use crate::functional::{check_conv2d, drop_connect_conv2d};
use crate::layers::site::{Site, module_methods, rate_methods};
use crate::mask::{DropMask, MaskGenerator, MaskKey};

const NAME: &str = "drop_connect_conv2d";

/// A convolution in two dimensions of whose kernel connections drop in training: DropConnect.
///
/// In training it draws one key a call, whatever the rate, and applies [`drop_connect_conv2d`] with a mask over its
/// kernel `[out, in / groups, K, K]`, one for all images and places; neither mask nor masked kernel is kept. In
/// evaluation it is the plain convolution, the mean of what training gives, and draws none. The paper's inference is
/// [`forward_sampled`](Self::forward_sampled).
///
/// # Shapes
/// `[B, in, H, W]` to `[B, out, H', W']`; see [`drop_connect_conv2d`]. Parameters as candle's layers have them:
/// `weight [out, in / groups, K, K]` and `bias [out]`, which is not dropped.
///
/// Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of neural networks using DropConnect", ICML 2013.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{DropConnectConv2d, MaskGenerator, seeded_var_builder};
/// use candle_nn::{Conv2dConfig, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vb = seeded_var_builder(&VarMap::new(), 1, DType::F32, &Device::Cpu);
/// let config = Conv2dConfig { padding: 1, stride: 2, ..Default::default() };
/// let generator = Arc::new(MaskGenerator::new(42));
/// let layer = DropConnectConv2d::new(3, 8, 3, config, 0.5, generator, vb)?;
/// let x = Tensor::ones((2, 3, 9, 12), DType::F32, &Device::Cpu)?;
/// assert_eq!(layer.forward(&x, true)?.dims(), [2, 8, 5, 6]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DropConnectConv2d {
    site: Site,
    conv: Conv2d,
}

impl DropConnectConv2d {
    /// A layer with the variables `weight` and `bias` of `vb`; if they do not exist they are drawn as
    /// [`candle_nn::conv2d`] draws them.
    ///
    /// # Errors
    /// `drop_p` is no probability; stride, dilation, groups or `kernel_size` are 0, or channels are no multiples of the
    /// groups; `vb` holds a variable of another shape.
    pub fn new(
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv2dConfig,
        drop_p: impl Into<f64>,
        generator: Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let site = Site::new(drop_p, generator).checked(NAME)?;
        check_conv2d(config, [in_channels, out_channels], [kernel_size; 2])?;
        Ok(Self { site, conv: conv2d(in_channels, out_channels, kernel_size, config, vb)? })
    }

    /// A layer of candle's, with a bias or without.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn from_conv2d(
        conv: Conv2d,
        drop_p: impl Into<f64>,
        generator: Arc<MaskGenerator>,
    ) -> Result<Self> {
        Ok(Self { site: Site::new(drop_p, generator).checked(NAME)?, conv })
    }

    /// Padding, stride, dilation and groups.
    pub fn config(&self) -> &Conv2dConfig {
        self.conv.config()
    }

    /// The weight, `[out, in / groups, KH, KW]`.
    pub fn weight(&self) -> &Tensor {
        self.conv.weight()
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.conv.bias()
    }

    /// The mask of this call, over the weight: for callers of [`drop_connect_conv2d`] itself.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.site.next_mask(NAME, train)
    }

    /// The convolution, with connections dropped if `train` is true.
    ///
    /// # Errors
    /// The tensor is refused by [`drop_connect_conv2d`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let drop = self.next_mask(train)?;
        drop_connect_conv2d(xs, self.weight(), self.bias(), *self.config(), &drop)
    }

    /// Mean and variance of what training gives for `xs`, over all masks: in f32 for halves.
    ///
    /// ```text
    /// mean = conv2d(x, W) + b          variance = p / (1 - p) conv2d(x * x, W * W)
    /// ```
    ///
    /// `p` is the rate as it is realised. Gradients pass both.
    ///
    /// # Errors
    /// The rate is 1; the tensor is refused by [`drop_connect_conv2d`].
    pub fn moments(&self, xs: &Tensor) -> Result<(Tensor, Tensor)> {
        let odds = odds(NAME, self.drop_p())?;
        let (config, none) = (*self.config(), DropMask::none());
        let (xs, weight, bias) =
            (wide(xs)?, wide(self.weight())?, self.bias().map(wide).transpose()?);
        let mean = drop_connect_conv2d(&xs, &weight, bias.as_ref(), config, &none)?;
        let squares = drop_connect_conv2d(&xs.sqr()?, &weight.sqr()?, None, config, &none)?;
        Ok((mean, times(&squares, odds)?))
    }

    /// The paper's inference: the mean of `activation` over `samples` outputs, drawn from the normal distribution with
    /// these [`moments`](Self::moments), each pixel by itself.
    ///
    /// Draw `t` follows from `key` and `t` alone, so it stays the same however many there are. No key is taken from
    /// the layer's generator.
    ///
    /// # Errors
    /// `samples` is 0, or the rate is 1; the tensor is refused by [`drop_connect_conv2d`]; `activation` fails.
    ///
    /// Wan et al. 2013, section 3.2 and algorithm 2.
    pub fn forward_sampled(
        &self,
        xs: &Tensor,
        samples: usize,
        key: MaskKey,
        activation: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (mean, variance) = self.moments(xs)?;
        mean_of_samples(NAME, [&mean, &variance], (samples, key), xs, activation)
    }
}

rate_methods!(DropConnectConv2d, site);

module_methods!(DropConnectConv2d);
