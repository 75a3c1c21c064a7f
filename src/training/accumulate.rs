//! The gradient of a batch that is too large for one pass.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, bail};

use super::NamedVars;
use crate::check::check_device;

const NAME: &str = "gradient accumulation";

/// Adds up the gradients of micro-batches.
///
/// ```text
/// finish(scale) = scale * Σ over micro-batches of dloss / dvar
/// ```
///
/// The scale is the caller's. With losses that are **sums** over tokens
/// ([`Reduction::Sum`](crate::functional::Reduction)) and `mean(tokens)`, of all that
/// [count](crate::functional::counted_targets), every token weighs alike, however the batch is cut; means of micro-batches of 10 and of 100 tokens weigh
/// a token of the first ten times as much. Gradients in f16 and bf16 are added in f32 and stay so, as
/// [`AdamW`](super::AdamW) takes them: in f16 the mean over a large batch would be rounded to zeros.
///
/// A variable that a micro-batch does not reach counts as zeros there; one that none reaches has no
/// gradient in the end either, so [`check_gradients`](super::check_gradients) names it.
///
/// # Dtypes
/// f32 and f64 as they come, f32 for f16 and bf16.
///
/// # Example
/// ```
/// use candle_core::{Device, Result, Tensor, Var};
/// use candle_dropout::training::{GradAccumulator, NamedVars};
///
/// # fn main() -> Result<()> {
/// let weight = Var::new(2f32, &Device::Cpu)?;
/// let vars = NamedVars::from([("weight".to_string(), weight.clone())]);
/// let mut accumulator = GradAccumulator::new(&vars);
/// for tokens in [&[1f32, 2.][..], &[6.]] {
///     let loss = Tensor::new(tokens, &Device::Cpu)?.broadcast_mul(&weight)?.sum_all()?;
///     accumulator.add(&loss.backward()?)?;
/// }
/// let grads = accumulator.mean(3)?; // of (1 + 2 + 6) / 3 * weight
/// assert_eq!(grads.get(&weight).unwrap().to_scalar::<f32>()?, 3.);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct GradAccumulator {
    vars: NamedVars,
    sums: BTreeMap<String, Tensor>,
    added: usize,
}

impl GradAccumulator {
    /// An accumulator of the gradients of these variables, empty.
    pub fn new(vars: &NamedVars) -> Self {
        Self { vars: vars.clone(), sums: BTreeMap::new(), added: 0 }
    }

    /// How many times gradients have been added since the last `finish`.
    pub fn added(&self) -> usize {
        self.added
    }

    /// Adds the gradients of a micro-batch.
    ///
    /// # Errors
    /// A gradient has not the shape of its variable, or another dtype or device than those before it; then nothing
    /// is added. Where a sum fails for want of memory, all are dropped.
    pub fn add(&mut self, grads: &GradStore) -> Result<()> {
        self.check(grads)?;
        if let Err(error) = self.add_checked(grads) {
            // Of half a micro-batch no gradient is right.
            self.clear();
            return Err(error.context(format!(
                "{NAME}: the sums are dropped; begin the step anew, with smaller micro-batches"
            )));
        }
        self.added += 1;
        Ok(())
    }

    fn check(&self, grads: &GradStore) -> Result<()> {
        for (name, var) in &self.vars {
            let Some(grad) = grads.get(var) else { continue };
            if grad.dims() != var.dims() {
                bail!(
                    "{NAME}: grads: {name}: expected shape {:?} like the variable, got {:?}; reshape it",
                    var.dims(),
                    grad.dims()
                )
            }
            let Some(sum) = self.sums.get(name) else { continue };
            let arg = format!("grads: {name}");
            if summed_dtype(grad) != sum.dtype() {
                bail!(
                    "{NAME}: {arg}: expected {:?} like the micro-batches before, got {:?}; convert it with \
                     to_dtype",
                    sum.dtype(),
                    grad.dtype()
                )
            }
            check_device(NAME, &arg, grad, "the micro-batches before", sum.device())?;
        }
        Ok(())
    }

