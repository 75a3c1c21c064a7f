use std::sync::Arc;

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::ops::sigmoid;
use candle_nn::{Init, VarBuilder};

use super::site::{Site, module_methods};
use crate::composed::times;
use crate::functional::{bounded, concrete_dropout, inverse};
use crate::mask::MaskGenerator;

/// What [`ConcreteDropout`] is made of; the defaults are those of the authors' code.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConcreteDropoutConfig {
    /// The first rate is drawn between this and `init_max`, uniformly by its logit; 0.1.
    pub init_min: f64,
    /// See `init_min`; 0.1.
    pub init_max: f64,
    /// Of the relaxed mask; 0.1.
    pub temperature: f64,
    /// `l² / (τ N)` with the prior's length scale `l`, the model's precision `τ` and `N` samples to learn from; 1e-6.
    pub weight_regularizer: f64,
    /// `2 / (τ N)` for a loss of mean squares, `1 / N` for a mean cross entropy; 1e-5.
    pub dropout_regularizer: f64,
}

impl Default for ConcreteDropoutConfig {
    fn default() -> Self {
        Self {
            init_min: 0.1,
            init_max: 0.1,
            temperature: 0.1,
            weight_regularizer: 1e-6,
            dropout_regularizer: 1e-5,
        }
    }
}

/// Dropout that learns its rate: stands before a layer with weights, which its [`regularizer`](Self::regularizer)
/// weighs against what the rate costs.
///
/// ```text
/// y = concrete_dropout(x, p_logit)            in training
/// y = x                                       in evaluation
/// loss = what the model is trained on + the sum of regularizer(weight, input_dim) over all such layers
/// ```
///
/// In training it draws one key a call and applies [`concrete_dropout`]; in evaluation it is the identity, the mean
/// of what is dropped, and draws none. The paper predicts by the mean of several passes that do drop: call `forward`
/// with `train` for these.
///
/// # Shapes
/// Any; the variable `p_logit` has shape `[1]`.
///
/// # Dtypes
/// See [`concrete_dropout`]; `p_logit` has that of the `VarBuilder`. A rate learns little in halves: keep it in f32.
///
/// Gal, Hron, Kendall, "Concrete dropout", 2017, arXiv 1705.07832.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::nn::{Module, VarBuilder, VarMap, linear};
/// use candle_dropout::{ConcreteDropout, ConcreteDropoutConfig, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let generator = Arc::new(MaskGenerator::new(42));
/// // For 1000 samples, a precision of 1 and a length scale of 0.01.
/// let config = ConcreteDropoutConfig {
///     weight_regularizer: 1e-7,
///     dropout_regularizer: 2e-3,
///     ..Default::default()
/// };
/// let dropout = ConcreteDropout::new(config, generator, vb.pp("dropout"))?;
/// let layer = linear(8, 1, vb.pp("layer"))?;
/// let x = Tensor::ones((4, 8), DType::F32, &Device::Cpu)?;
/// let y = layer.forward(&dropout.forward(&x, true)?)?;
/// let loss = (y.sqr()?.mean_all()? + dropout.regularizer(layer.weight(), 8)?)?;
/// let grads = loss.backward()?;
/// assert!(vars.all_vars().iter().all(|var| grads.get(var).is_some()));
/// assert!((dropout.drop_p()? - 0.1).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ConcreteDropout {
    p_logit: Tensor,
    config: ConcreteDropoutConfig,
    site: Site,
}

const NAME: &str = "concrete_dropout";

impl ConcreteDropout {
    /// A layer with the variable `p_logit` of `vb`, the logit of its rate.
    ///
    /// # Errors
    /// `init_min` and `init_max` are no rates between 0 and 1 in this order; `temperature` is no positive number; a
    /// regulariser is negative or not finite; `vb` has no such variable.
    pub fn new(
        config: ConcreteDropoutConfig,
        generator: Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let ConcreteDropoutConfig { init_min, init_max, .. } = config;
        if !(0. < init_min && init_min <= init_max && init_max < 1.) {
            bail!(
                "{NAME}: init_min, init_max: expected 0 < init_min <= init_max < 1, got {init_min} and {init_max}; \
                 the usual ones are 0.1"
            )
        }
        inverse(NAME, config.temperature)?;
        for (name, factor) in [
            ("weight_regularizer", config.weight_regularizer),
            ("dropout_regularizer", config.dropout_regularizer),
        ] {
            if !(factor.is_finite() && factor >= 0.) {
                bail!(
                    "{NAME}: {name}: expected a finite number of at least 0, got {factor}; divide by the number of \
                     samples"
                )
            }
        }
        let [lo, up] = [init_min, init_max].map(|p| p.ln() - (-p).ln_1p());
        let first = if lo < up { Init::Uniform { lo, up } } else { Init::Const(lo) };
        let p_logit = vb.get_with_hints(1, "p_logit", first)?;
        // Of its rate nothing is asked but that it drops: the one that counts is learnt.
        Ok(Self { p_logit, config, site: Site::new(1., generator) })
    }

    /// What it was made of.
    pub fn config(&self) -> &ConcreteDropoutConfig {
        &self.config
    }

    /// The rate as it is now. The host waits for the device.
    ///
    /// # Errors
    /// The variable cannot be read.
    pub fn drop_p(&self) -> Result<f32> {
        let logit = self.p_logit.to_dtype(DType::F32)?.get(0)?.to_scalar::<f32>()?;
        Ok((1. / (1. + (-f64::from(logit)).exp())) as f32)
    }

    /// Drops if `train` is true.
    ///
    /// # Errors
    /// `xs` is refused by [`concrete_dropout`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let drop = self.site.next_mask(NAME, train)?;
        if !train {
            return Ok(xs.clone());
        }
        concrete_dropout(xs, &self.p_logit, self.config.temperature, &drop)
    }

    /// What is added to the loss, once a step: a scalar, in f32 for halves.
    ///
    /// ```text
    /// weight_regularizer Σ weight² / (1 - p) + dropout_regularizer input_dim (p ln p + (1 - p) ln(1 - p))
    /// ```
    ///
    /// `weight` is that of the layer behind, in either layout, and `input_dim` the number of its inputs, all of which
    /// are dropped alike. It pulls the rate towards 1/2, and the harder the fewer samples there are.
    ///
    /// # Errors
    /// `weight` is no float tensor or lies on another device than the rate.
    pub fn regularizer(&self, weight: &Tensor, input_dim: usize) -> Result<Tensor> {
        let logit = self.p_logit.reshape(())?;
        let real = if weight.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let logit = bounded(&logit.to_dtype(real)?)?;
        let (p, keep_p) = (sigmoid(&logit)?, sigmoid(&logit.neg()?)?);
        let negative_entropy = ((&p * p.log()?)? + (&keep_p * keep_p.log()?)?)?;
        let squares = weight.to_dtype(real)?.sqr()?.sum_all()?;
        let ConcreteDropoutConfig { weight_regularizer, dropout_regularizer, .. } = self.config;
        times(&(squares / keep_p)?, weight_regularizer)?
            + times(&negative_entropy, dropout_regularizer * input_dim as f64)?
    }
}

module_methods!(ConcreteDropout);
