use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::{Conv2dConfig, Init, VarBuilder};

use super::site::{Site, module_methods};
use crate::composed::wide;
use crate::functional::{check_conv2d, drop_connect_conv2d, linear_out_in, reparameterize};
use crate::mask::{DropMask, MaskGenerator, NoiseKey};

/// Weights from here on in `log alpha` are noise (Molchanov et al., section 4.4): 95 % dropout by its variance.
const THRESHOLD: f64 = 3.;

/// `log alpha` is cut off at this on both sides, where the divergence is flat or its approximation ends.
const LARGEST_LOG_ALPHA: f64 = 10.;

/// Keeps the root of a variance, and the logarithm of a weight, from a slope that is infinite at 0.
const LEAST_VARIANCE: f64 = 1e-8;
const LEAST_SQUARE: f64 = 1e-16;

/// The first `log_sigma2` of each weight, of the authors' code.
const FIRST_LOG_SIGMA2: f64 = -10.;

/// Weights with a normal distribution each, of mean `theta` and of variance `exp(log_sigma2)`.
#[derive(Clone, Debug)]
struct Posterior {
    theta: Tensor,
    log_sigma2: Tensor,
    site: Site,
}

impl Posterior {
    fn new(theta: Tensor, generator: Arc<MaskGenerator>, vb: &VarBuilder) -> Result<Self> {
        let first = Init::Const(FIRST_LOG_SIGMA2);
        let log_sigma2 = vb.get_with_hints(theta.shape(), "log_sigma2", first)?;
        Ok(Self { theta, log_sigma2, site: Site::new(0., generator) })
    }

    /// `log_sigma2 - log theta²`, cut off on both sides; in f32 for halves.
    fn log_alpha(&self) -> Result<Tensor> {
        let log_theta2 = (wide(&self.theta)?.sqr()? + LEAST_SQUARE)?.log()?;
        (wide(&self.log_sigma2)? - log_theta2)?.clamp(-LARGEST_LOG_ALPHA, LARGEST_LOG_ALPHA)
    }

    /// The divergence from the prior, of the sum of all weights.
    fn kl(&self) -> Result<Tensor> {
        const K: [f64; 3] = [0.63576, 1.87320, 1.48695];
        let log_alpha = self.log_alpha()?;
        // k1 - k1 sigmoid(x) = k1 (1 - tanh(x / 2)) / 2
        let half = log_alpha.affine(0.5 * K[2], 0.5 * K[1])?.tanh()?;
        let near = half.affine(-0.5 * K[0], 0.5 * K[0])?;
        let far = (log_alpha.neg()?.exp()? + 1.)?.log()?.affine(0.5, 0.)?;
        (near + far)?.sum_all()
    }

    /// 1 where a weight stays, u8.
    fn stays(&self) -> Result<Tensor> {
        self.log_alpha()?.detach().lt(THRESHOLD)
    }

    fn sparsity(&self) -> Result<f64> {
        let stay = self.stays()?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let pruned = stay.iter().filter(|stays| **stays == 0.).count();
        Ok(pruned as f64 / stay.len().max(1) as f64)
    }

    fn pruned(&self) -> Result<Tensor> {
        self.stays()?.where_cond(&self.theta, &self.theta.zeros_like()?)
    }

    /// A sample of what `linear` makes of `xs` and of weights that are drawn anew for each row of it.
    fn sample(
        &self,
        layer: &str,
        xs: &Tensor,
        mean: &Tensor,
        linear: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let noise = NoiseKey::from(&self.site.next_mask(layer, true)?);
        let variance = linear(&wide(xs)?.sqr()?, &wide(&self.log_sigma2)?.exp()?)?;
        let std = (variance + LEAST_VARIANCE)?.sqrt()?.to_dtype(mean.dtype())?;
        reparameterize(mean, &std, Some(&noise))
    }
}

