//! `y = x W + b`, as few edges of candle's graph as it has tensors.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, WithDType, bail,
};
use rayon::prelude::*;

use super::dropout_add::DropoutAddBias;
use crate::elem::{Element, check_alike, check_dtype, for_float_dtype, slice, storage};
use crate::mask::DropMask;
use crate::simd::vectorized;

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
    let op = Linear { size: (1, rows, outputs, cols), shape };
    let x = x.contiguous()?;
    // A matrix or its transpose, as it lies in memory; what is neither, cuBLAS does not read.
    let is_plain = weight.is_contiguous() || weight.t()?.is_contiguous();
    let weight = if is_plain { weight.clone() } else { weight.contiguous()? };
    match bias {
        None => x.apply_op2(&weight, op),
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, op),
    }
}

struct Linear {
    /// Batches, rows, columns of y, columns of x, as candle's matmul names them.
    size: (usize, usize, usize, usize),
    /// Of y.
    shape: Shape,
}

impl Linear {
    /// `x W` from contiguous `x`, on any device.
    fn product<S: BackendStorage>(
        &self,
        (x, x_layout): (&S, &Layout),
        (weight, weight_layout): (&S, &Layout),
    ) -> Result<S> {
        let (_, rows, _, inputs) = self.size;
        let x_layout = Layout::contiguous_with_offset((rows, inputs), x_layout.start_offset());
        x.matmul(weight, self.size, &x_layout, weight_layout)
    }

    fn gradients(
        &self,
        x: &Tensor,
        weight: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, rows, outputs, inputs) = self.size;
        let dy = dy.reshape((rows, outputs))?;
        let dx = match x.track_op() {
            true => Some(dy.matmul(&weight.detach().t()?)?.reshape(x.shape())?),
            false => None,
        };
        let dweight = match weight.track_op() {
            true => Some(x.detach().reshape((rows, inputs))?.t()?.matmul(&dy)?),
            false => None,
        };
        Ok((dx, dweight))
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.product((x, x_layout), (weight, weight_layout))?;
        Ok((y, self.shape.clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        weight: &candle_core::CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let y = self.product((x, x_layout), (weight, weight_layout))?;
        Ok((y, self.shape.clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.gradients(x, weight, &dy.contiguous()?)
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.product((x, x_layout), (weight, weight_layout))?;
        Ok((add_bias(y, bias, bias_layout)?, self.shape.clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        weight: &candle_core::CudaStorage,
        weight_layout: &Layout,
        bias: &candle_core::CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let y = self.product((x, x_layout), (weight, weight_layout))?;
        let (layout, bias_layout) =
            (Layout::contiguous(&self.shape), bias_layout.broadcast_as(&self.shape)?);
        let y = y.binary_impl::<candle_core::op::Add>(bias, &layout, &bias_layout)?;
        Ok((y, self.shape.clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (dx, dweight) = self.gradients(x, weight, &dy)?;
        let dbias = match bias.track_op() {
            true => Some(column_sums(&dy)?),
            false => None,
        };
        Ok((dx, dweight, dbias))
    }
}

/// The sum over all rows of a contiguous tensor.
fn column_sums(dy: &Tensor) -> Result<Tensor> {
    let mask = DropMask::none().args(NAME, dy.dims())?;
    dy.apply_op1_no_bwd(&DropoutAddBias { mask })
}

/// Adds `bias` to every row of a product, where it lies.
fn add_bias(y: CpuStorage, bias: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
    /// Elements that a thread takes at a time.
    const CHUNK: usize = 1 << 14;
    for_float_dtype!(NAME, bias, |E| {
        let bias = slice::<E>(NAME, bias, layout)?;
        let mut y = E::cpu_storage_data(y)?;
        // An empty bias has an empty y, of which there are no chunks.
        let rows = CHUNK.next_multiple_of(bias.len().max(1));
        y.par_chunks_mut(rows).for_each(|y| add_to_rows(bias, y));
        Ok(storage(y))
    })
}

vectorized! {
    fn add_to_rows<E: Element>(bias: &[E], y: &mut [E]) {
        for row in y.chunks_exact_mut(bias.len()) {
            for (y, bias) in row.iter_mut().zip(bias) {
                *y = E::store(y.load() + bias.load());
            }
        }
    }
}
