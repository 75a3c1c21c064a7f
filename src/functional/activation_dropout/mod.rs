//! `y = dropout(act(x + bias))`, and `y = dropout(act(gate) * up)` of two tensors.

mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod rows;

use candle_core::{Result, Shape, Tensor, bail};

use super::column_sums;
use crate::check::{check_bias, check_dtype, check_same, rows_cols};
use crate::composed::composes;
use crate::graph::{detached, node, run_pass};
use crate::mask::DropMask;
use rows::Rows;

const NAME: &str = "activation_dropout";
const GLU: &str = "glu_dropout";

/// The function between the two projections of a Transformer's MLP.
///
/// Gated forms take twice as many columns as they give: the first half is the gate's input `u`, the second
/// the values `v` that it scales. Where a model computes the two apart, [`glu_dropout`] takes them so.
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
    /// `u sigmoid(1.702 u)`: Hendrycks & Gimpel 2016, as above, section 2.
    QuickGelu,
    /// `max(u, 0)²`: So et al. 2021, "Primer", arXiv 2109.08668.
    Relu2,
    /// `tanh(u)`.
    Tanh,
    /// `1 / (1 + e^-u)`.
    Sigmoid,
    /// `gelu(u) v` with [`GeluErf`](Self::GeluErf): Shazeer 2020, as above.
    GeGluErf,
    /// `max(u, 0) v`: as above.
    ReGlu,
    /// `u sigmoid(1.702 u) v`: [`QuickGelu`](Self::QuickGelu) as a gate.
    QuickGeGlu,
    /// `max(u, 0)² v`: [`Relu2`](Self::Relu2) as a gate.
    Relu2Glu,
    /// `tanh(u) v`: [`Tanh`](Self::Tanh) as a gate.
    TanhGlu,
    /// `sigmoid(u) v`: Dauphin et al. 2016, arXiv 1612.08083.
    Glu,
}

impl Activation {
    /// True for the forms that halve the number of columns.
    pub fn is_gated(self) -> bool {
        match self {
            Self::GeluTanh | Self::GeluErf | Self::Silu | Self::Relu => false,
            Self::QuickGelu | Self::Relu2 | Self::Tanh | Self::Sigmoid => false,
            Self::SwiGlu | Self::GeGlu | Self::GeGluErf | Self::ReGlu => true,
            Self::QuickGeGlu | Self::Relu2Glu | Self::TanhGlu | Self::Glu => true,
        }
    }

