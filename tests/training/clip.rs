//! Clipping, on gradients that nobody wrote down.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::training::clip_grad_norm;
use cases::{DTYPES, largest, random};
use proptest::prelude::*;

use super::*;

/// Variables and their gradients, in f64 too.
fn gradients(seed: u64, lens: &[usize], scale: f64) -> Result<(NamedVars, GradStore, Vec<Tensor>)> {
    let (mut vars, mut grads, mut exact) = (NamedVars::new(), GradStore::default(), Vec::new());
    for (i, &len) in lens.iter().enumerate() {
        let dtype = DTYPES[(seed as usize + i) % DTYPES.len()];
        let grad = (random(&[len], DType::F64, seed + i as u64)? * scale)?.to_dtype(dtype)?;
        let var = Var::zeros(len, dtype, &Device::Cpu)?;
        exact.push(grad.to_dtype(DType::F64)?);
        grads.insert(&var, grad);
        vars.insert(format!("{i:02}"), var);
    }
    Ok((vars, grads, exact))
}

fn threads(count: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(count).build().expect("a pool")
}

proptest! {
    #[test]
    fn the_norm_is_that_of_f64_and_what_is_above_it_is_scaled(
        seed in 0..u64::from(u32::MAX),
        lens in proptest::collection::vec(prop_oneof![1..40usize, 32_000..99_000usize], 1..7),
        scale in -6f64..4.,
        bound in -3f64..3.,
    ) {
        let check = || -> Result<()> {
            let (vars, mut grads, exact) = gradients(seed, &lens, 10f64.powf(scale))?;
            let squares = exact.iter().map(|grad| grad.sqr()?.sum_all()?.to_scalar::<f64>());
            let expected = squares.sum::<Result<f64>>()?.sqrt();
            let max_norm = expected * 10f64.powf(bound);
            let norm = threads(1).install(|| clip_grad_norm(&vars, &mut grads, max_norm))?;
            // Each sum has at most 700,000 positive terms, and rounds once a term.
            assert!((norm / expected - 1.).abs() <= 7e5 * f64::EPSILON, "{norm}, not {expected}");
            let factor = if norm > max_norm { max_norm / norm } else { 1. };
            for (var, exact) in vars.values().zip(&exact) {
                let Some(grad) = grads.get(var) else { candle_core::bail!("it is gone") };
                assert_eq!(grad.dtype(), var.dtype());
                // Rounded at the factor and at the product, and in the end, where the smallest numbers of f16 are
                // 2^-24 apart.
                let (product, end, least) = match grad.dtype() {
                    DType::F64 => (2f64.powi(-52), 0., 0.),
                    DType::F32 => (2f64.powi(-22), 0., 0.),
                    DType::F16 => (2f64.powi(-22), 2f64.powi(-11), 2f64.powi(-25)),
                    _ => (2f64.powi(-22), 2f64.powi(-8), 0.),
                };
                let off = cases::error(&grad.to_dtype(DType::F64)?, &(exact * factor)?)?;
                let largest = factor * largest(exact)?;
                let bound = product * largest + (end * largest).max(least);
                assert!(off <= bound, "{:?}: {off:e}, not {bound:e}", grad.dtype());
            }
            let (vars, mut grads, _) = gradients(seed, &lens, 10f64.powf(scale))?;
            let again = threads(3).install(|| clip_grad_norm(&vars, &mut grads, max_norm))?;
            assert_eq!(again.to_bits(), norm.to_bits());
            Ok(())
        };
        check().map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}
