//! `n = (z - mean) * rstd * weight + bias`: the second half of the op, and an op of its own.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, Device, Layout, Module, Result, Shape, Storage,
    Tensor, bail,
};

use super::{NAME, cpu};
use crate::claim::{Claim, Input, detached};
use crate::elem::{check_alike, check_dtype, rows_cols};

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
/// variance in a second pass, and the result is rounded once.
///
/// # Errors
/// `z` is no float tensor, or f64 on CUDA; weight or bias have another shape, dtype or device; `eps` is
/// negative or not finite.
///
/// Ba, Kiros, Hinton, "Layer normalization", 2016, arXiv 1607.06450 (eq. 4); Zhang, Sennrich, "Root mean
/// square layer normalization", 2019, arXiv 1910.07467 (eq. 4).
///
/// # Example
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_dropout::Norm;
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

/// The part of a norm that is no tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct NormArgs {
    pub(super) eps: f64,
    pub(super) removes_mean: bool,
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

    pub(super) fn args(&self) -> NormArgs {
        self.args
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
            check_alike(op, &format!("norm.{arg}"), tensor, x)?;
        }
        if !(self.eps().is_finite() && self.eps() >= 0.) {
            bail!(
                "{op}: norm.eps: expected a finite number of at least 0, got {}; the usual one is 1e-5",
                self.eps()
            )
        }
        let bias = self.bias.as_ref().map(Tensor::contiguous).transpose()?;
        Ok(Self { weight: self.weight.contiguous()?, bias, args: self.args })
    }

    /// Makes a finished `n` the norm of `z`.
    pub(super) fn apply(&self, z: &Tensor, n: Storage) -> Result<Tensor> {
        let op = ClaimNorm { args: self.args, n: Claim::new(n) };
        match &self.bias {
            Some(bias) => z.apply_op3(&self.weight, bias, op),
            None => z.apply_op2(&self.weight, op),
        }
    }
}

impl Module for Norm {
    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        const OP: &str = "norm";
        check_dtype(OP, "x", z)?;
        let (norm, z) = (self.checked(OP, z)?, z.contiguous()?);
        let n = {
            let (z, weight) = (Input::new(&z), Input::new(norm.weight()));
            let bias = norm.bias().map(Input::new);
            let bias = bias.as_ref();
            match norm.weight.device() {
                Device::Cpu => {
                    let bias = bias.map(|bias| bias.cpu(OP)).transpose()?;
                    Storage::Cpu(cpu::norm(&self.args, z.cpu(OP)?, weight.cpu(OP)?, bias)?)
                }
                #[cfg(feature = "cuda")]
                Device::Cuda(_) => {
                    let bias = bias.map(|bias| bias.cuda(OP)).transpose()?;
                    let (z, weight) = (z.cuda(OP)?, weight.cuda(OP)?);
                    Storage::Cuda(super::cuda::norm(&self.args, z, weight, bias)?)
                }
                device => return Err(unsupported_device(OP, device)),
            }
        };
        norm.apply(&z, n)
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
/// use candle_dropout::ops::layer_norm;
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
/// use candle_dropout::ops::rms_norm;
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

pub(super) fn unsupported_device(op: &str, device: &Device) -> candle_core::Error {
    candle_core::Error::Msg(format!(
        "{op}: x: expected the CPU, or CUDA with the feature cuda, got {:?}; move it with to_device",
        device.location()
    ))
}

/// Its forward pass takes what [`cpu`] or `cuda` have finished; backward takes the statistics from z again.
struct ClaimNorm {
    args: NormArgs,
    n: Claim,
}

impl ClaimNorm {
    /// `dz`, `dweight` and `dbias`, from one pass.
    fn grads(&self, z: &Tensor, weight: &Tensor, dn: &Tensor) -> Result<[Tensor; 3]> {
        let dn = dn.contiguous()?;
        let (z_input, weight_input) = (Input::new(z), Input::new(weight));
        let dn_input = Input::new(&dn);
        let [dz, dweight, dbias] = match z.device() {
            Device::Cpu => {
                let (z, weight) = (z_input.cpu(NAME)?, weight_input.cpu(NAME)?);
                cpu::bwd(&self.args, z, weight, dn_input.cpu(NAME)?)?.map(Storage::Cpu)
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                let (z, weight) = (z_input.cuda(NAME)?, weight_input.cuda(NAME)?);
                let dn = dn_input.cuda(NAME)?;
                super::cuda::bwd(&self.args, z, weight, dn)?.map(Storage::Cuda)
            }
            device => return Err(unsupported_device(NAME, device)),
        };
        Ok([
            detached(dz, z.shape()),
            detached(dweight, weight.shape()),
            detached(dbias, weight.shape()),
        ])
    }
}

impl CustomOp2 for ClaimNorm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        _z: &CpuStorage,
        layout: &Layout,
        _weight: &CpuStorage,
        _weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((self.n.cpu(NAME)?, layout.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        _z: &CudaStorage,
        layout: &Layout,
        _weight: &CudaStorage,
        _weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((self.n.cuda(NAME)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        z: &Tensor,
        weight: &Tensor,
        _n: &Tensor,
        dn: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [dz, dweight, _] = self.grads(z, weight, dn)?;
        Ok((z.track_op().then_some(dz), weight.track_op().then_some(dweight)))
    }
}

impl CustomOp3 for ClaimNorm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        _z: &CpuStorage,
        layout: &Layout,
        _weight: &CpuStorage,
        _weight_layout: &Layout,
        _bias: &CpuStorage,
        _bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((self.n.cpu(NAME)?, layout.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        _z: &CudaStorage,
        layout: &Layout,
        _weight: &CudaStorage,
        _weight_layout: &Layout,
        _bias: &CudaStorage,
        _bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((self.n.cuda(NAME)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        z: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _n: &Tensor,
        dn: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dz, dweight, dbias] = self.grads(z, weight, dn)?;
        Ok((
            z.track_op().then_some(dz),
            weight.track_op().then_some(dweight),
            bias.track_op().then_some(dbias),
        ))
    }
}
