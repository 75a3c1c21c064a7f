//! `y = dropout(act(x + bias))`.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail,
};

use super::dropout_add::{DropoutAddBias, check_bias};
use crate::elem::{check_dtype, rows_cols};
use crate::mask::{DropMask, MaskArgs};

const NAME: &str = "activation_dropout";

/// The function between the two projections of a Transformer's MLP.
///
/// Gated forms take twice as many columns as they give: the first half is the gate's input `u`, the second
/// the values `v` that it scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Activation {
    /// `0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u³)))`: Hendrycks & Gimpel 2016, arXiv 1606.08415.
    GeluTanh,
    /// `u Φ(u)` with the distribution function of the normal distribution: as above, the exact form.
    GeluErf,
    /// `u sigmoid(u)`: as above, section 2; Ramachandran, Zoph, Le 2017, arXiv 1710.05941.
    Silu,
    /// `max(u, 0)`.
    Relu,
    /// `silu(u) v`: Shazeer 2020, arXiv 2002.05202 (eq. 5).
    SwiGlu,
    /// `gelu(u) v` with [`GeluTanh`](Self::GeluTanh): as above.
    GeGlu,
}

impl Activation {
    /// True for the forms that halve the number of columns.
    pub fn is_gated(self) -> bool {
        matches!(self, Self::SwiGlu | Self::GeGlu)
    }

    /// Columns of the output.
    fn cols(self, x_cols: usize) -> usize {
        if self.is_gated() { x_cols / 2 } else { x_cols }
    }
}

/// Adds a bias, applies an activation and drops, in one pass over memory.
///
/// ```text
/// u = x + bias                              or, gated, (u, v) = the halves of x + bias
/// y = keep ? act(u) * scale : 0             or keep ? act(u) * v * scale : 0
/// da = keep ? dy * scale : 0
/// dx = da * act'(u)                         or the halves da * act'(u) * v, da * act(u)
/// dbias = sum of dx over all rows
/// ```
///
/// # Shapes
/// `x` of shape `[.., C]`, strided or not, and `bias` of shape `[C]`; `y` of the shape of `x`, or of
/// `[.., C / 2]` for the gated forms. The mask has the shape of `y`.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for both. Halves are computed in f32 and rounded once; the sum
/// over rows of `dbias` is that of the rounded `dx`, taken in f32.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone and equal those of [`dropout`](crate::dropout) on `y`. What is
/// dropped becomes an exact 0, in the output and in the gradient. Backward stores neither mask nor activation:
/// it computes both again from `x`.
///
/// # Errors
/// `x` is no float tensor, or f64 on CUDA; `bias` has another shape, dtype or device; a gated form has an odd
/// number of columns; the window of `drop` does not fit `y`.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{Activation, DropMask, MaskKey, activation_dropout};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[1f32, 2., -3., 4.], &Device::Cpu)?;
/// let drop = DropMask::new(0.5, MaskKey::new(3))?;
/// let y = activation_dropout(&x, None, Activation::Relu, &drop)?;
/// assert_eq!(y.to_vec1::<f32>()?, [0., 4., 0., 8.]);
/// # Ok(())
/// # }
/// ```
pub fn activation_dropout(
    x: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    drop: &DropMask,
) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    if let Some(bias) = bias {
        check_bias(NAME, bias, x)?;
    }
    let (_, x_cols) = rows_cols(x.dims());
    if activation.is_gated() && (x.rank() == 0 || x_cols % 2 != 0) {
        bail!(
            "{NAME}: x: expected an even last dimension for {activation:?}, got {:?}; give it gate and \
             values side by side",
            x.dims()
        )
    }
    let op =
        ActivationDropout { mask: drop.args(NAME, activation.shape(x.dims()).dims())?, activation };
    let x = x.contiguous()?;
    match bias {
        Some(bias) => x.apply_op2(&bias.contiguous()?, op),
        None => x.apply_op1(op),
    }
}

impl Activation {
    /// Shape of the output.
    fn shape(self, dims: &[usize]) -> Shape {
        let mut dims = dims.to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.cols(*last);
        }
        Shape::from(dims)
    }
}

#[derive(Clone, Copy)]
struct ActivationDropout {
    mask: MaskArgs,
    activation: Activation,
}

impl CustomOp1 for ActivationDropout {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = cpu::fwd(&self.mask, self.activation, (x, layout), None)?;
        Ok((y, self.activation.shape(layout.dims())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let y = cuda::fwd(&self.mask, self.activation, (x, layout), None)?;
        Ok((y, self.activation.shape(layout.dims())))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        x.apply_op2_no_bwd(&dy.contiguous()?, &ActivationDropoutGrad(*self)).map(Some)
    }
}

impl CustomOp2 for ActivationDropout {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let bias = Some((bias, bias_layout));
        let y = cpu::fwd(&self.mask, self.activation, (x, layout), bias)?;
        Ok((y, self.activation.shape(layout.dims())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
        bias: &candle_core::CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let bias = Some((bias, bias_layout));
        let y = cuda::fwd(&self.mask, self.activation, (x, layout), bias)?;
        Ok((y, self.activation.shape(layout.dims())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = x.apply_op3_no_bwd(bias, &dy.contiguous()?, &ActivationDropoutGrad(*self))?;
        let dbias = match bias.track_op() {
            true => {
                let mask = DropMask::none().args(NAME, dx.dims())?;
                Some(dx.apply_op1_no_bwd(&DropoutAddBias { mask })?)
            }
            false => None,
        };
        Ok((x.track_op().then_some(dx), dbias))
    }
}

/// `dx` from (x, dy), or from (x, bias, dy).
struct ActivationDropoutGrad(ActivationDropout);

impl CustomOp2 for ActivationDropoutGrad {
    fn name(&self) -> &'static str {
        "activation_dropout_grad"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        dy: &CpuStorage,
        dy_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ActivationDropout { mask, activation } = &self.0;
        let dx = cpu::bwd(mask, *activation, (x, layout), None, (dy, dy_layout))?;
        Ok((dx, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
        dy: &candle_core::CudaStorage,
        dy_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let ActivationDropout { mask, activation } = &self.0;
        let dx = cuda::bwd(mask, *activation, (x, layout), None, (dy, dy_layout))?;
        Ok((dx, layout.shape().clone()))
    }
}

impl CustomOp3 for ActivationDropoutGrad {
    fn name(&self) -> &'static str {
        "activation_dropout_grad"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
        dy: &CpuStorage,
        dy_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ActivationDropout { mask, activation } = &self.0;
        let bias = Some((bias, bias_layout));
        let dx = cpu::bwd(mask, *activation, (x, layout), bias, (dy, dy_layout))?;
        Ok((dx, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
        bias: &candle_core::CudaStorage,
        bias_layout: &Layout,
        dy: &candle_core::CudaStorage,
        dy_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let ActivationDropout { mask, activation } = &self.0;
        let bias = Some((bias, bias_layout));
        let dx = cuda::bwd(mask, *activation, (x, layout), bias, (dy, dy_layout))?;
        Ok((dx, layout.shape().clone()))
    }
}
