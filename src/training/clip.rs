//! Gradients whose common length is bounded.

use std::collections::HashSet;

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, bail};

use super::NamedVars;
use super::sums::{Term, sums};

const NAME: &str = "clip_grad_norm";

/// Scales the gradients of all variables by one factor if their global norm is above `max_norm`, and gives
/// the norm that they had.
///
/// ```text
/// norm = sqrt(Σ over all variables Σ g^2)
/// g   <- g * max_norm / norm      if norm > max_norm
/// ```
///
/// PyTorch's `clip_grad_norm_`, but for its 1e-6 beside the norm, and with an error where that spreads NaN.
/// Variables without a gradient count as zeros, and one with two names counts once. Squares are summed in f64 and
/// gradients are scaled in f32, whatever their dtype, so that nothing overflows in a half; sums are taken in the
/// order of the names, so the norm does not depend on the number of threads.
///
/// On CUDA it waits for the device, and from Metal, which has no f64, the gradients are copied to be summed.
/// [`AdamW`](super::AdamW) clips without waiting.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, as the gradients come; they keep it.
///
/// # Errors
/// `max_norm` is not positive; the norm is no finite number (then the gradients are left as they are, and
/// [`check_gradients`](super::check_gradients) says whose are not finite).
///
/// Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013, arXiv
/// 1211.5063.
///
/// # Example
/// ```
/// use candle_core::{Device, Result, Var};
/// use candle_dropout::training::{NamedVars, clip_grad_norm};
///
/// # fn main() -> Result<()> {
/// let var = Var::new(&[3f32, 4.], &Device::Cpu)?;
/// let mut grads = (var.as_tensor().sqr()?.sum_all()? / 2.)?.backward()?; // the gradient is [3, 4]
/// let vars = NamedVars::from([("w".to_string(), var.clone())]);
/// assert_eq!(clip_grad_norm(&vars, &mut grads, 2.5)?, 5.);
/// assert_eq!(grads.get(&var).unwrap().to_vec1::<f32>()?, [1.5, 2.]);
/// # Ok(()) }
/// ```
pub fn clip_grad_norm(vars: &NamedVars, grads: &mut GradStore, max_norm: f64) -> Result<f64> {
    if max_norm.is_nan() || max_norm <= 0. {
        bail!(
            "{NAME}: max_norm: expected a positive number, got {max_norm}; f64::INFINITY measures the norm \
             and clips nothing"
        )
    }
    // A variable under two names, as tied weights are, is one.
    let mut seen = HashSet::new();
    let vars: Vec<_> = vars.values().filter(|var| seen.insert(var.id())).collect();
    let of: Vec<_> = vars.iter().filter_map(|var| grads.get(var)).collect();
    let norm = sums(NAME, &of, Term::Square)?.into_iter().sum::<f64>().sqrt();
    if !norm.is_finite() {
        bail!(
            "{NAME}: grads: expected a finite norm, got {norm}; check_gradients names the variables, a \
             smaller learning rate or loss scale may help"
        )
    }
    if norm > max_norm {
        for var in vars {
            if let Some(grad) = grads.get(var) {
                let wide = if grad.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
                let scaled = (grad.to_dtype(wide)? * (max_norm / norm))?.to_dtype(grad.dtype())?;
                grads.insert(var, scaled);
            }
        }
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use super::*;

    fn with(grads: &[Tensor]) -> Result<(NamedVars, GradStore)> {
        let (mut vars, mut store) = (NamedVars::new(), GradStore::default());
        for (i, grad) in grads.iter().enumerate() {
            let var = Var::zeros(grad.shape(), grad.dtype(), &Device::Cpu)?;
            store.insert(&var, grad.clone());
            vars.insert(i.to_string(), var);
        }
        vars.insert("frozen".to_string(), Var::zeros(2, DType::F32, &Device::Cpu)?);
        Ok((vars, store))
    }

    #[test]
    fn gradients_at_or_below_the_norm_keep_their_bits() -> Result<()> {
        let (vars, mut grads) = with(&[Tensor::new(&[3f32, 4.], &Device::Cpu)?])?;
        let before = grads.get(&vars["0"]).map(Tensor::id);
        for max_norm in [5., 6., f64::INFINITY] {
            assert_eq!(clip_grad_norm(&vars, &mut grads, max_norm)?, 5.);
        }
        assert_eq!(grads.get(&vars["0"]).map(Tensor::id), before);
        Ok(())
    }

    #[test]
    fn a_variable_with_two_names_counts_once() -> Result<()> {
        let (mut vars, mut grads) = with(&[Tensor::new(&[3f32, 4.], &Device::Cpu)?])?;
        vars.insert("tied".to_string(), vars["0"].clone());
        assert_eq!(clip_grad_norm(&vars, &mut grads, 2.5)?, 5.);
        let clipped = grads.get(&vars["0"]).map(Tensor::to_vec1::<f32>).transpose()?;
        assert_eq!(clipped, Some(vec![1.5, 2.]));
        Ok(())
    }

    #[test]
    fn halves_are_clipped_without_overflow_or_underflow() -> Result<()> {
        // 2^22 elements: the square of each overflows f16, and a factor of 2^-27 is none in f16.
        for dtype in [DType::F16, DType::BF16] {
            let grad = Tensor::full(65280f32, 1 << 22, &Device::Cpu)?.to_dtype(dtype)?;
            let (vars, mut grads) = with(&[grad])?;
            let norm = clip_grad_norm(&vars, &mut grads, 65280. / 65536.)?;
            assert_eq!(norm, 65280. * 2048.);
            let clipped = grads.remove(&vars["0"]).map(|grad| grad.to_dtype(DType::F32)?.get(7));
            let clipped = clipped.transpose()?.map(|one| one.to_scalar::<f32>()).transpose()?;
            assert_eq!(clipped, Some(65280. / 65536. / 2048.), "{dtype:?}");
        }
        Ok(())
    }

    #[test]
    fn errors_leave_the_gradients_as_they_are() -> Result<()> {
        for (grad, max_norm, part) in [
            ([1., 2.], 0., "max_norm: expected a positive number, got 0"),
            ([1., 2.], f64::NAN, "max_norm: expected a positive number, got NaN"),
            ([1., f32::NAN], 1., "expected a finite norm, got NaN"),
            ([1., f32::INFINITY], 1., "expected a finite norm, got inf"),
        ] {
            let (vars, mut grads) = with(&[Tensor::new(&grad, &Device::Cpu)?])?;
            let before = grads.get(&vars["0"]).map(Tensor::id);
            let message = match clip_grad_norm(&vars, &mut grads, max_norm) {
                Ok(norm) => norm.to_string(),
                Err(error) => error.to_string(),
            };
            assert!(message.starts_with("clip_grad_norm: ") && message.contains(part), "{message}");
            assert_eq!(grads.get(&vars["0"]).map(Tensor::id), before);
        }
        Ok(())
    }
}
