//! `softmax_dropout` with each mask of attention.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{D, Result, Tensor};
use candle_dropout::{AttentionMask, DropMask, softmax_dropout};

pub use formula::{formula, softmax};

use crate::{Case, Exact, Results, dropout, largest};

/// The scale of the scores; no f32 holds it exactly.
pub const SCALE: f64 = 0.7;

/// Of the keys.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mask {
    None,
    Causal,
    Additive,
}

#[derive(Debug)]
struct SoftmaxDropout(Mask);

pub const CASES: &[&dyn Case] =
    &[&SoftmaxDropout(Mask::None), &SoftmaxDropout(Mask::Causal), &SoftmaxDropout(Mask::Additive)];

impl SoftmaxDropout {
    fn mask(&self, args: &[Tensor]) -> AttentionMask {
        match self.0 {
            Mask::None => AttentionMask::None,
            Mask::Causal => AttentionMask::Causal,
            Mask::Additive => AttentionMask::Additive(args[1].clone()),
        }
    }
}

impl Case for SoftmaxDropout {
    fn name(&self) -> &'static str {
        match self.0 {
            Mask::None => "softmax_dropout",
            Mask::Causal => "softmax_dropout_causal",
            Mask::Additive => "softmax_dropout_additive",
        }
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        let mut arguments = vec![size.to_vec()];
        let additive = || size.last().map_or(vec![], |last| vec![*last]);
        arguments.extend((self.0 == Mask::Additive).then(additive));
        arguments
    }

    fn takes(&self, size: &[usize]) -> bool {
        self.0 != Mask::Causal || size.len() >= 2
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![softmax_dropout(&args[0], SCALE, &self.mask(args), drop)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], SCALE, &self.mask(args), keep, scale)?])
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        let y = || {
            let probabilities = candle_nn::ops::softmax(&(&args[0] * SCALE)?, D::Minus1)?;
            Ok(vec![dropout::chain(&probabilities, drop_p)?])
        };
        (self.0 == Mask::None).then(y)
    }

    fn terms(&self, exact: &Exact<'_>) -> Result<Vec<f64>> {
        // The terms of a gradient cancel, in part or wholly.
        let term = 2. * largest(&exact.results[0])? * largest(exact.dy)?;
        let mut terms = vec![0., term];
        if let Some(additive) = exact.results.get(2) {
            // Rows that share their mask sum up its gradient, and the errors.
            let rows = exact.results[1].elem_count() as f64 / additive.elem_count().max(1) as f64;
            terms.push(term * rows.max(1.).sqrt());
        }
        Ok(terms)
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        if self.0 == Mask::None { &[0., 0.1] } else { &[] }
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // scores, y; scores, dy, dscores.
        Ok([2., 3.])
    }
}
