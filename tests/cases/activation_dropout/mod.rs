//! `activation_dropout` with each activation, and `glu_dropout`, its gated forms of two tensors: its kernels are the
//! same, its formula is that of the two side by side.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{D, Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::{Activation, activation_dropout, glu_dropout};

pub use formula::formula;

use crate::{Case, Exact, Results, dropout, largest};

/// The functions without a gate.
pub const PLAIN: [Activation; 8] = [
    Activation::GeluTanh,
    Activation::GeluErf,
    Activation::Silu,
    Activation::Relu,
    Activation::QuickGelu,
    Activation::Relu2,
    Activation::Tanh,
    Activation::Sigmoid,
];

/// Their gated forms, in the same order.
pub const GATED: [Activation; 8] = [
    Activation::GeGlu,
    Activation::GeGluErf,
    Activation::SwiGlu,
    Activation::ReGlu,
    Activation::QuickGeGlu,
    Activation::Relu2Glu,
    Activation::TanhGlu,
    Activation::Glu,
];

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
    &const { case("activation_dropout_quick_gelu", Activation::QuickGelu, false) },
    &const { case("activation_dropout_relu2_bias", Activation::Relu2, true) },
    &const { case("activation_dropout_tanh", Activation::Tanh, false) },
    &const { case("activation_dropout_sigmoid_bias", Activation::Sigmoid, true) },
    &GluDropout { name: "glu_dropout", activation: Activation::SwiGlu },
    &GluDropout { name: "glu_dropout_gelu_erf", activation: Activation::GeGluErf },
    &GluDropout { name: "glu_dropout_sigmoid", activation: Activation::Glu },
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

#[derive(Debug)]
struct GluDropout {
    name: &'static str,
    activation: Activation,
}

impl Case for GluDropout {
    fn name(&self) -> &'static str {
        self.name
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        vec![size.to_vec(); 2]
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![glu_dropout(&args[0], &args[1], self.activation, drop)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        // A scalar has no dimension to lie side by side in.
        let rows = |x: &Tensor| if x.rank() == 0 { x.unsqueeze(0) } else { Ok(x.clone()) };
        let x = Tensor::cat(&[rows(&args[0])?, rows(&args[1])?], D::Minus1)?;
        let keep = rows(keep)?;
        let y = formula(&x, None, self.activation, &keep, scale)?;
        Ok(vec![y.reshape(args[0].shape())?])
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        let y = || dropout::chain(&(args[0].silu()? * &args[1])?, drop_p);
        (self.activation == Activation::SwiGlu).then(|| Ok(vec![y()?]))
    }

    fn terms(&self, exact: &Exact<'_>) -> Result<Vec<f64>> {
        // As above, of a slope and of a value, times the other argument and times 1.
        let term = 4. * f64::from(exact.drop.rate().scale()) * largest(exact.dy)?;
        Ok(vec![0., term * largest(&exact.args[1])?, term])
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        if self.activation == Activation::SwiGlu { &[0., 0.1] } else { &[] }
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // gate, up, y; gate, up, dy, dgate, dup.
        Ok([3., 5.])
    }
}
