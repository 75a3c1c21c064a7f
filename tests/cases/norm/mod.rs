//! LayerNorm and RMSNorm.

pub mod far;
mod formula;
#[cfg(test)]
pub(crate) mod kernel;

use candle_core::{Module, Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::Norm;

pub use formula::formula;

use crate::{Case, Exact, largest};

/// Large enough that no row of random numbers is ill-conditioned.
pub const EPS: f64 = 0.1;

#[derive(Debug)]
enum Kind {
    Layer,
    Rms,
}

pub const CASES: &[&dyn Case] = &[&Kind::Layer, &Kind::Rms];

impl Kind {
    fn of(&self, args: &[Tensor]) -> Norm {
        match self {
            Self::Layer => Norm::layer_norm(args[1].clone(), Some(args[2].clone()), EPS),
            Self::Rms => Norm::rms_norm(args[1].clone(), EPS),
        }
    }
}

impl Case for Kind {
    fn name(&self) -> &'static str {
        match self {
            Self::Layer => "layer_norm",
            Self::Rms => "rms_norm",
        }
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        let cols = vec![size.last().copied().unwrap_or(1)];
        match self {
            Self::Layer => vec![size.to_vec(), cols.clone(), cols],
            Self::Rms => vec![size.to_vec(), cols],
        }
    }

    fn mask_dims(&self, _: &[usize]) -> Option<Vec<usize>> {
        None
    }

    fn drop_ps(&self) -> &'static [f32] {
        &[0.]
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], _: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![self.of(args).forward(&args[0])?])
    }

    fn formula(&self, args: &[Tensor], _: &[Tensor], _: &Tensor, _: f64) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], &self.of(args))?])
    }

    fn terms(&self, exact: &Exact<'_>) -> Result<Vec<f64>> {
        terms(exact)
    }
}

/// The gradients through a norm are differences of products of its output and what arrives there.
pub fn terms(exact: &Exact<'_>) -> Result<Vec<f64>> {
    let term = largest(&exact.results[0])? * largest(exact.dy)?;
    Ok([0.].into_iter().chain(exact.args.iter().map(|_| term)).collect())
}
