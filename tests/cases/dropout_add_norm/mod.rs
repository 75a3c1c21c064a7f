//! `dropout_add_norm`, with a residual and without, around each norm.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::{Norm, dropout_add_norm};

pub use formula::formula;

use crate::norm::EPS;
use crate::{Case, Exact, Results, dropout, norm};

#[derive(Debug)]
struct DropoutAddNorm {
    name: &'static str,
    has_residual: bool,
    has_bias: bool,
    norm: Kind,
}

#[derive(Debug, PartialEq)]
enum Kind {
    Rms,
    LayerWithoutBias,
    Layer,
}

pub const CASES: &[&dyn Case] = &[
    &DropoutAddNorm {
        name: "dropout_add_norm",
        has_residual: true,
        has_bias: false,
        norm: Kind::Rms,
    },
    &DropoutAddNorm {
        name: "dropout_add_norm_bias",
        has_residual: true,
        has_bias: true,
        norm: Kind::Layer,
    },
    &DropoutAddNorm {
        name: "dropout_norm",
        has_residual: false,
        has_bias: false,
        norm: Kind::LayerWithoutBias,
    },
    &DropoutAddNorm {
        name: "dropout_norm_bias",
        has_residual: false,
        has_bias: true,
        norm: Kind::Layer,
    },
];

/// x, residual, bias, norm.
type Parts<'a> = (&'a Tensor, Option<&'a Tensor>, Option<&'a Tensor>, Norm);

impl DropoutAddNorm {
    fn parts<'a>(&self, args: &'a [Tensor]) -> Parts<'a> {
        let mut rest = args.iter();
        let x = rest.next().expect("x");
        let residual = if self.has_residual { rest.next() } else { None };
        let bias = if self.has_bias { rest.next() } else { None };
        let mut parameter = || rest.next().expect("a parameter").clone();
        let norm = match self.norm {
            Kind::Rms => Norm::rms_norm(parameter(), EPS),
            Kind::LayerWithoutBias => Norm::layer_norm(parameter(), None, EPS),
            Kind::Layer => Norm::layer_norm(parameter(), Some(parameter()), EPS),
        };
        (x, residual, bias, norm)
    }

    /// The norm, and the stream where there is one.
    fn results(&self, (z, n): (Tensor, Tensor)) -> Vec<Tensor> {
        if self.has_residual { vec![n, z] } else { vec![n] }
    }
}

impl Case for DropoutAddNorm {
    fn name(&self) -> &'static str {
        self.name
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        let cols = vec![size.last().copied().unwrap_or(1)];
        let mut arguments = vec![size.to_vec()];
        arguments.extend(self.has_residual.then(|| size.to_vec()));
        arguments.extend(self.has_bias.then(|| cols.clone()));
        arguments.extend((self.norm == Kind::Layer).then(|| cols.clone()));
        arguments.push(cols);
        arguments
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        let (x, residual, bias, norm) = self.parts(args);
        Ok(self.results(dropout_add_norm(x, residual, bias, &norm, drop)?))
    }

    fn formula(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        let (x, residual, bias, norm) = self.parts(args);
        Ok(self.results(formula(x, residual, bias, &norm, keep, scale)?))
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        let [x, residual, weight] = args else { return None };
        let results = || {
            let z = (residual + dropout::chain(x, drop_p)?)?;
            // Candle's fast norms end the graph.
            let n = candle_nn::ops::rms_norm_slow(&z, weight, EPS as f32)?;
            Ok(vec![n, z])
        };
        (self.norm == Kind::Rms).then(results)
    }

    fn terms(&self, exact: &Exact<'_>) -> Result<Vec<f64>> {
        norm::terms(exact)
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        if self.norm == Kind::Rms { &[0., 0.1] } else { &[] }
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // x, residual, z, n; dn, z, dresidual, dx.
        Ok([4., 4.])
    }

    fn edges(&self, args: &[Tensor]) -> Option<Result<Tensor>> {
        // The norm is a node of its own.
        let sum = || (&args[0] + &args[1])?.reshape(args[0].shape());
        self.has_residual.then(sum)
    }
}
