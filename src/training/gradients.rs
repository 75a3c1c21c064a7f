//! Which variables would not learn.

use candle_core::backprop::GradStore;
use candle_core::{Result, Var, bail};

use super::NamedVars;
use super::sums::{Term, sums};

const NAME: &str = "check_gradients";

/// Checks that every variable has a gradient that is finite and not all zeros, and names each that has not.
///
/// Candle says nothing where a graph ends: a variable before such an op stays as it is. So it is worth a
/// call after the first `backward` of a training, before the first step. It costs a pass over the gradients
/// and, on CUDA, waits for the device. A variable without elements needs no gradient, nor does one of integers.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, as the gradients come.
///
/// # Errors
/// Some variable has no gradient, one of zeros, or one with NaN or an infinity: one error names all of them,
/// by kind.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Result, Tensor};
/// use candle_dropout::training::{check_gradients, named_vars};
/// use candle_nn::{Linear, Module, VarBuilder, VarMap};
///
/// # fn main() -> Result<()> {
/// let map = VarMap::new();
/// let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
/// let (first, last) = (candle_nn::linear(3, 4, vb.pp("first"))?, candle_nn::linear(4, 2, vb.pp("last"))?);
/// let x = Tensor::randn(0f32, 1., (5, 3), &Device::Cpu)?;
/// // Candle's `softmax_last_dim` has no backward: what lies before it never learns.
/// let hidden = candle_nn::ops::softmax_last_dim(&first.forward(&x)?)?;
/// let grads = last.forward(&hidden)?.sqr()?.sum_all()?.backward()?;
/// let error = check_gradients(&named_vars(&map)?, &grads).unwrap_err().to_string();
/// assert!(error.contains("2 without one: first.bias, first.weight;"));
/// # Ok(()) }
/// ```
pub fn check_gradients(vars: &NamedVars, grads: &GradStore) -> Result<()> {
    let learns = |var: &Var| var.elem_count() > 0 && var.dtype().is_float();
    let vars: Vec<_> = vars.iter().filter(|(_, var)| learns(var)).collect();
    let (mut there, mut missing) = (Vec::new(), Vec::new());
    for &(name, var) in &vars {
        match grads.get(var) {
            Some(grad) => there.push((name, grad)),
            None => missing.push(name.as_str()),
        }
    }
    let of: Vec<_> = there.iter().map(|(_, grad)| *grad).collect();
    let magnitudes = sums(NAME, &of, Term::Magnitude)?;
    let named = |is: fn(f64) -> bool| -> Vec<&str> {
        let named = there.iter().zip(&magnitudes).filter(|(_, magnitude)| is(**magnitude));
        named.map(|((name, _), _)| name.as_str()).collect()
    };
    let kinds = [
        ("without one", missing),
        ("of zeros", named(|magnitude| magnitude == 0.)),
        ("with NaN or an infinity", named(|magnitude| !magnitude.is_finite())),
    ];
    let wrong: Vec<String> = kinds
        .iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(kind, names)| format!("{} {kind}: {}", names.len(), names.join(", ")))
        .collect();
    if !wrong.is_empty() {
        bail!(
            "{NAME}: grads: expected finite gradients, not all zeros, for all {} variables, got {}; \
             what has none is not reached from the loss (an op without backward ends the graph), \
             what is not finite needs a smaller learning rate or loss scale",
            vars.len(),
            wrong.join("; ")
        )
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use half::f16;

    use super::*;

    #[test]
    fn every_variable_that_would_not_learn_is_named_once() -> Result<()> {
        let (mut vars, mut grads) = (NamedVars::new(), GradStore::default());
        let mut add = |name: &str, grad: Option<Tensor>| -> Result<()> {
            let var = Var::zeros(3, grad.as_ref().map_or(DType::F32, Tensor::dtype), &Device::Cpu)?;
            if let Some(grad) = grad {
                grads.insert(&var, grad);
            }
            vars.insert(name.to_string(), var);
            Ok(())
        };
        let new = |x: [f64; 3], dtype| Tensor::new(&x, &Device::Cpu)?.to_dtype(dtype);
        add("fine", Some(new([0., 0., 1.], DType::F32)?))?;
        // Its sum is 0, its magnitude is not; its square is 0 in f32.
        add("small", Some(new([1e-30, -1e-30, 0.], DType::F32)?))?;
        // Its square and its sum are infinite in f16.
        add("large", Some(new([6e4, 6e4, 6e4], DType::F16)?))?;
        add("smallest", Some(Tensor::new(&[f16::from_bits(1); 3], &Device::Cpu)?))?;
        add("tiny", Some(new([0., 1e-300, 0.], DType::F64)?))?;
        add("strided", Some(Tensor::ones(1, DType::BF16, &Device::Cpu)?.broadcast_as(3)?))?;
        let bad = [("a.none", None), ("b.none", None)].into_iter();
        let zeros = Some(new([0., -0., 0.], DType::BF16)?);
        let bad = bad.chain([
            ("c.zeros", zeros),
            ("d.nan", Some(new([1., f64::NAN, 1.], DType::F16)?)),
            ("e.inf", Some(new([f64::INFINITY, f64::NEG_INFINITY, 1.], DType::F64)?)),
        ]);
        for (name, grad) in bad {
            add(name, grad)?;
        }
        vars.insert("empty".to_string(), Var::zeros((0, 3), DType::F32, &Device::Cpu)?);
        vars.insert("positions".to_string(), Var::zeros(3, DType::U32, &Device::Cpu)?);
        let message = match check_gradients(&vars, &grads) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        let expected = "check_gradients: grads: expected finite gradients, not all zeros, for all 11 \
                        variables, got 2 without one: a.none, b.none; 1 of zeros: c.zeros; 2 with NaN \
                        or an infinity: d.nan, e.inf; ";
        assert!(message.starts_with(expected), "{message}");
        vars.retain(|name, _| !name.contains('.'));
        check_gradients(&vars, &grads)
    }
}