/// The methods that both layers have.
macro_rules! variational_methods {
    ($Layer:ident, $Plain:ident) => {
        impl $Layer {
            /// The means of the weights.
            pub fn weight(&self) -> &Tensor {
                &self.posterior.theta
            }

            /// The bias.
            pub fn bias(&self) -> Option<&Tensor> {
                self.bias.as_ref()
            }

            /// `log(sigma² / theta²)` of each weight, between -10 and 10; in f32 for halves.
            ///
            /// # Errors
            /// The variables cannot be computed with.
            pub fn log_alpha(&self) -> Result<Tensor> {
                self.posterior.log_alpha()
            }

            /// The divergence from the prior, a scalar: to be added to the loss of all samples (its mean over `N` takes
            /// `kl / N`), with a weight that grows from 0 ([`kl_weight`]).
            ///
            /// ```text
            /// kl = sum of k1 - k1 sigmoid(k2 + k3 log alpha) + log(1 + 1 / alpha) / 2
            /// k1 = 0.63576    k2 = 1.87320    k3 = 1.48695
            /// ```
            ///
            /// # Errors
            /// The variables cannot be computed with.
            pub fn kl(&self) -> Result<Tensor> {
                self.posterior.kl()
            }

            /// The share of weights that are pruned: `log alpha` is 3 or more. The host waits for the device.
            ///
            /// # Errors
            /// The variables cannot be read.
            pub fn sparsity(&self) -> Result<f64> {
                self.posterior.sparsity()
            }

            /// What evaluation computes, as a plain layer: means, and zeros where a weight is pruned.
            ///
            /// # Errors
            /// The variables cannot be computed with.
            pub fn prune(&self) -> Result<crate::nn::$Plain> {
                let (weight, bias) = (self.posterior.pruned()?.detach(), &self.bias);
                Ok(self.plain(weight, bias.as_ref().map(Tensor::detach)))
            }
        }

        module_methods!($Layer);
    };
}

/// A linear layer whose weights learn how noisy they may be, and vanish where they say nothing: sparse variational
/// dropout.
///
/// ```text
/// W ~ normal(theta, sigma²),  sigma² = exp(log_sigma2)
/// y = x thetaᵀ + b + sqrt(x² (sigma²)ᵀ) z                       in training, z standard normal
/// y = x (log alpha < 3 ? theta : 0)ᵀ + b                        in evaluation; log alpha = log(sigma² / theta²)
/// ```
///
/// In training, results are drawn and not weights (local reparameterisation), one key a call; in evaluation nothing is.
/// [`kl`](Self::kl) joins the loss.
///
/// # Shapes
/// `x [.., in]`, `y [.., out]`. Variables: `weight [out, in]` (theta), `log_sigma2 [out, in]`, `bias [out]`.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU. Variances are computed in f32 for halves; `log_sigma2` learns little in halves.
///
/// # Errors
/// Of `forward`: the last dimension of `x` is not `in`; dtypes or devices differ.
///
/// Molchanov, Ashukha, Vetrov, "Variational dropout sparsifies deep neural networks", 2017, arXiv 1701.05369; Kingma,
/// Salimans, Welling, "Variational dropout and the local reparameterization trick", 2015, arXiv 1506.02557.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::nn::{Module, VarBuilder, VarMap};
/// use candle_dropout::{MaskGenerator, VariationalLinear, kl_weight};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let layer = VariationalLinear::new(8, 2, Arc::new(MaskGenerator::new(42)), vb)?;
/// let x = Tensor::ones((4, 8), DType::F32, &Device::Cpu)?;
/// let (samples, step) = (1000., 10);
/// let kl = (layer.kl()? * (kl_weight(step, 0, 100) / samples))?;
/// let loss = (layer.forward(&x, true)?.sqr()?.mean_all()? + kl)?;
/// let gradients = loss.backward()?;
/// assert!(vars.all_vars().iter().all(|var| gradients.get(var).is_some()));
/// let pruned = layer.prune()?.forward(&x)?;
/// assert_eq!(pruned.to_vec2::<f32>()?, layer.forward(&x, false)?.to_vec2::<f32>()?);
/// # Ok(())
/// # }
/// ```
#[doc(alias = "LinearSVDO")]
#[doc(alias = "SparseVariationalDropout")]
#[derive(Clone, Debug)]
pub struct VariationalLinear {
    posterior: Posterior,
    bias: Option<Tensor>,
}

impl VariationalLinear {
    /// A layer with the variables `weight`, `bias` and `log_sigma2` of `vb`; the first two are drawn as
    /// [`candle_nn::linear()`] draws them, the last one begins at -10.
    ///
    /// # Errors
    /// `vb` holds a variable of another shape.
    pub fn new(
        in_dim: usize,
        out_dim: usize,
        generator: Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let plain = candle_nn::linear(in_dim, out_dim, vb.clone())?;
        let posterior = Posterior::new(plain.weight().clone(), generator, &vb)?;
        Ok(Self { posterior, bias: plain.bias().cloned() })
    }

