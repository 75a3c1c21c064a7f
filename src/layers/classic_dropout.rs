use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::linear::Linear;
use super::site::{Site, module_methods, rate_methods};
use crate::check::check_dtype;
use crate::composed::times;
use crate::functional::unscaled_dropout;
use crate::mask::{DropMask, MaskGenerator};

/// Dropout as it was published: what is kept in training is not scaled; in evaluation everything is, by the
/// probability of keeping.
///
/// ```text
/// training     y = keep ? x : 0
/// evaluation   y = q x                  q: the realised probability of keeping
/// ```
///
/// [`Dropout`](crate::Dropout) scales in training instead, and its evaluation is the identity; both have the same
/// expectation up to the factor `q`. [`to_weight_scaled`](Self::to_weight_scaled) moves that factor into the layer behind
/// it, so that a network for inference has no dropout left (section 4 of the paper).
///
/// # Shapes
/// Any.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU.
///
/// Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: a simple way to prevent neural networks from
/// overfitting", JMLR 15, 2014 (eq. 1-3, figure 2).
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{Device, Module, Tensor};
/// use candle_dropout::nn::Linear;
/// use candle_dropout::{ClassicDropout, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = ClassicDropout::new(0.5, Arc::new(MaskGenerator::new(42)))?;
/// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// assert_eq!(layer.forward(&x, false)?.to_vec2::<f32>()?, [[0.5, 1.]]);
/// let linear = Linear::new(Tensor::new(&[[3f32, 4.]], &Device::Cpu)?, None);
/// let scaled = layer.to_weight_scaled(&linear)?;
/// assert_eq!(scaled.forward(&x)?.to_vec2::<f32>()?, [[5.5]]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ClassicDropout(Site);

const NAME: &str = "classic_dropout";

impl ClassicDropout {
    /// A layer that drops each element with probability `drop_p`.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        Site::new(drop_p, generator).checked(NAME).map(Self)
    }

    /// The mask of this call, of the shape of the input.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.0.next_mask(NAME, train)
    }

    /// The realised probability of keeping.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn keep_p(&self) -> Result<f64> {
        Ok(f64::from(self.0.rate(NAME)?.threshold()) / 65536.)
    }

    /// Drops elements if `train` is true, else scales all of them.
    ///
    /// # Errors
    /// The rate is no probability, or `xs` is refused by [`unscaled_dropout`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        check_dtype(NAME, "xs", xs)?;
        let drop = self.next_mask(train)?;
        match self.keep_p()? {
            keep_p if !train && keep_p != 1. => times(xs, keep_p),
            _ => unscaled_dropout(xs, (), &drop),
        }
    }

    /// The layer behind this one with its weights scaled by the probability of keeping: of an input that has passed
    /// no dropout it gives what `linear` gives of this layer's evaluation.
    ///
    /// # Errors
    /// The rate is no probability, or candle cannot scale the weight.
    pub fn to_weight_scaled(&self, linear: &Linear) -> Result<Linear> {
        let weight = times(&linear.weight().detach(), self.keep_p()?)?;
        Ok(Linear::new(weight, linear.bias().map(Tensor::detach)))
    }
}

rate_methods!(ClassicDropout, 0);

module_methods!(ClassicDropout);
