//! Weights that are kept within a ball.

use candle_core::{DType, Result, Tensor, Var, bail};

const NAME: &str = "max_norm";

/// Keeps the weights that lead into each unit within a ball: those whose norm is larger are scaled back onto it.
///
/// ```text
/// w[unit] = |w[unit]| > max_norm ? w[unit] * max_norm / |w[unit]| : w[unit]
/// ```
///
/// Called after each step of the optimiser; the copies in f32 that [`AdamW`](super::AdamW) keeps of halves, where it is
/// told to, are not seen. Srivastava et al. found it the best companion of dropout, with `max_norm`
/// from 3 to 4; Keras' `MaxNorm` has 2 and, for its kernels `[in, out]`, `axis=0`, which is
/// [`with_unit_dim`](Self::with_unit_dim)`(1)` here.
///
/// # Shapes
/// A variable of at least two dimensions: candle's `[out, in]` of a linear layer, `[out, in, k, k]` of a convolution.
/// Each index of the dimension of units, the first one, has a norm over all others.
///
/// # Dtypes
/// f32, f64, f16, bf16. Norms of halves are taken in f32. What is within the ball keeps its bits.
///
/// Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: a simple way to prevent neural networks from
/// overfitting", JMLR 15, 2014 (section 5.1).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_dropout::training::MaxNorm;
///
/// # fn main() -> candle_core::Result<()> {
/// let weight = Var::from_tensor(&Tensor::new(&[[3f32, 4.], [0.6, 0.8]], &Device::Cpu)?)?;
/// MaxNorm::new(2.5)?.apply([&weight])?;
/// assert_eq!(weight.to_vec2::<f32>()?, [[1.5, 2.], [0.6, 0.8]]);
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MaxNorm {
    max_norm: f64,
    unit_dim: usize,
}

impl MaxNorm {
    /// Norms of at most `max_norm`, of the units in the first dimension.
    ///
    /// # Errors
    /// `max_norm` is no positive number.
    pub fn new(max_norm: f64) -> Result<Self> {
        if !(max_norm.is_finite() && max_norm > 0.) {
            bail!("{NAME}: max_norm: expected a positive number, got {max_norm}; usual are 2 to 4")
        }
        Ok(Self { max_norm, unit_dim: 0 })
    }

    /// The same for weights whose units lie in another dimension: 1 for `[in, out]`.
    pub fn with_unit_dim(self, unit_dim: usize) -> Self {
        Self { unit_dim, ..self }
    }

    /// Scales what is too long, in place. Nothing is changed if a variable is refused.
    ///
    /// # Errors
    /// A variable is no float tensor, has fewer than two dimensions or no such dimension of units.
    pub fn apply<'a>(&self, vars: impl IntoIterator<Item = &'a Var>) -> Result<()> {
        let vars: Vec<_> = vars.into_iter().collect();
        for (at, var) in vars.iter().enumerate() {
            if !matches!(var.dtype(), DType::F32 | DType::F64 | DType::F16 | DType::BF16) {
                bail!(
                    "{NAME}: vars[{at}]: expected dtype f32, f64, f16 or bf16, got {:?}; leave it out",
                    var.dtype()
                )
            }
            if var.rank() < 2 || self.unit_dim >= var.rank() {
                bail!(
                    "{NAME}: vars[{at}]: expected weights with units in dimension {} and at least one more, got {:?}; \
                     leave biases out",
                    self.unit_dim,
                    var.dims()
                )
            }
        }
        vars.into_iter().try_for_each(|var| self.constrain(var))
    }

    fn constrain(&self, var: &Var) -> Result<()> {
        let weight = var.as_tensor().detach();
        let wide = match weight.dtype() {
            DType::F16 | DType::BF16 => weight.to_dtype(DType::F32)?,
            _ => weight.clone(),
        };
        let others: Vec<usize> = (0..weight.rank()).filter(|d| *d != self.unit_dim).collect();
        // By the largest element, so that no square overflows or vanishes.
        let largest = others.iter().try_fold(wide.abs()?, |max, d| max.max_keepdim(*d))?;
        let unit = largest.eq(0.)?.where_cond(&largest.ones_like()?, &largest)?;
        let norm = (wide.broadcast_div(&unit)?.sqr()?.sum_keepdim(others)?.sqrt()? * unit)?;
        let is_long = norm.gt(self.max_norm)?;
        if is_long.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()? == 0. {
            return Ok(());
        }
        let scaled = (wide.broadcast_div(&norm)? * self.max_norm)?.to_dtype(weight.dtype())?;
        let is_long: Tensor = is_long.broadcast_as(weight.shape())?.contiguous()?;
        var.set(&is_long.where_cond(&scaled, &weight)?)
    }
}
