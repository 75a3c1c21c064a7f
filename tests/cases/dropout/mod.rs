//! `dropout`.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::dropout;

pub use formula::formula;

use crate::{Case, Results};

#[derive(Debug)]
struct Dropout;

pub const CASES: &[&dyn Case] = &[&Dropout];

impl Case for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        vec![size.to_vec()]
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![dropout(&args[0], drop)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], keep, scale)?])
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        Some(chain(&args[0], drop_p).map(|y| vec![y]))
    }

    fn same_bits_but_for(&self) -> Option<&'static [usize]> {
        Some(&[])
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        // Without a rate it returns x itself.
        &[0.1]
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // x, y; dy, dx.
        Ok([2., 2.])
    }
}

/// Candle's own, which a program skips where nothing is to be dropped.
pub fn chain(x: &Tensor, drop_p: f32) -> Result<Tensor> {
    if drop_p == 0. { Ok(x.clone()) } else { candle_nn::ops::dropout(x, drop_p) }
}
