//! `y = x W + b`, as few edges of candle's graph as it has tensors.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Shape, Tensor, bail};

use super::column_sums;
use crate::check::{check_alike, check_dtype};
use crate::graph::{node, run_pass};
use crate::mask::DropMask;

const NAME: &str = "linear";

/// A linear projection of the last dimension.
///
/// ```text
/// y = x W + b
/// dx = dy Wᵀ          dW = xᵀ dy over all rows          db = sum of dy over all rows
/// ```
///
/// The products are candle's own. What this op saves is passes over memory between them: candle adds
/// what arrives at each edge of a graph to a tensor of zeros, and `matmul` between two reshapes and
/// before a `broadcast_add` has twice as many edges as tensors.
///
/// # Shapes
/// `x [.., in]`, `weight [in, out]` (candle-nn's `Linear` holds its transpose), `bias [out]`; `y [.., out]`.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all tensors. How products of halves are summed up is
/// candle's choice.
///
/// # Errors
/// `x` is no float tensor, or f64 on CUDA; it has no dimension, or its last one is not `in`; `weight` is
/// no matrix, `bias` has not the shape `[out]`; dtypes or devices differ.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::linear;
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
    check_dtype(NAME, "x", x)?;
    check_alike(NAME, "weight", weight, x)?;
    let (inputs, outputs) = match *weight.dims() {
        [inputs, outputs] => (inputs, outputs),
        _ => bail!(
            "{NAME}: weight: expected a matrix [in, out], got {:?}; reshape it",
            weight.dims()
        ),
    };
    let Some((&cols, leading)) = x.dims().split_last().filter(|(cols, _)| **cols == inputs) else {
        bail!(
            "{NAME}: x: expected [.., {inputs}] for a weight of {:?}, got {:?}; was the weight meant \
             to be transposed?",
            weight.dims(),
            x.dims()
        )
    };
    let shape = Shape::from([leading, &[outputs]].concat());
    if let Some(bias) = bias {
        check_alike(NAME, "bias", bias, x)?;
        if bias.dims() != [outputs] {
            bail!(
                "{NAME}: bias: expected shape [{outputs}] for a weight of {:?}, got {:?}; reshape it",
                weight.dims(),
                bias.dims()
            )
        }
    }
    let rows = leading.iter().product();
    if rows == 0 || outputs == 0 || cols == 0 {
        // No product to speak of: candle's own ops know what to do without elements.
        let y = x.reshape((rows, cols))?.matmul(weight)?.reshape(shape)?;
        return bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias));
    }
    let x = x.contiguous()?;
    // A matrix or its transpose, as it lies in memory; what is neither, cuBLAS does not read.
    let is_plain = weight.is_contiguous() || weight.t()?.is_contiguous();
    let weight = if is_plain { weight.clone() } else { weight.contiguous()? };
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let size = Size { rows, inputs, outputs };
    let y = run_pass!(NAME, x, fwd(size, &x, &weight, bias.as_ref()))?;
    let (x_again, weight_again) = (x.detach(), weight.detach());
    node(NAME, [Some(&x), Some(&weight), bias.as_ref()], (y, shape), move |back| {
        let (x, dy) = (&x_again, back.dy.contiguous()?);
        let rows_of_dy = dy.reshape((rows, outputs))?;
        let dx = || rows_of_dy.matmul(&weight_again.t()?)?.reshape(x.shape());
        let dweight = || x.reshape((rows, inputs))?.t()?.matmul(&rows_of_dy);
        let dbias = || column_sums::sums(DropMask::none().args(NAME, dy.dims())?, &dy);
        Ok([back.of(0, dx)?, back.of(1, dweight)?, back.of(2, dbias)?])
    })
}

/// `[rows, inputs]` times `[inputs, outputs]`.
#[derive(Clone, Copy)]
struct Size {
    rows: usize,
    inputs: usize,
    outputs: usize,
}

impl Size {
    /// As candle's matmul takes it: batches, rows, columns of y, columns of x.
    fn of_product(self) -> (usize, usize, usize, usize) {
        (1, self.rows, self.outputs, self.inputs)
    }
}
