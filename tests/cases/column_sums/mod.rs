//! `column_sums`.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::{column_sums, dropout as our_dropout};

pub use formula::formula;

use crate::{Case, Results, dropout};

#[derive(Debug)]
struct ColumnSums;

pub const CASES: &[&dyn Case] = &[&ColumnSums];

impl Case for ColumnSums {
    fn name(&self) -> &'static str {
        "column_sums"
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        vec![size.to_vec()]
    }

    fn takes(&self, size: &[usize]) -> bool {
        // Candle's formula has no rows of nothing.
        size.iter().product::<usize>() > 0
    }

    fn output(&self, arguments: &[Vec<usize>]) -> Vec<usize> {
        vec![arguments[0].last().copied().unwrap_or(1)]
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![column_sums(&args[0], drop)?])
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
        Some(dropout::chain(&args[0], drop_p).and_then(|x| Ok(vec![x.sum(0)?])))
    }

    fn composed(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Results {
        Some(our_dropout(&args[0], drop).and_then(|x| Ok(vec![x.sum(0)?])))
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        // At a rate candle's chain is its dropout, and a row of sums too short to compare draws by.
        &[0.]
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // x; dx. Sums and their gradient are a row.
        Ok([1., 1.])
    }
}
