//! `drop_path_kept` around a branch that changes nothing, by the formula of `drop_path_add`.

#[cfg(test)]
mod kernel;

use candle_core::{Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::{StochasticDepth, drop_path_add, drop_path_kept};

use crate::{Case, Results, drop_path_add};

const ROW: StochasticDepth = StochasticDepth::Row;

#[derive(Debug)]
struct DropPathKept;

pub const CASES: &[&dyn Case] = &[&DropPathKept];

impl Case for DropPathKept {
    fn name(&self) -> &'static str {
        "drop_path_kept"
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        vec![size.to_vec(); 2]
    }

    fn takes(&self, size: &[usize]) -> bool {
        !size.is_empty()
    }

    fn output(&self, arguments: &[Vec<usize>]) -> Vec<usize> {
        // If no sample is kept, x need not go with the residual, which alone shapes the output.
        arguments[1].clone()
    }

    fn mask_dims(&self, size: &[usize]) -> Option<Vec<usize>> {
        Some(vec![1, size[0]])
    }

    fn window(&self, drop: &DropMask, size: &[usize], start: &[usize]) -> DropMask {
        drop.window(&[1, size[0]], &[0, start[0]])
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        let identity = |kept: &Tensor| Ok(kept.clone());
        Ok(vec![drop_path_kept(&args[0], &args[1], ROW, drop, identity)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        Ok(vec![drop_path_add::formula(&args[0], &args[1], keep, scale)?])
    }

    fn composed(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Results {
        Some(drop_path_add(&args[0], &args[1], ROW, drop).map(|y| vec![y]))
    }

    fn same_bits_but_for(&self) -> Option<&'static [usize]> {
        Some(&[])
    }
}
