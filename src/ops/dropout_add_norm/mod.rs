//! `z = residual + dropout(x + bias)`, `n = norm(z)`.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod norm;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Device, Layout, Module, Result,
    Shape, Storage, Tensor,
};

use super::dropout;
use super::dropout_add::{DropoutAddBias, check_bias};
use crate::claim::{Claim, Input};
use crate::elem::{check_dtype, check_same};
use crate::mask::{DropMask, MaskArgs};
use norm::unsupported_device;
pub use norm::{Norm, layer_norm, rms_norm};

const NAME: &str = "dropout_add_norm";

/// Adds the dropout of a (biased) branch to its residual stream and normalises the sum, in one pass over
/// memory.
///
/// ```text
/// z = residual + (keep ? (x + bias) * scale : 0)          n = norm(z)
/// dx = keep ? dz * scale : 0          dresidual = dz          dbias = sum of dx over all rows
/// ```
///
/// Returns `(z, n)`: a pre-norm block passes the stream `z` on to its next residual addition and `n` to its
/// next branch, a post-norm block goes on with `n` alone. `dz` is the gradient of `z` as the stream, plus
/// that of the norm; see [`Norm`].
///
/// # Shapes
/// `x` and `residual` of one shape `[.., C]`, strided or not; `bias` and the parameters of the norm of shape
/// `[C]`. `z` and `n` have the shape of `x`, and so has the mask. Without a residual, `z` is the dropout of
/// the biased branch.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all tensors. Halves are computed in f32. The norm is that of
/// the stored, rounded `z`: `n` equals `norm.forward(&z)`, bit for bit.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone: `z` equals
/// [`dropout_add(x, residual, bias, drop)`](crate::dropout_add), bit for bit. Nothing is stored for backward
/// but `z` itself: it draws the mask and takes the statistics again.
///
/// # Errors
/// A tensor is no float tensor, or f64 on CUDA; shapes, dtypes or devices differ; `eps` of the norm is
/// negative or not finite; the window of `drop` does not fit `x`.
///
/// The order of residual, dropout and norm is that of Vaswani et al., "Attention is all you need", 2017, arXiv
/// 1706.03762 (section 5.4, post-norm), and Xiong et al., "On layer normalization in the Transformer
/// architecture", 2020, arXiv 2002.04745 (pre-norm).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey, Norm, dropout_add_norm};
///
/// # fn main() -> candle_core::Result<()> {
/// let branch = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?;
/// let stream = Tensor::new(&[-5f32, -3., 0., -5.], &Device::Cpu)?;
/// let norm = Norm::rms_norm(Tensor::ones(4, candle_core::DType::F32, &Device::Cpu)?, 0.);
/// let drop = DropMask::new(0.5, MaskKey::new(3))?;
/// let (z, n) = dropout_add_norm(&branch, Some(&stream), None, &norm, &drop)?;
/// assert_eq!(z.to_vec1::<f32>()?, [-5., 1., 6., 3.]);
/// let rms = (71f32 / 4.).sqrt();
/// assert!((n.to_vec1::<f32>()?[0] + 5. / rms).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn dropout_add_norm(
    x: &Tensor,
    residual: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &Norm,
    drop: &DropMask,
) -> Result<(Tensor, Tensor)> {
    check_dtype(NAME, "x", x)?;
    if let Some(residual) = residual {
        check_same(NAME, "residual", residual, x)?;
    }
    if let Some(bias) = bias {
        check_bias(NAME, bias, x)?;
    }
    let norm = norm.checked(NAME, x)?;
    let mask = drop.args(NAME, x.dims())?;
    if residual.is_none() && bias.is_none() && drop.is_none() {
        return Ok((x.clone(), norm.forward(x)?));
    }
    let x = x.contiguous()?;
    let residual = residual.map(Tensor::contiguous).transpose()?;
    let bias = bias.map(Tensor::contiguous).transpose()?;

    let (z, n) = fwd(&mask, &x, residual.as_ref(), bias.as_ref(), &norm)?;
    let op = ClaimStream { mask, second: Second::Residual, z: Claim::new(z) };
    let z = match (&residual, &bias) {
        (None, None) => x.apply_op1(op),
        (Some(residual), None) => x.apply_op2(residual, op),
        (None, Some(bias)) => x.apply_op2(bias, ClaimStream { second: Second::Bias, ..op }),
        (Some(residual), Some(bias)) => x.apply_op3(residual, bias, op),
    }?;
    let n = norm.apply(&z, n)?;
    Ok((z, n))
}

