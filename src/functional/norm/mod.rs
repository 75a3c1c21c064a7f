//! `n = (z - mean) * rstd * weight + bias`.

pub(super) mod args;
mod composed;
pub(super) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Module, Result, Storage, Tensor, bail};

use crate::check::{check_alike, check_dtype, rows_cols};
use crate::composed::composes;
use crate::graph::{detached, node, run_pass};
pub use args::NormArgs;

const NAME: &str = "norm";

/// LayerNorm or RMSNorm over the last dimension, with its parameters.
///
/// ```text
/// n = (z - mean) / sqrt(variance + eps) * weight + bias           LayerNorm
/// n = z / sqrt(mean of z² + eps) * weight                         RMSNorm
/// dz = rstd * (g - mean of g - h * mean of g h)      g = dn * weight, h = (z - mean) * rstd
/// dweight = sum of dn h over all rows                dbias = sum of dn over all rows
/// ```
///
/// where `rstd` is `1 / sqrt(variance + eps)`; RMSNorm leaves out both means of the first two lines.
///
/// # Shapes
/// `z` of shape `[.., C]`, strided or not; weight and bias of shape `[C]`. `n` has the shape of `z`.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all tensors. Statistics are taken in f32 (f64 for f64), the
/// variance in a pass of its own, and the result is rounded once. What a mean was rounded by is removed, too, of
/// `z` and of `g`, so that rows far from 0 keep their digits: of a constant row exactly the bias is left. Rows
/// whose squares overflow, above 1.8e19 in f32, become 0, as in PyTorch.
///
/// # Errors
/// `z` is no float tensor, or f64 off the CPU; weight or bias have another shape, dtype or device; `eps` is
/// negative or not finite.
///
/// Ba, Kiros, Hinton, "Layer normalization", 2016, arXiv 1607.06450 (eq. 4); Zhang, Sennrich, "Root mean
/// square layer normalization", 2019, arXiv 1910.07467 (eq. 4).
///
/// # Example
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_dropout::functional::Norm;
///
/// # fn main() -> candle_core::Result<()> {
/// let norm = Norm::rms_norm(Tensor::new(&[1f32, 10.], &Device::Cpu)?, 0.);
/// let n = norm.forward(&Tensor::new(&[[1f32, 7.]], &Device::Cpu)?)?;
/// assert_eq!(n.to_vec2::<f32>()?, [[0.2, 14.]]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
    args: NormArgs,
}

impl AsRef<Norm> for Norm {
    fn as_ref(&self) -> &Norm {
        self
    }
}

impl Norm {
    /// LayerNorm.
    pub fn layer_norm(weight: Tensor, bias: Option<Tensor>, eps: f64) -> Self {
        Self { weight, bias, args: NormArgs { eps, removes_mean: true } }
    }

    /// RMSNorm.
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self { weight, bias: None, args: NormArgs { eps, removes_mean: false } }
    }

    /// Adds a bias, or replaces it.
    pub fn with_bias(self, bias: Tensor) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// The weight.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.args.eps
    }

    /// True for LayerNorm, false for RMSNorm.
    pub fn remove_mean(&self) -> bool {
        self.args.removes_mean
    }

    pub(super) fn args(&self) -> &NormArgs {
        &self.args
    }

    /// The norm of `z` by a chain of candle's ops.
    pub(crate) fn composed(&self, z: &Tensor) -> Result<Tensor> {
        composed::norm(&self.args, z, &self.weight, self.bias.as_ref())
    }

    /// Checks that this norm applies to `x`, and returns it with contiguous parameters.
    pub(super) fn checked(&self, op: &str, x: &Tensor) -> Result<Self> {
        let (_, cols) = rows_cols(x.dims());
        for (arg, tensor) in [("weight", Some(&self.weight)), ("bias", self.bias.as_ref())] {
            let Some(tensor) = tensor else { continue };
            if tensor.dims() != [cols] {
                bail!(
                    "{op}: norm.{arg}: expected shape [{cols}] like the last dimension of x {:?}, got \
                     {:?}; build the norm for {cols} columns",
                    x.dims(),
                    tensor.dims()
                )
            }
            check_alike(op, &format!("norm.{arg}"), tensor, "x", x)?;
        }
        check_eps(&format!("{op}: norm.eps"), self.eps())?;
        let bias = self.bias.as_ref().map(Tensor::contiguous).transpose()?;
        Ok(Self { weight: self.weight.contiguous()?, bias, args: self.args })
    }

    /// Makes a finished `n` the norm of `z`; backward takes the statistics from z again.
    pub(super) fn node(&self, z: &Tensor, n: Storage) -> Result<Tensor> {
        let inputs = [Some(z), Some(&self.weight), self.bias.as_ref()];
        let (args, z_again, weight) = (self.args, z.detach(), self.weight.detach());
        node(NAME, inputs, (n, z.shape()), move |back| {
            let dn = back.dy.contiguous()?;
            let [dz, dweight, dbias] = run_pass!(NAME, dn, bwd(&args, &z_again, &weight, &dn))?;
            let dz = detached(dz, z_again.shape());
            let [dweight, dbias] = [dweight, dbias].map(|sums| detached(sums, weight.shape()));
            Ok([Some(dz), Some(dweight), Some(dbias)])
        })
    }
}

/// Checks what is added to the variance; `arg` is what errors begin with.
pub(crate) fn check_eps(arg: &str, eps: f64) -> Result<()> {
    if !(eps.is_finite() && eps >= 0.) {
        bail!("{arg}: expected a finite number of at least 0, got {eps}; the usual one is 1e-5")
    }
    Ok(())
}

impl Module for Norm {
    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        check_dtype(NAME, "x", z)?;
        let (norm, z) = (self.checked(NAME, z)?, z.contiguous()?);
        if composes(z.device()) {
            return norm.composed(&z);
        }
        let n = run_pass!(NAME, z, fwd(&norm.args, &z, &norm.weight, norm.bias.as_ref()))?;
        norm.node(&z, n)
    }
}

/// LayerNorm over the last dimension, with a gradient: a drop-in for `candle_nn::ops::layer_norm`, which
/// ends the graph without a word.
///
/// # Errors
/// Those of [`Norm`], which has the formula, the shapes and the dtypes.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::functional::layer_norm;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 3.]], &Device::Cpu)?;
/// let weight = Tensor::new(&[2f32, 2.], &Device::Cpu)?;
/// let bias = Tensor::new(&[0f32, 5.], &Device::Cpu)?;
/// assert_eq!(layer_norm(&x, &weight, &bias, 0.)?.to_vec2::<f32>()?, [[-2., 7.]]);
/// # Ok(())
/// # }
/// ```
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    Norm::layer_norm(weight.clone(), Some(bias.clone()), eps.into()).forward(x)
}

/// RMSNorm over the last dimension, with a gradient: a drop-in for `candle_nn::ops::rms_norm`, which ends
/// the graph without a word.
///
/// # Errors
/// Those of [`Norm`], which has the formula, the shapes and the dtypes.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::functional::rms_norm;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 7.]], &Device::Cpu)?;
/// let weight = Tensor::new(&[1f32, 10.], &Device::Cpu)?;
/// assert_eq!(rms_norm(&x, &weight, 0.)?.to_vec2::<f32>()?, [[0.2, 14.]]);
/// # Ok(())
/// # }
/// ```
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    Norm::rms_norm(weight.clone(), eps.into()).forward(x)
}
