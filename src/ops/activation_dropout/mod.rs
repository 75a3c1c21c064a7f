//! `y = dropout(act(x + bias))`.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Shape, Tensor, bail};

use super::column_sums;
use crate::check::{check_bias, check_dtype, rows_cols};
use crate::graph::{detached, node, run_pass};
use crate::mask::DropMask;

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
    let shape = activation.shape(x.dims());
    let mask = drop.args(NAME, shape.dims())?;
    let (x, bias) = (x.contiguous()?, bias.map(Tensor::contiguous).transpose()?);
    let y = run_pass!(NAME, x, fwd(&mask, activation, &x, bias.as_ref()))?;
    let (x_again, bias_again) = (x.detach(), bias.as_ref().map(Tensor::detach));
    node(NAME, [Some(&x), bias.as_ref()], (y, shape), move |back| {
        let (x, bias, dy) = (&x_again, bias_again.as_ref(), back.dy.contiguous()?);
        let dx = run_pass!(NAME, dy, bwd(&mask, activation, x, bias, &dy))?;
        let dx = detached(dx, x.shape());
        let keep_all = DropMask::none().args(NAME, dx.dims())?;
        let dbias = back.of(1, || column_sums::sums(keep_all, &dx))?;
        Ok([Some(dx), dbias])
    })
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
