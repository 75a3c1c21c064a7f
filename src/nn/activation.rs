//! `candle_nn::activation`, fused where this crate has the form.

use candle_core::{Error, Module, Result, Tensor};
pub use candle_nn::activation::*;
use serde::{Deserialize, Serialize};

use super::ops;
use crate::functional;

/// The activations that configurations name, in the place of [`candle_nn::Activation`]: with its variants and the names
/// that it is read and written under.
///
/// Those that are a [`functional::Activation`] take one pass over memory each way, in
/// f32 for halves; the others are candle's operations. Where there are no passes, for integers and f64 on CUDA, all are.
///
/// # Example
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_dropout::functional;
/// use candle_dropout::nn::Activation;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[-1f32, 3.], &Device::Cpu)?;
/// assert_eq!(Activation::Relu2.forward(&x)?.to_vec1::<f32>()?, [0., 9.]);
/// // For ops that apply the activation themselves.
/// assert_eq!(functional::Activation::try_from(Activation::Swish)?, functional::Activation::Silu);
/// assert!(functional::Activation::try_from(Activation::Mish).is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// `x Φ(x)`, with the distribution function of the normal distribution.
    #[default]
    #[serde(alias = "gelu")]
    Gelu,
    /// [`Gelu`](Self::Gelu) by a tanh.
    #[serde(alias = "gelu_new")]
    NewGelu,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²`.
    Relu2,
    /// `min(max(x, 0), 6)`.
    Relu6,
    /// `x sigmoid(x)`.
    Silu,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `min(max((x + 3) / 6, 0), 1)`.
    HardSigmoid,
    /// `silu(u) v` of the halves of the last dimension.
    Swiglu,
    /// [`Silu`](Self::Silu).
    Swish,
    /// [`ops::mish`].
    Mish,
    /// `x` times [`HardSigmoid`](Self::HardSigmoid).
    HardSwish,
    /// `x > 0 ? x : alpha * (e^x - 1)`.
    Elu(f64),
    /// `x > 0 ? x : slope * x`.
    LeakyRelu(f64),
    /// [`NewGelu`](Self::NewGelu).
    #[serde(alias = "gelu_pytorch_tanh")]
    GeluPytorchTanh,
}

impl Activation {
    /// The form that ops of this crate have.
    fn fused(self) -> Option<functional::Activation> {
        Some(match self {
            Self::Gelu => functional::Activation::GeluErf,
            Self::NewGelu | Self::GeluPytorchTanh => functional::Activation::GeluTanh,
            Self::Relu => functional::Activation::Relu,
            Self::Relu2 => functional::Activation::Relu2,
            Self::Silu | Self::Swish => functional::Activation::Silu,
            Self::Sigmoid => functional::Activation::Sigmoid,
            Self::Swiglu => functional::Activation::SwiGlu,
            Self::Relu6 | Self::HardSigmoid | Self::Mish | Self::HardSwish => return None,
            Self::Elu(_) | Self::LeakyRelu(_) => return None,
        })
    }
}

impl Module for Activation {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let candles = |xs: &Tensor| candle_nn::Activation::from(*self).forward(xs);
        match (self.fused(), self) {
            (Some(fused), _) => ops::activation(xs, fused, candles),
            (None, Self::Mish) => ops::mish(xs),
            (None, _) => candles(xs),
        }
    }
}

/// Both enums have the same variants.
macro_rules! convert {
    ($from:ty => $to:ty) => {
        impl From<$from> for $to {
            fn from(activation: $from) -> Self {
                type From = $from;
                match activation {
                    From::Gelu => Self::Gelu,
                    From::NewGelu => Self::NewGelu,
                    From::Relu => Self::Relu,
                    From::Relu2 => Self::Relu2,
                    From::Relu6 => Self::Relu6,
                    From::Silu => Self::Silu,
                    From::Sigmoid => Self::Sigmoid,
                    From::HardSigmoid => Self::HardSigmoid,
                    From::Swiglu => Self::Swiglu,
                    From::Swish => Self::Swish,
                    From::Mish => Self::Mish,
                    From::HardSwish => Self::HardSwish,
                    From::Elu(alpha) => Self::Elu(alpha),
                    From::LeakyRelu(slope) => Self::LeakyRelu(slope),
                    From::GeluPytorchTanh => Self::GeluPytorchTanh,
                }
            }
        }
    };
}
convert!(Activation => candle_nn::Activation);
convert!(candle_nn::Activation => Activation);

impl TryFrom<Activation> for functional::Activation {
    type Error = Error;

    /// # Errors
    /// No op of this crate has this activation.
    fn try_from(activation: Activation) -> Result<Self> {
        activation.fused().ok_or_else(|| {
            Error::Msg(format!(
                "activation: expected Gelu, NewGelu, GeluPytorchTanh, Relu, Relu2, Silu, Swish, Sigmoid or Swiglu, \
                 got {activation:?}; apply it as a module, and dropout after it"
            ))
        })
    }
}

impl TryFrom<candle_nn::Activation> for functional::Activation {
    type Error = Error;

    /// # Errors
    /// No op of this crate has this activation.
    fn try_from(activation: candle_nn::Activation) -> Result<Self> {
        Activation::from(activation).try_into()
    }
}
