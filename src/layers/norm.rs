use candle_core::{Error, Module, Result, Tensor, bail};
use candle_nn::{Init, LayerNormConfig, VarBuilder};

use super::site::name_at;
use crate::functional::{Norm, check_eps};

/// LayerNorm as a layer, with a gradient; a drop-in for `candle_nn::LayerNorm`, whose forward pass
/// ends the graph on contiguous input, so that everything upstream trains as if frozen.
///
/// The formula, shapes, dtypes and errors are those of [`Norm`], which it is for
/// [`dropout_add_norm`](crate::functional::dropout_add_norm()).
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_dropout::nn::{VarBuilder, VarMap, layer_norm};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let layer = layer_norm(2, 0., vb)?;
/// let x = Tensor::new(&[[1f32, 3.]], &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, [[-1., 1.]]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct LayerNorm(Norm);

impl LayerNorm {
    /// A layer with these parameters, of shape `[C]`.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self(Norm::layer_norm(weight, Some(bias), eps))
    }

    /// A layer without a bias.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self(Norm::layer_norm(weight, None, eps))
    }

    /// A layer that leaves the mean in place: RMSNorm.
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self(Norm::rms_norm(weight, eps))
    }

    /// The weight.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.0.bias()
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }

    /// False if the mean is left in place.
    pub fn remove_mean(&self) -> bool {
        self.0.remove_mean()
    }
}

impl AsRef<Norm> for LayerNorm {
    fn as_ref(&self) -> &Norm {
        &self.0
    }
}

impl Module for LayerNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}

impl From<candle_nn::LayerNorm> for LayerNorm {
    fn from(layer: candle_nn::LayerNorm) -> Self {
        let (weight, eps) = (layer.weight().clone(), layer.eps());
        let norm = match layer.remove_mean() {
            true => Norm::layer_norm(weight, None, eps),
            false => Norm::rms_norm(weight, eps),
        };
        Self(match layer.bias() {
            Some(bias) => norm.with_bias(bias.clone()),
            None => norm,
        })
    }
}

impl TryFrom<LayerNorm> for candle_nn::LayerNorm {
    type Error = Error;

    /// # Errors
    /// The layer has a bias and leaves the mean in place, which candle makes from variables alone.
    fn try_from(layer: LayerNorm) -> Result<Self> {
        let (weight, eps) = (layer.weight().clone(), layer.eps());
        match (layer.remove_mean(), layer.bias()) {
            (true, Some(bias)) => Ok(Self::new(weight, bias.clone(), eps)),
            (true, None) => Ok(Self::new_no_bias(weight, eps)),
            (false, None) => Ok(Self::rms_norm(weight, eps)),
            (false, Some(_)) => bail!(
                "layer_norm: bias: expected none in a layer that leaves the mean in place, got one; make \
                 candle's with candle_nn::layer_norm"
            ),
        }
    }
}

/// RMSNorm as a layer, with a gradient; a drop-in for `candle_nn::RmsNorm`, whose forward pass ends
/// the graph on contiguous input.
///
/// The formula, shapes, dtypes and errors are those of [`Norm`].
///
/// # Example
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_dropout::RmsNorm;
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = RmsNorm::new(Tensor::new(&[1f32, 10.], &Device::Cpu)?, 0.);
/// let x = Tensor::new(&[[1f32, 7.]], &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, [[0.2, 14.]]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RmsNorm(LayerNorm);

impl RmsNorm {
    /// A layer with this weight, of shape `[C]`.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self(LayerNorm::rms_norm(weight, eps))
    }

    /// The same layer as a [`LayerNorm`] that leaves the mean in place.
    pub fn into_inner(self) -> LayerNorm {
        self.0
    }

    /// The weight.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// What is added to the mean square.
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }

    /// The forward pass, which here always has a gradient; candle's name for it.
    ///
    /// # Errors
    /// Those of [`Norm`].
    pub fn forward_diff(&self, xs: &Tensor) -> Result<Tensor> {
        self.forward(xs)
    }
}

impl AsRef<Norm> for RmsNorm {
    fn as_ref(&self) -> &Norm {
        self.0.as_ref()
    }
}

impl Module for RmsNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}

impl From<candle_nn::RmsNorm> for RmsNorm {
    fn from(layer: candle_nn::RmsNorm) -> Self {
        Self::new(layer.weight().clone(), layer.eps())
    }
}

impl From<RmsNorm> for candle_nn::RmsNorm {
    fn from(layer: RmsNorm) -> Self {
        Self::new(layer.weight().clone(), layer.eps())
    }
}

/// A [`LayerNorm`] over `size` columns from the variables `weight` and `bias` (or `gamma` and
/// `beta`) of `vb`, created as ones and zeros if they do not exist. `config` is a
/// [`LayerNormConfig`] or just its `eps`.
///
/// # Errors
/// `eps` is negative or not finite; `vb` holds a variable of another shape.
pub fn layer_norm<C: Into<LayerNormConfig>>(
    size: usize,
    config: C,
    vb: VarBuilder,
) -> Result<LayerNorm> {
    from_variables("layer_norm", size, config.into(), vb)
}

fn from_variables(
    layer: &str,
    size: usize,
    config: LayerNormConfig,
    vb: VarBuilder,
) -> Result<LayerNorm> {
    check_eps(&format!("{}: eps", name_at(layer, &vb.prefix())), config.eps)?;
    let variable = |name, alias, init| {
        let is_alias = !vb.contains_tensor(name) && vb.contains_tensor(alias);
        vb.get_with_hints(size, if is_alias { alias } else { name }, Init::Const(init))
    };
    let weight = variable("weight", "gamma", 1.)?;
    let norm = match config.remove_mean {
        true => Norm::layer_norm(weight, None, config.eps),
        false => Norm::rms_norm(weight, config.eps),
    };
    Ok(LayerNorm(match config.affine {
        true => norm.with_bias(variable("bias", "beta", 0.)?),
        false => norm,
    }))
}

/// A [`LayerNorm`] without a bias; see [`layer_norm`].
///
/// # Errors
/// Those of [`layer_norm`].
pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    layer_norm(size, LayerNormConfig { eps, remove_mean: true, affine: false }, vb)
}

/// An [`RmsNorm`] over `size` columns from the variable `weight` (or `gamma`) of `vb`, created as
/// ones if it does not exist.
///
/// # Errors
/// Those of [`layer_norm`].
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    let config = LayerNormConfig { eps, remove_mean: false, affine: false };
    from_variables("rms_norm", size, config, vb).map(RmsNorm)
}
