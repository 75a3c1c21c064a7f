use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::{mean_of_samples, odds};
use crate::composed::{times, wide};
use crate::functional::{drop_connect_linear, linear_out_in};
use crate::layers::linear::{Linear, linear};
use crate::layers::site::{Site, module_methods, rate_methods};
use crate::mask::{DropMask, MaskGenerator, MaskKey};

const NAME: &str = "drop_connect_linear";

/// A linear layer whose connections drop in training: DropConnect.
///
/// In training it draws one key a call, whatever the rate, and applies [`drop_connect_linear`] with a mask over its
/// weight `[out, in]`; neither mask nor masked weight is kept. In evaluation it is the plain projection, the mean of
/// what training gives, and draws none. The paper's inference, which samples the input of the activation from a normal
/// distribution of the same mean and variance, is [`forward_sampled`](Self::forward_sampled).
///
/// # Shapes
/// `[.., in]` to `[.., out]`. Parameters as candle's linear layers have them: `weight [out, in]` and `bias [out]`,
/// which is not dropped.
///
/// Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of neural networks using DropConnect", ICML 2013.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropConnectLinear, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let weight = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let linear = candle_nn::Linear::new(weight, None);
/// let layer = DropConnectLinear::from_linear(linear, 0.5, Arc::new(MaskGenerator::new(42)))?;
/// let x = Tensor::new(&[[1f32, 10.]], &Device::Cpu)?;
/// assert_eq!(layer.forward(&x, false)?.to_vec2::<f32>()?, [[21., 43.]]);
/// for y in layer.forward(&x, true)?.to_vec2::<f32>()?[0].iter().zip([[1., 20.], [3., 40.]]) {
///     let (y, [first, second]) = y;
///     assert!([0., first, second, first + second].contains(&(y / 2.))); // what is kept is scaled by 2
/// }
/// let (mean, variance) = layer.moments(&x)?;
/// assert_eq!(mean.to_vec2::<f32>()?, [[21., 43.]]);
/// assert_eq!(variance.to_vec2::<f32>()?, [[401., 1609.]]); // of 0 or 2, and of 0 or 40
/// # Ok(())
/// # }
/// ```
#[doc(alias = "WeightDrop")]
#[derive(Clone, Debug)]
pub struct DropConnectLinear {
    site: Site,
    linear: Linear,
}

impl DropConnectLinear {
    /// A layer with the variables `weight` and `bias` of `vb`; if they do not exist they are drawn as
    /// [`candle_nn::linear()`] draws them.
    ///
    /// # Errors
    /// `drop_p` is no probability; `vb` holds a variable of another shape.
    pub fn new(
        in_dim: usize,
        out_dim: usize,
        drop_p: impl Into<f64>,
        generator: Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let site = Site::new(drop_p, generator).checked(NAME)?;
        Ok(Self { site, linear: linear(in_dim, out_dim, vb)? })
    }

    /// A layer of these weights, with a bias or without: candle's `Linear` or that of [`nn`](crate::nn).
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn from_linear(
        linear: impl Into<Linear>,
        drop_p: impl Into<f64>,
        generator: Arc<MaskGenerator>,
    ) -> Result<Self> {
        let site = Site::new(drop_p, generator).checked(NAME)?;
        Ok(Self { site, linear: linear.into() })
    }

    /// The weight, `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        self.linear.weight()
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.linear.bias()
    }

    /// The mask of this call, over the weight: for callers of [`drop_connect_linear`] itself.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.site.next_mask(NAME, train)
    }

    /// The projection, with connections dropped if `train` is true.
    ///
    /// # Errors
    /// The tensor is refused by [`drop_connect_linear`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        drop_connect_linear(xs, self.weight(), self.bias(), &self.next_mask(train)?)
    }

    /// Mean and variance of what training gives for `xs`, over all masks: in f32 for halves.
    ///
    /// ```text
    /// mean = x Wᵀ + b          variance = p / (1 - p) (x * x) (W * W)ᵀ
    /// ```
    ///
    /// `p` is the rate as it is realised, the paper's equation in the inverted form. Gradients pass both.
    ///
    /// # Errors
    /// The rate is 1; the tensor is refused by [`drop_connect_linear`].
    pub fn moments(&self, xs: &Tensor) -> Result<(Tensor, Tensor)> {
        let odds = odds(NAME, self.drop_p())?;
        let (xs, weight, bias) =
            (wide(xs)?, wide(self.weight())?, self.bias().map(wide).transpose()?);
        let mean = drop_connect_linear(&xs, &weight, bias.as_ref(), &DropMask::none())?;
        Ok((mean, times(&linear_out_in(&xs.sqr()?, &weight.sqr()?, None)?, odds)?))
    }

    /// The paper's inference: the mean of `activation` over `samples` outputs, drawn from the normal distribution with
    /// these [`moments`](Self::moments).
    ///
    /// Draw `t` follows from `key` and `t` alone, so it stays the same however many there are. No key is taken from
    /// the layer's generator.
    ///
    /// # Errors
    /// `samples` is 0, or the rate is 1; the tensor is refused by [`drop_connect_linear`]; `activation` fails.
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

rate_methods!(DropConnectLinear, site);

module_methods!(DropConnectLinear);
