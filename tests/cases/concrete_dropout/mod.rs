//! `concrete_dropout` at the temperature of the authors' code and at one where the mask is soft.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::concrete_dropout;

pub use formula::{formula, logit_u};

use crate::{Case, Exact, Results, largest};

#[derive(Debug)]
struct ConcreteDropout {
    name: &'static str,
    temperature: f64,
}

pub const CASES: &[&dyn Case] = &[
    &ConcreteDropout { name: "concrete_dropout", temperature: 0.1 },
    &ConcreteDropout { name: "concrete_dropout_soft", temperature: 2. / 3. },
];

impl Case for ConcreteDropout {
    fn name(&self) -> &'static str {
        self.name
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        vec![size.to_vec(), vec![]]
    }

    /// One, since it is not asked.
    fn drop_ps(&self) -> &'static [f32] {
        &[0.5]
    }

    fn keep(&self, size: &[usize], drop: &DropMask) -> Result<Tensor> {
        logit_u(drop, size)
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![concrete_dropout(&args[0], &args[1], self.temperature, drop)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        logit_u: &Tensor,
        _: f64,
    ) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], &args[1], self.temperature, logit_u)?])
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], _: f32) -> Results {
        let y = || {
            let u = args[0].rand_like(1e-7, 1. - 1e-7)?;
            let logit_u = (u.log()? - u.affine(-1., 1.)?.log()?)?;
            Ok(vec![formula(&args[0], &args[1], self.temperature, &logit_u)?])
        };
        Some(y())
    }

    fn terms(&self, exact: &Exact<'_>) -> Result<Vec<f64>> {
        // The logit of z is rounded before the temperature divides it.
        let logit_u = logit_u(exact.drop, exact.results[0].dims())?;
        let logits = (logit_u.abs()?.broadcast_add(&exact.args[1].abs()?)? / self.temperature)?;
        let roundings = (logits + 1.)?;
        let gain = formula(&roundings, &exact.args[1], self.temperature, &logit_u)?;
        let y = (&exact.args[0] * &gain)?;
        let sum = (&y * exact.dy)?.abs()?.sum_all()?.to_scalar::<f64>()? / self.temperature;
        // Of a broadcast argument, sums.
        let shared = gain.elem_count() as f64 / exact.results[1].elem_count().max(1) as f64;
        Ok(vec![largest(&y)?, largest(&gain)? * largest(exact.dy)? * shared, sum])
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        &[0.1]
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // x, y; x, dy, dx.
        Ok([2., 3.])
    }
}
