//! `y = residual + (keep ? (x + bias) * scale : 0)`.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail,
};

use super::dropout;
use crate::elem::{check_alike, check_dtype, check_same, rows_cols};
use crate::mask::{DropMask, MaskArgs};

const NAME: &str = "dropout_add";

/// Adds the dropout of a (biased) branch to its residual stream, in one pass over memory.
///
/// ```text
/// y = residual + (keep ? (x + bias) * scale : 0)
/// dx = keep ? dy * scale : 0          dresidual = dy          dbias = sum of dx over all rows
/// ```
///
/// # Shapes
/// `x` and `residual` of one shape `[.., C]`, strided or not; `bias` of shape `[C]`. `y` has the shape
/// of `x`, and so has the mask.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all tensors. Halves are computed in f32 and rounded
/// once.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone and equal those of [`dropout`](crate::dropout) with the
/// same `drop`: `dropout_add(x, residual, None, drop)` is `residual + dropout(x, drop)`, bit for bit in
/// f32. Where the branch is dropped, the bare residual remains, whatever `x` holds (a residual of -0
/// too, which the sum would turn into 0).
///
/// # Errors
/// A tensor is no float tensor, or f64 on CUDA; shapes, dtypes or devices differ; the window of `drop`
/// does not fit `x`.
///
/// The bias-dropout-add of Megatron-LM: Shoeybi, Patwary, Puri, LeGresley, Casper, Catanzaro, 2019,
/// arXiv 1909.08053.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey, dropout_add};
///
/// # fn main() -> candle_core::Result<()> {
/// let branch = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?;
/// let stream = Tensor::new(&[10f32, 20., 30., 40.], &Device::Cpu)?;
/// let y = dropout_add(&branch, &stream, None, &DropMask::new(0.5, MaskKey::new(3))?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [10., 24., 36., 48.]);
/// # Ok(())
/// # }
/// ```
pub fn dropout_add(
    x: &Tensor,
    residual: &Tensor,
    bias: Option<&Tensor>,
    drop: &DropMask,
) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    check_same(NAME, "residual", residual, x)?;
    let mask = drop.args(NAME, x.dims())?;
    let op = DropoutAdd { mask };
    let (x, residual) = (x.contiguous()?, residual.contiguous()?);
    let Some(bias) = bias else {
        return x.apply_op2(&residual, op);
    };
    check_bias(NAME, bias, &x)?;
    x.apply_op3(&residual, &bias.contiguous()?, op)
}

/// Checks that `bias` can be added to each row of `x`.
pub(super) fn check_bias(op: &str, bias: &Tensor, x: &Tensor) -> Result<()> {
    let (_, cols) = rows_cols(x.dims());
    if bias.dims() != [cols] {
        bail!(
            "{op}: bias: expected shape [{cols}] like the last dimension of x {:?}, got {:?}; \
             reshape it to one dimension",
            x.dims(),
            bias.dims()
        )
    }
    check_alike(op, "bias", bias, x)
}

struct DropoutAdd {
    mask: MaskArgs,
}

impl DropoutAdd {
    fn dx(&self, x: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        x.track_op().then(|| dropout::dx(&self.mask, dy)).transpose()
    }
}

impl CustomOp2 for DropoutAdd {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = cpu::fwd(&self.mask, (x, x_layout), (residual, residual_layout), None)?;
        Ok((y, x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        residual: &candle_core::CudaStorage,
        residual_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let y = cuda::fwd(&self.mask, (x, x_layout), (residual, residual_layout), None)?;
        Ok((y, x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        residual: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        Ok((self.dx(x, &dy)?, residual.track_op().then_some(dy)))
    }
}

impl CustomOp3 for DropoutAdd {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let bias = Some((bias, bias_layout));
        let y = cpu::fwd(&self.mask, (x, x_layout), (residual, residual_layout), bias)?;
        Ok((y, x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        residual: &candle_core::CudaStorage,
        residual_layout: &Layout,
        bias: &candle_core::CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let bias = Some((bias, bias_layout));
        let y = cuda::fwd(&self.mask, (x, x_layout), (residual, residual_layout), bias)?;
        Ok((y, x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        residual: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let dbias = match bias.track_op() {
            true => Some(dy.apply_op1(DropoutAddBias { mask: self.mask })?),
            false => None,
        };
        Ok((self.dx(x, &dy)?, residual.track_op().then_some(dy), dbias))
    }
}

/// `dbias[c] = Σ_rows (keep ? dy * scale : 0)`, from dy itself and so without the rounding of dx.
pub(super) struct DropoutAddBias {
    pub(super) mask: MaskArgs,
}

impl CustomOp1 for DropoutAddBias {
    fn name(&self) -> &'static str {
        "dropout_add_bias"
    }

    fn cpu_fwd(&self, dy: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, cols) = rows_cols(layout.dims());
        Ok((cpu::bwd_bias(&self.mask, dy, layout)?, Shape::from(cols)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        dy: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let (_, cols) = rows_cols(layout.dims());
        Ok((cuda::bwd_bias(&self.mask, dy, layout)?, Shape::from(cols)))
    }
}
