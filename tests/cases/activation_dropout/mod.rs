//! `activation_dropout` with each activation.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{Result, Tensor};
use candle_dropout::{Activation, DropMask, activation_dropout};

pub use formula::formula;

use crate::{Case, Exact, Results, dropout, largest};

#[derive(Debug)]
struct ActivationDropout {
    name: &'static str,
    activation: Activation,
    has_bias: bool,
}

const fn case(name: &'static str, activation: Activation, has_bias: bool) -> ActivationDropout {
    ActivationDropout { name, activation, has_bias }
}

pub const CASES: &[&dyn Case] = &[
    &const { case("activation_dropout", Activation::GeluTanh, false) },
    &const { case("activation_dropout_gelu_erf_bias", Activation::GeluErf, true) },
    &const { case("activation_dropout_silu", Activation::Silu, false) },
    &const { case("activation_dropout_relu_bias", Activation::Relu, true) },
];

impl Case for ActivationDropout {
    fn name(&self) -> &'static str {
        self.name
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        let mut arguments = vec![size.to_vec()];
        arguments.extend(self.has_bias.then(|| vec![size.last().copied().unwrap_or(1)]));
        arguments
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![activation_dropout(&args[0], args.get(1), self.activation, drop)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], args.get(1), self.activation, keep, scale)?])
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        let is_plain = self.activation == Activation::GeluTanh && !self.has_bias;
        is_plain.then(|| Ok(vec![dropout::chain(&args[0].gelu()?, drop_p)?]))
    }

    fn terms(&self, exact: &Exact<'_>) -> Result<Vec<f64>> {
        // A slope is a sum of terms of this size, each with the error of an exponential.
        let term = 4. * f64::from(exact.drop.rate().scale()) * largest(exact.dy)?;
        Ok([0.].into_iter().chain(exact.args.iter().map(|_| term)).collect())
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        let is_plain = self.activation == Activation::GeluTanh && !self.has_bias;
        if is_plain { &[0., 0.1] } else { &[] }
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // x, y; x, dy, dx.
        Ok([2., 3.])
    }
}
