//! `y = x W + b`, as few edges of candle's graph as it has tensors; with a dropout of `W` or of `x` that is kept
//! nowhere.

mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod dropped;

use candle_core::{Result, Shape, Storage, Tensor, bail};

pub use dropped::{drop_connect_linear, dropout_linear};

use super::{column_sums, dropout};
use crate::check::{check_alike, check_dtype};
use crate::composed::{composes, unmoved_by};
use crate::cpu::matmul;
use crate::graph::{detached, node, run_pass};
use crate::input::Input;
use crate::mask::{DropMask, MaskArgs};
use dropped::Dropped;

const NAME: &str = "linear";

/// A linear projection of the last dimension.
///
/// ```text
/// y = x W + b
/// dx = dy Wᵀ          dW = xᵀ dy over all rows          db = sum of dy over all rows
/// ```
///
/// The products are those of candle, on the CPU into memory that is not zeroed first. What this op saves besides is
/// passes over memory between them: candle adds what arrives at each edge of a graph to a tensor of zeros, and `matmul`
/// between two reshapes and before a `broadcast_add` has twice as many edges as tensors.
///
/// # Shapes
/// `x [.., in]`, `weight [in, out]` (candle-nn's `Linear` holds its transpose), `bias [out]`; `y [.., out]`.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all tensors. How products of halves are summed up is
/// candle's choice.
///
/// # Errors
/// `x` is no float tensor, or f64 off the CPU; it has no dimension, or its last one is not `in`; `weight` is
/// no matrix, `bias` has not the shape `[out]`; dtypes or devices differ.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::functional::linear;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let weight = Tensor::new(&[[1f32, 0., 2.], [0., 1., 3.]], &Device::Cpu)?;
/// let bias = Tensor::new(&[0f32, 0., 10.], &Device::Cpu)?;
/// assert_eq!(linear(&x, &weight, Some(&bias))?.to_vec2::<f32>()?, [[1., 2., 18.]]);
/// # Ok(())
/// # }
/// ```
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    project(NAME, x, weight, bias, WeightLayout::InOut, Dropped::Nothing)
}

/// [`linear`] with a weight `[out, in]`, as the layers of candle-nn hold it: it is read as it lies, and its gradient
/// arises in that layout.
pub(crate) fn linear_out_in(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    project(NAME, x, weight, bias, WeightLayout::OutIn, Dropped::Nothing)
}

/// Which of the two dimensions of a weight comes first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WeightLayout {
    InOut,
    OutIn,
}

impl WeightLayout {
    /// `[in, out]`
    fn matrix(self, weight: &Tensor) -> Result<Tensor> {
        match self {
            Self::InOut => Ok(weight.clone()),
            Self::OutIn => weight.t(),
        }
    }
}

/// The op `op`: forward and backward read `x` and `weight` as `dropped` leaves them, made for each product and gone
/// after it.
fn project(
    op: &'static str,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    layout: WeightLayout,
    dropped: Dropped<'_>,
) -> Result<Tensor> {
    check_dtype(op, "x", x)?;
    check_alike(op, "weight", weight, "x", x)?;
    let (inputs, outputs) = match (weight.dims(), layout) {
        (&[inputs, outputs], WeightLayout::InOut) => (inputs, outputs),
        (&[outputs, inputs], WeightLayout::OutIn) => (inputs, outputs),
        (dims, WeightLayout::InOut) => {
            bail!("{op}: weight: expected a matrix [in, out], got {dims:?}; reshape it")
        }
        (dims, WeightLayout::OutIn) => {
            bail!("{op}: weight: expected a matrix [out, in], got {dims:?}; reshape it")
        }
    };
    let Some((&cols, leading)) = x.dims().split_last().filter(|(cols, _)| **cols == inputs) else {
        bail!(
            "{op}: x: expected [.., {inputs}] for a weight of {:?}, got {:?}; was the weight meant \
             to be transposed?",
            weight.dims(),
            x.dims()
        )
    };
    let shape = Shape::from([leading, &[outputs]].concat());
    if let Some(bias) = bias {
        check_alike(op, "bias", bias, "x", x)?;
        if bias.dims() != [outputs] {
            bail!(
                "{op}: bias: expected shape [{outputs}] for a weight of {:?}, got {:?}; reshape it",
                weight.dims(),
                bias.dims()
            )
        }
    }
    let [mask_of_x, mask_of_weight] = dropped.masks(op, x, weight)?;
    let rows: usize = leading.iter().product();
    if rows == 0 || outputs == 0 || cols == 0 {
        // No product to speak of, and candle's own ops give what has no elements no gradient.
        let sums = Tensor::zeros(shape, x.dtype(), x.device())?;
        return match bias {
            Some(bias) if sums.elem_count() > 0 => {
                unmoved_by([Some(x), Some(weight)], &sums.broadcast_add(bias)?)
            }
            _ => unmoved_by([Some(x), Some(weight), bias], &sums),
        };
    }
    let x = x.contiguous()?;
    // A matrix or its transpose, as it lies in memory; what is neither, cuBLAS does not read.
    let is_plain = weight.is_contiguous() || weight.t()?.is_contiguous();
    let weight = if is_plain { weight.clone() } else { weight.contiguous()? };
    let bias = bias.map(Tensor::contiguous).transpose()?;
    if composes(x.device()) {
        let [x, weight] = dropped.composed(&x, &weight)?;
        let x = x.reshape((rows, inputs))?;
        let y = composed::linear(&x, &layout.matrix(&weight)?, bias.as_ref())?;
        return y.reshape(shape);
    }
    let (whole_x, whole_weight) = (x.detach(), weight.detach());
    let y = {
        let x = left(mask_of_x, &whole_x)?.reshape((rows, inputs))?;
        let weight = layout.matrix(&left(mask_of_weight, &whole_weight)?)?;
        run_pass!(op, x, fwd(&x, &weight, bias.as_ref()))?
    };
    node(op, [Some(&x), Some(&weight), bias.as_ref()], (y, shape), move |back| {
        let dy = back.dy.contiguous()?;
        let rows_of_dy = dy.reshape((rows, outputs))?;
        let dx = || {
            let matrix = layout.matrix(&left(mask_of_weight, &whole_weight)?)?;
            left(mask_of_x, &product(&rows_of_dy, &matrix.t()?)?.reshape(whole_x.shape())?)
        };
        let dweight = || {
            let x = left(mask_of_x, &whole_x)?.reshape((rows, inputs))?;
            let dweight = match layout {
                WeightLayout::InOut => product(&x.t()?, &rows_of_dy)?,
                WeightLayout::OutIn => product(&rows_of_dy.t()?, &x)?,
            };
            left(mask_of_weight, &dweight)
        };
        let dbias = || column_sums::sums(DropMask::none().args(op, dy.dims())?, &dy);
        Ok([back.of(0, dx)?, back.of(1, dweight)?, back.of(2, dbias)?])
    })
}

/// What a dropout leaves of `x`, or of the gradient that arrives there; `x` itself where nothing is dropped.
fn left(mask: Option<MaskArgs>, x: &Tensor) -> Result<Tensor> {
    mask.map_or(Ok(x.clone()), |mask| dropout::dx(mask, &x.contiguous()?))
}

/// The product of two matrices through which no gradient flows, each contiguous or the transpose of one that is.
fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !a.device().is_cpu() {
        return a.matmul(b);
    }
    let product = matmul(&Input::new(NAME, a), &Input::new(NAME, b))?;
    Ok(detached(Storage::Cpu(product), (a.dim(0)?, b.dim(1)?)))
}