    /// The form that has this function as its gate: [`SwiGlu`](Self::SwiGlu) of [`Silu`](Self::Silu). A gated
    /// form is its own.
    pub fn gated(self) -> Self {
        match self {
            Self::GeluTanh | Self::GeGlu => Self::GeGlu,
            Self::GeluErf | Self::GeGluErf => Self::GeGluErf,
            Self::Silu | Self::SwiGlu => Self::SwiGlu,
            Self::Relu | Self::ReGlu => Self::ReGlu,
            Self::QuickGelu | Self::QuickGeGlu => Self::QuickGeGlu,
            Self::Relu2 | Self::Relu2Glu => Self::Relu2Glu,
            Self::Tanh | Self::TanhGlu => Self::TanhGlu,
            Self::Sigmoid | Self::Glu => Self::Glu,
        }
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
/// `keep` and `scale` follow from `drop` alone and equal those of [`dropout`](super::dropout()) on `y`. What is
/// dropped becomes an exact 0, in the output and in the gradient. Backward stores neither mask nor activation:
/// it computes both again from `x`.
///
/// # Errors
/// `x` is no float tensor, or f64 off the CPU; `bias` has another shape, dtype or device; a gated form has an odd
/// number of columns; the window of `drop` does not fit `y`.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey};
/// use candle_dropout::functional::{Activation, activation_dropout};
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
    if let Some(repeats) = drop.repeats(NAME, shape.dims(), Some(0))? {
        return repeats
            .each(|part| activation_dropout(&part.of("x", x)?, bias, activation, &part.drop));
    }
    let mask = drop.args(NAME, shape.dims())?;
    if composes(x.device()) {
        return composed::activation_dropout(&mask, activation, x, bias);
    }
    let rows = Rows::new(x, None, bias)?;
    let y = run_pass!(NAME, x, fwd(&mask, activation, &rows))?;
    let x_shape = x.shape().clone();
    node(NAME, [Some(x), bias], (y, shape), move |back| {
        let dy = back.dy.contiguous()?;
        let (dx, _) = run_pass!(NAME, dy, bwd(&mask, activation, &rows, &dy))?;
        let dx = detached(dx, &x_shape);
        let keep_all = DropMask::none().args(NAME, dx.dims())?;
        let dbias = back.of(1, || column_sums::sums(keep_all, &dx))?;
        Ok([Some(dx), dbias])
    })
}

/// Gates values by an activation of another tensor and drops, in one pass over memory: the MLP of LLaMA between its
/// projections `gate_proj` and `up_proj`, neither of which is copied.
///
/// ```text
/// y = keep ? act(gate) * up * scale : 0
/// da = keep ? dy * scale : 0
/// dgate = da * act'(gate) * up
/// dup = da * act(gate)
/// ```
///
/// Mask, output and gradients are bit for bit those of [`activation_dropout`] on `gate` and `up` side by side. There
/// are no biases here: two projections add their own.
///
/// # Shapes
/// `gate`, `up` and `y` of one shape, any; so is the mask. What lies in rows at equal distances, the same for
/// both, such as two `narrow`s of the last dimension of one tensor, is read where it lies; gradients are contiguous.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for both. Halves are computed in f32 and rounded once.
///
/// # Randomness
/// As of [`activation_dropout`].
///
/// # Errors
/// `gate` is no float tensor, or f64 off the CPU; `up` has another shape, dtype or device; `activation` is none of the
/// gated forms ([`Activation::gated`] gives them); the window of `drop` does not fit `y`.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey};
/// use candle_dropout::functional::{Activation, glu_dropout};
///
/// # fn main() -> candle_core::Result<()> {
/// let gate = Tensor::new(&[1f32, 2., -3., 4.], &Device::Cpu)?;
/// let up = Tensor::new(&[5f32, 6., 7., -0.5], &Device::Cpu)?;
/// let drop = DropMask::new(0.5, MaskKey::new(3))?;
/// let y = glu_dropout(&gate, &up, Activation::ReGlu, &drop)?;
/// assert_eq!(y.to_vec1::<f32>()?, [0., 24., 0., -4.]);
/// # Ok(())
/// # }
/// ```
pub fn glu_dropout(
    gate: &Tensor,
    up: &Tensor,
    activation: Activation,
    drop: &DropMask,
) -> Result<Tensor> {
    check_dtype(GLU, "gate", gate)?;
    check_same(GLU, "up", up, "gate", gate)?;
    if !activation.is_gated() {
        bail!(
            "{GLU}: activation: expected a gated form, got {activation:?}; give it {:?}, or gated() of it",
            activation.gated()
        )
    }
    if let Some(repeats) = drop.repeats(GLU, gate.dims(), Some(0))? {
        return repeats.each(|part| {
            glu_dropout(&part.of("gate", gate)?, &part.of("up", up)?, activation, &part.drop)
        });
    }
    let mask = drop.args(GLU, gate.dims())?;
    if composes(gate.device()) {
        return composed::glu_dropout(&mask, activation, gate, up);
    }
    let rows = Rows::new(gate, Some(up), None)?;
    let y = run_pass!(GLU, gate, fwd(&mask, activation, &rows))?;
    let shape = gate.shape().clone();
    node(GLU, [Some(gate), Some(up)], (y, &shape.clone()), move |back| {
        let dy = back.dy.contiguous()?;
        let (dgate, dup) = run_pass!(GLU, dy, bwd(&mask, activation, &rows, &dy))?;
        Ok([Some(detached(dgate, &shape)), dup.map(|dup| detached(dup, &shape))])
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
