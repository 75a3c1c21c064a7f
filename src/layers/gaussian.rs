use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::site::{Site, module_methods, rate_methods};
use crate::functional::{check_std, gaussian_dropout, gaussian_noise};
use crate::mask::{MaskGenerator, NoiseKey};

/// Dropout by Gaussian noise that multiplies: mean and variance of a [`Dropout`](super::Dropout), and no zeros.
///
/// ```text
/// y = x (1 + sqrt(p / (1 - p)) z)            in training, z standard normal
/// y = x                                      in evaluation
/// ```
///
/// In training it draws one key a call, whatever the rate, and applies [`gaussian_dropout`]; in evaluation it draws
/// none.
///
/// # Shapes
/// Any; see [`gaussian_dropout`].
///
/// # Errors
/// The rate is no probability, or 1; see [`gaussian_dropout`].
///
/// Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: a simple way to prevent neural networks from
/// overfitting", JMLR 15, 2014 (section 10). Keras has it by the same name and rate.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{GaussianDropout, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = GaussianDropout::new(0.5, Arc::new(MaskGenerator::new(42)))?;
/// assert_eq!(layer.std()?, 1.);
/// let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
/// assert_ne!(layer.forward(&x, true)?.to_vec2::<f32>()?, [[1.; 3]; 2]);
/// assert_eq!(layer.forward(&x, false)?.to_vec2::<f32>()?, [[1.; 3]; 2]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct GaussianDropout(Site);

const NAME: &str = "gaussian_dropout";

impl GaussianDropout {
    /// A layer with the variance of a dropout of this rate.
    ///
    /// # Errors
    /// `drop_p` is no probability, or 1.
    pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        let layer = Self(Site::new(drop_p, generator).checked(NAME)?);
        layer.std()?;
        Ok(layer)
    }

    /// The standard deviation of what multiplies.
    ///
    /// # Errors
    /// The rate is 1.
    pub fn std(&self) -> Result<f64> {
        let drop_p = f64::from(self.0.drop_p());
        if drop_p == 1. {
            bail!(
                "{NAME}: drop_p: expected a probability below 1, got 1, whose variance is infinite; pass a smaller one"
            )
        }
        Ok((drop_p / (1. - drop_p)).sqrt())
    }

    /// Multiplies by noise if `train` is true.
    ///
    /// # Errors
    /// The rate is no probability, or 1 in training; `xs` is refused by [`gaussian_dropout`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        // At a rate of 1, which a schedule may reach, evaluation goes on.
        let std = if train { self.std()? } else { 0. };
        let noise = NoiseKey::from(&self.0.next_mask(NAME, train)?);
        gaussian_dropout(xs, std, train.then_some(&noise))
    }
}

rate_methods!(GaussianDropout, 0);

module_methods!(GaussianDropout);

/// Adds Gaussian noise in training: `y = x + std z`, z standard normal; in evaluation `y = x`.
///
/// In training it draws one key a call, whatever the deviation, and applies [`gaussian_noise`]; in evaluation it draws
/// none.
///
/// # Shapes
/// Any; see [`gaussian_noise`].
///
/// # Errors
/// The deviation is negative or not finite; see [`gaussian_noise`].
///
/// Bishop, "Training with noise is equivalent to Tikhonov regularization", Neural Computation 7, 1995. Keras has it by
/// the same name and `stddev`.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{GaussianNoise, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = GaussianNoise::new(0.1, Arc::new(MaskGenerator::new(42)))?;
/// let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
/// assert_ne!(layer.forward(&x, true)?.to_vec2::<f32>()?, [[1.; 3]; 2]);
/// assert_eq!(layer.forward(&x, false)?.to_vec2::<f32>()?, [[1.; 3]; 2]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct GaussianNoise {
    std: f64,
    site: Site,
}

const NOISE: &str = "gaussian_noise";

impl GaussianNoise {
    /// A layer that adds noise of standard deviation `stddev`.
    ///
    /// # Errors
    /// `stddev` is negative or no finite f32.
    pub fn new(stddev: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        let std = stddev.into();
        check_std(NOISE, "stddev", std)?;
        Ok(Self { std, site: Site::new(0., generator) })
    }

    /// The standard deviation.
    pub fn stddev(&self) -> f64 {
        self.std
    }

    /// Adds noise if `train` is true.
    ///
    /// # Errors
    /// `xs` is refused by [`gaussian_noise`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let noise = NoiseKey::from(&self.site.next_mask(NOISE, train)?);
        gaussian_noise(xs, self.std, train.then_some(&noise))
    }
}

module_methods!(GaussianNoise);