    /// One sum after the other, so that old ones, new ones and gradients are never there at once.
    fn add_checked(&mut self, grads: &GradStore) -> Result<()> {
        for (name, var) in &self.vars {
            let Some(grad) = grads.get(var) else { continue };
            // A gradient is no part of a graph, but one of a graph would keep it alive.
            let grad = grad.detach().to_dtype(summed_dtype(grad))?;
            let sum = match self.sums.get(name) {
                Some(sum) => (sum + grad)?,
                None => grad,
            };
            self.sums.insert(name.clone(), sum);
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.sums.clear();
        self.added = 0;
    }

    /// The sum of what was added, times `scale`; then it is empty again.
    ///
    /// # Errors
    /// Nothing was added, or `scale` is not finite; then the sums are kept.
    pub fn finish(&mut self, scale: f64) -> Result<GradStore> {
        if self.added == 0 {
            bail!(
                "{NAME}: expected gradients of at least one micro-batch, got none; call add first"
            )
        }
        if !scale.is_finite() {
            bail!(
                "{NAME}: scale: expected a finite number, got {scale}; for a mean over tokens call mean"
            )
        }
        let mut grads = GradStore::default();
        for (name, var) in &self.vars {
            if let Some(sum) = self.sums.get(name) {
                grads.insert(var, (sum * scale)?);
            }
        }
        self.clear();
        Ok(grads)
    }

    /// `finish(1 / count)`: the gradient of the mean over `count` tokens, from losses that are sums.
    ///
    /// # Errors
    /// Those of `finish`; `count` is 0.
    pub fn mean(&mut self, count: usize) -> Result<GradStore> {
        if count == 0 {
            bail!(
                "{NAME}: count: expected the number of tokens that the losses sum over, got 0; leave out \
                 micro-batches without any"
            )
        }
        self.finish(1. / count as f64)
    }
}

/// What gradients of this one's dtype are added in.
fn summed_dtype(grad: &Tensor) -> DType {
    match grad.dtype() {
        DType::F16 | DType::BF16 => DType::F32,
        dtype => dtype,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn one(var: &Var) -> NamedVars {
        NamedVars::from([("w".to_string(), var.clone())])
    }

    fn store(var: &Var, grad: Tensor) -> GradStore {
        let mut grads = GradStore::default();
        grads.insert(var, grad);
        grads
    }

    #[test]
    fn halves_are_added_in_f32_and_stay_so() -> Result<()> {
        for dtype in [DType::F16, DType::BF16] {
            let var = Var::zeros(1, dtype, &Device::Cpu)?;
            let mut accumulator = GradAccumulator::new(&one(&var));
            let grad = |x: f32| -> Result<GradStore> {
                Ok(store(&var, Tensor::new(&[x], &Device::Cpu)?.to_dtype(dtype)?))
            };
            // A sum in a half stays at 4096, to which 1 adds nothing.
            accumulator.add(&grad(4096.)?)?;
            for _ in 0..4096 {
                accumulator.add(&grad(1.)?)?;
            }
            assert_eq!(accumulator.added(), 4097);
            // 8192 times 2^-40 is nothing in f16.
            let grads = accumulator.finish(2f64.powi(-40))?;
            let sum = grads.get(&var).map(Tensor::to_vec1::<f32>).transpose()?;
            assert_eq!(sum, Some(vec![2f32.powi(-27)]), "{dtype:?}");
        }
        Ok(())
    }

    #[test]
    fn it_is_empty_after_finish_and_knows_what_no_batch_reached() -> Result<()> {
        let (var, unreached) = (Var::new(&[1f32], &Device::Cpu)?, Var::new(&[1f32], &Device::Cpu)?);
        let mut vars = one(&var);
        vars.insert("unreached".to_string(), unreached.clone());
        let mut accumulator = GradAccumulator::new(&vars);
        for expected in [2f32, 3.] {
            accumulator.add(&store(&var, Tensor::new(&[expected], &Device::Cpu)?))?;
            accumulator.add(&GradStore::default())?;
            let grads = accumulator.mean(2)?;
            let got = grads.get(&var).map(Tensor::to_vec1::<f32>).transpose()?;
            assert_eq!(got, Some(vec![expected / 2.]));
            assert!(grads.get(&unreached).is_none());
        }
        Ok(())
    }

    #[test]
    fn errors_change_nothing() -> Result<()> {
        let var = Var::new(&[1f32], &Device::Cpu)?;
        // Before the one that is refused, so that its sum would be changed first.
        let first = Var::new(&[1f32], &Device::Cpu)?;
        let mut vars = one(&var);
        vars.insert("a".to_string(), first.clone());
        let mut accumulator = GradAccumulator::new(&vars);
        let message =
            |result: Result<()>| result.map_err(|e| e.to_string()).err().unwrap_or_default();
        let error = message(accumulator.finish(1.).map(drop));
        assert!(error.contains("expected gradients of at least one micro-batch"), "{error}");
        let with_first = |grad: Tensor| -> Result<GradStore> {
            let mut grads = store(&var, grad);
            grads.insert(&first, Tensor::new(&[5f32], &Device::Cpu)?);
            Ok(grads)
        };
        accumulator.add(&with_first(Tensor::new(&[3f32], &Device::Cpu)?)?)?;
        for (wrong, part) in [
            (
                Tensor::new(&[3f32, 4.], &Device::Cpu)?,
                "w: expected shape [1] like the variable, got [2]; reshape",
            ),
            (
                Tensor::new(&[3f64], &Device::Cpu)?,
                "w: expected F32 like the micro-batches before, got F64; ",
            ),
        ] {
            let error = message(accumulator.add(&with_first(wrong)?));
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(accumulator.added(), 1);
        let error = message(accumulator.mean(0).map(drop));
        assert!(error.contains("count: expected the number of tokens"), "{error}");
        let error = message(accumulator.finish(f64::NAN).map(drop));
        assert!(error.contains("scale: expected a finite number, got NaN"), "{error}");
        let grads = accumulator.finish(1.)?;
        for (var, expected) in [(&var, 3f32), (&first, 5.)] {
            let got = grads.get(var).map(Tensor::to_vec1::<f32>).transpose()?;
            assert_eq!(got, Some(vec![expected]));
        }
        Ok(())
    }
}
