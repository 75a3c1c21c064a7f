use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

use crate::check::has_passes;
use crate::functional::linear_out_in;

/// A linear projection of the last dimension, in the place of [`candle_nn::Linear`].
///
/// ```text
/// y = x Wᵀ + b
/// dx = dy W          dW = dyᵀ x over all rows          db = sum of dy over all rows
/// ```
///
/// What is saved is passes over memory around the products, forward and back: see
/// [`functional::linear`](crate::functional::linear()), which takes the transposed weight.
///
/// # Shapes
/// `x [.., in]`, `weight [out, in]`, both strided or not; `y [.., out]`. The bias is `[out]`, or whatever else
/// broadcasts to `y`.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all tensors. Others are left to candle's.
///
/// # Errors
/// The last dimension of `x` is not `in`, or it has none; `weight` is no matrix; the bias does not broadcast;
/// dtypes or devices differ.
///
/// # Example
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_dropout::nn::Linear;
///
/// # fn main() -> candle_core::Result<()> {
/// let weight = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
/// let layer = Linear::new(weight, None);
/// let x = Tensor::new(&[[10f32, 100.]], &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, [[210., 430., 650.]]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Linear(candle_nn::Linear);

impl Linear {
    /// A layer with a weight `[out, in]` and perhaps a bias `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self(candle_nn::Linear::new(weight, bias))
    }

    /// The weight.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.0.bias()
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !has_passes(x) {
            return self.0.forward(x);
        }
        match self.bias() {
            Some(bias) if bias.rank() != 1 || bias.elem_count() == 1 => {
                linear_out_in(x, self.weight(), None)?.broadcast_add(bias)
            }
            bias => linear_out_in(x, self.weight(), bias),
        }
    }
}

impl From<candle_nn::Linear> for Linear {
    fn from(layer: candle_nn::Linear) -> Self {
        Self(layer)
    }
}

impl From<Linear> for candle_nn::Linear {
    fn from(layer: Linear) -> Self {
        layer.0
    }
}

/// A [`Linear`] from the variables `weight` and `bias` of `vb`; if they do not exist they are drawn as
/// [`candle_nn::linear()`] draws them.
///
/// # Errors
/// `vb` holds a variable of another shape.
pub fn linear(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    candle_nn::linear(in_dim, out_dim, vb).map(Linear)
}

/// A [`Linear`] without a bias; see [`linear()`].
///
/// # Errors
/// `vb` holds a variable of another shape.
pub fn linear_no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    candle_nn::linear_no_bias(in_dim, out_dim, vb).map(Linear)
}

/// [`linear()`] if there is a `bias`, else [`linear_no_bias`].
///
/// # Errors
/// `vb` holds a variable of another shape.
pub fn linear_b(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    candle_nn::linear_b(in_dim, out_dim, bias, vb).map(Linear)
}