/// Both results, from one pass over contiguous tensors.
fn fwd(
    mask: &MaskArgs,
    x: &Tensor,
    residual: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &Norm,
) -> Result<(Storage, Storage)> {
    let (args, device) = (norm.args(), x.device());
    let (x, weight) = (Input::new(x), Input::new(norm.weight()));
    let optional = [residual, bias, norm.bias()].map(|tensor| tensor.map(Input::new));
    match device {
        Device::Cpu => {
            let cpu = |at: usize| optional[at].as_ref().map(|input| input.cpu(NAME)).transpose();
            let (x, weight) = (x.cpu(NAME)?, weight.cpu(NAME)?);
            let (z, n) = cpu::fwd(mask, &args, x, cpu(0)?, cpu(1)?, weight, cpu(2)?)?;
            Ok((Storage::Cpu(z), Storage::Cpu(n)))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => {
            let cuda = |at: usize| optional[at].as_ref().map(|input| input.cuda(NAME)).transpose();
            let (x, weight) = (x.cuda(NAME)?, weight.cuda(NAME)?);
            let (z, n) = cuda::fwd(mask, &args, x, cuda(0)?, cuda(1)?, weight, cuda(2)?)?;
            Ok((Storage::Cuda(z), Storage::Cuda(n)))
        }
        device => Err(unsupported_device(NAME, device)),
    }
}

/// The first half of the op: its forward pass takes the `z` that [`fwd`] has finished.
struct ClaimStream {
    mask: MaskArgs,
    second: Second,
    z: Claim,
}

/// What the second of two arguments is.
enum Second {
    Residual,
    Bias,
}

impl ClaimStream {
    fn dx(&self, x: &Tensor, dz: &Tensor) -> Result<Option<Tensor>> {
        x.track_op().then(|| dropout::dx(&self.mask, dz)).transpose()
    }

    fn dbias(&self, bias: &Tensor, dz: &Tensor) -> Result<Option<Tensor>> {
        bias.track_op()
            .then(|| dz.apply_op1_no_bwd(&DropoutAddBias { mask: self.mask }))
            .transpose()
    }
}

impl CustomOp1 for ClaimStream {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((self.z.cpu(NAME)?, layout.shape().clone()))
    }

    fn cuda_fwd(&self, _x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((self.z.cuda(NAME)?, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _z: &Tensor, dz: &Tensor) -> Result<Option<Tensor>> {
        self.dx(x, &dz.contiguous()?)
    }
}

impl CustomOp2 for ClaimStream {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _x: &CpuStorage,
        layout: &Layout,
        _second: &CpuStorage,
        _second_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((self.z.cpu(NAME)?, layout.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        _x: &CudaStorage,
        layout: &Layout,
        _second: &CudaStorage,
        _second_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((self.z.cuda(NAME)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        second: &Tensor,
        _z: &Tensor,
        dz: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dz = dz.contiguous()?;
        let dx = self.dx(x, &dz)?;
        match self.second {
            Second::Residual => Ok((dx, second.track_op().then_some(dz))),
            Second::Bias => Ok((dx, self.dbias(second, &dz)?)),
        }
    }
}

impl CustomOp3 for ClaimStream {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _x: &CpuStorage,
        layout: &Layout,
        _residual: &CpuStorage,
        _residual_layout: &Layout,
        _bias: &CpuStorage,
        _bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((self.z.cpu(NAME)?, layout.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        _x: &CudaStorage,
        layout: &Layout,
        _residual: &CudaStorage,
        _residual_layout: &Layout,
        _bias: &CudaStorage,
        _bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((self.z.cuda(NAME)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        residual: &Tensor,
        bias: &Tensor,
        _z: &Tensor,
        dz: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dz = dz.contiguous()?;
        let (dx, dbias) = (self.dx(x, &dz)?, self.dbias(bias, &dz)?);
        Ok((dx, residual.track_op().then_some(dz), dbias))
    }
}