    fn plain(&self, weight: Tensor, bias: Option<Tensor>) -> super::Linear {
        super::Linear::new(weight, bias)
    }

    /// A sample if `train` is true, else the product with what is not pruned.
    ///
    /// # Errors
    /// `xs` does not fit the weights.
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let bias = self.bias();
        if !train {
            return linear_out_in(xs, &self.posterior.pruned()?, bias);
        }
        let mean = linear_out_in(xs, self.weight(), bias)?;
        let product = |x: &Tensor, variance: &Tensor| linear_out_in(x, variance, None);
        self.posterior.sample("variational_linear", xs, &mean, product)
    }
}

variational_methods!(VariationalLinear, Linear);

/// The same for a convolution: see [`VariationalLinear`].
///
/// ```text
/// y = conv(x, theta) + b + sqrt(conv(x², sigma²)) z            in training, z standard normal
/// y = conv(x, log alpha < 3 ? theta : 0) + b                   in evaluation
/// ```
///
/// # Shapes
/// `x [B, in, H, W]`, `y [B, out, H', W']`. Variables: `weight [out, in / groups, K, K]` (theta), `log_sigma2` of the
/// same shape, `bias [out]`.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU.
///
/// # Errors
/// Of `forward`: what [`drop_connect_conv2d`] refuses.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::nn::{VarBuilder, VarMap};
/// use candle_dropout::{MaskGenerator, VariationalConv2d};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let generator = Arc::new(MaskGenerator::new(42));
/// let layer = VariationalConv2d::new(1, 4, 3, Default::default(), generator, vb)?;
/// let x = Tensor::ones((2, 1, 5, 5), DType::F32, &Device::Cpu)?;
/// assert_eq!(layer.forward(&x, true)?.dims(), [2, 4, 3, 3]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct VariationalConv2d {
    posterior: Posterior,
    bias: Option<Tensor>,
    config: Conv2dConfig,
}

impl VariationalConv2d {
    /// A layer with the variables `weight`, `bias` and `log_sigma2` of `vb`; the first two are drawn as
    /// [`candle_nn::conv2d`] draws them, the last one begins at -10.
    ///
    /// # Errors
    /// The sizes and `config` are those of no convolution; `vb` holds a variable of another shape.
    pub fn new(
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv2dConfig,
        generator: Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Self> {
        check_conv2d(config, [in_channels, out_channels], [kernel_size; 2])?;
        let plain = candle_nn::conv2d(in_channels, out_channels, kernel_size, config, vb.clone())?;
        let posterior = Posterior::new(plain.weight().clone(), generator, &vb)?;
        Ok(Self { posterior, bias: plain.bias().cloned(), config })
    }

    fn plain(&self, weight: Tensor, bias: Option<Tensor>) -> candle_nn::Conv2d {
        candle_nn::Conv2d::new(weight, bias, self.config)
    }

    /// A sample if `train` is true, else the convolution with what is not pruned.
    ///
    /// # Errors
    /// `xs` does not fit the weights.
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        // A mask that drops nothing: candle's own convolution lacks gradients of some sizes, and bf16 on the CPU.
        let conv = |x: &Tensor, weight: &Tensor, bias| {
            drop_connect_conv2d(x, weight, bias, self.config, &DropMask::none())
        };
        if !train {
            return conv(xs, &self.posterior.pruned()?, self.bias());
        }
        let mean = conv(xs, self.weight(), self.bias())?;
        let convolved = |x: &Tensor, variance: &Tensor| conv(x, variance, None);
        self.posterior.sample("variational_conv2d", xs, &mean, convolved)
    }
}

variational_methods!(VariationalConv2d, Conv2d);

/// The weight of the divergence at a step: 0 up to step `begin`, then on a straight line to 1 over `warm_up` steps.
///
/// A divergence of full weight from the first step prunes what has not learnt yet (Sønderby et al., "Ladder variational
/// autoencoders", 2016, arXiv 1602.02282; Molchanov et al., section 4.2).
///
/// # Example
/// ```
/// use candle_dropout::kl_weight;
///
/// assert_eq!([0, 10, 15, 20, 99].map(|step| kl_weight(step, 10, 10)), [0., 0., 0.5, 1., 1.]);
/// ```
pub fn kl_weight(step: usize, begin: usize, warm_up: usize) -> f64 {
    if step <= begin && warm_up > 0 {
        return 0.;
    }
    (step.saturating_sub(begin) as f64 / warm_up.max(1) as f64).min(1.)
}
