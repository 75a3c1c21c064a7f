//! Sums over whole gradients, in f64: whatever the dtype, no square overflows and no sum stalls.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::check::check_dtype;
use crate::cpu::{Element, Real, for_float_dtype, lane_sum, vectorized};
use crate::input::Input;

/// Elements of a partial sum. The parts depend on the tensor alone, so that the sum does not depend on the
/// number of threads.
const PART: usize = 1 << 15;

/// What is summed.
#[derive(Clone, Copy)]
pub(super) enum Term {
    /// `|x|`: zero only if all are, and finite only if all are.
    Magnitude,
    /// `x * x`
    Square,
}

/// The sum over each tensor. Waits for the device once if the tensors lie on CUDA; other devices have no f64, and
/// the host sums what it copies from them.
pub(super) fn sums(op: &'static str, tensors: &[&Tensor], term: Term) -> Result<Vec<f64>> {
    for tensor in tensors {
        check_dtype(op, "grads", tensor)?;
    }
    if !tensors.iter().any(|tensor| tensor.device().is_cuda()) {
        let sum = |tensor: &&Tensor| on_cpu(op, &tensor.to_device(&Device::Cpu)?, term);
        return tensors.iter().map(sum).collect();
    }
    let sums = tensors.iter().map(|x| {
        // An empty tensor has no sum on CUDA.
        if x.elem_count() == 0 {
            return Tensor::zeros((), DType::F64, tensors[0].device());
        }
        let x = x.to_dtype(DType::F64)?;
        let terms = match term {
            Term::Magnitude => x.abs()?,
            Term::Square => x.sqr()?,
        };
        terms.sum_all()?.to_device(tensors[0].device())
    });
    Tensor::stack(&sums.collect::<Result<Vec<_>>>()?, 0)?.to_vec1()
}

fn on_cpu(op: &'static str, x: &Tensor, term: Term) -> Result<f64> {
    let x = x.contiguous()?;
    let x = Input::new(op, &x);
    for_float_dtype!(x, |E| {
        let parts: Vec<f64> = x.slice::<E>()?.par_chunks(PART).map(|x| part(x, term)).collect();
        Ok(parts.into_iter().sum())
    })
}

vectorized! {
    fn part<E: Element>(x: &[E], term: Term) -> f64 {
        match term {
            Term::Magnitude => lane_sum(x.len(), |j| x[j].load().to_f64().abs()),
            Term::Square => lane_sum(x.len(), |j| x[j].load().to_f64() * x[j].load().to_f64()),
        }
    }
}
