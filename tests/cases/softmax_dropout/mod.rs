//! `softmax_dropout` with each mask of attention, and `softmax_drop_key`.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{D, Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::{AttentionMask, softmax_drop_key, softmax_dropout};

pub use formula::{drop_key_formula, drop_keys, formula, softmax};

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

/// What is dropped.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Drops {
    Weights,
    Keys,
}

#[derive(Debug)]
struct SoftmaxDropout(Drops, Mask);

pub const CASES: &[&dyn Case] = &[
    &SoftmaxDropout(Drops::Weights, Mask::None),
    &SoftmaxDropout(Drops::Weights, Mask::Causal),
    &SoftmaxDropout(Drops::Weights, Mask::Additive),
    &SoftmaxDropout(Drops::Keys, Mask::None),
    &SoftmaxDropout(Drops::Keys, Mask::Causal),
    &SoftmaxDropout(Drops::Keys, Mask::Additive),
];

impl SoftmaxDropout {
    fn mask(&self, args: &[Tensor]) -> AttentionMask {
        match self.1 {
            Mask::None => AttentionMask::None,
            Mask::Causal => AttentionMask::Causal,
            Mask::Additive => AttentionMask::Additive(args[1].clone()),
        }
    }

    /// What candle has a chain for.
    fn is_plain(&self) -> bool {
        (self.0, self.1) == (Drops::Weights, Mask::None)
    }
}

impl Case for SoftmaxDropout {
    fn name(&self) -> &'static str {
        match (self.0, self.1) {
            (Drops::Weights, Mask::None) => "softmax_dropout",
            (Drops::Weights, Mask::Causal) => "softmax_dropout_causal",
            (Drops::Weights, Mask::Additive) => "softmax_dropout_additive",
            (Drops::Keys, Mask::None) => "softmax_drop_key",
            (Drops::Keys, Mask::Causal) => "softmax_drop_key_causal",
            (Drops::Keys, Mask::Additive) => "softmax_drop_key_additive",
        }
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        let mut arguments = vec![size.to_vec()];
        let additive = || size.last().map_or(vec![], |last| vec![*last]);
        arguments.extend((self.1 == Mask::Additive).then(additive));
        arguments
    }

    fn takes(&self, size: &[usize]) -> bool {
        self.1 != Mask::Causal || size.len() >= 2
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        let op = match self.0 {
            Drops::Weights => softmax_dropout,
            Drops::Keys => softmax_drop_key,
        };
        Ok(vec![op(&args[0], SCALE, &self.mask(args), drop)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        let (scores, mask) = (&args[0], self.mask(args));
        Ok(vec![match self.0 {
            Drops::Weights => formula(scores, SCALE, &mask, keep, scale)?,
            Drops::Keys => drop_key_formula(scores, SCALE, &mask, keep)?,
        }])
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        let y = || {
            let probabilities = candle_nn::ops::softmax(&(&args[0] * SCALE)?, D::Minus1)?;
            Ok(vec![dropout::chain(&probabilities, drop_p)?])
        };
        self.is_plain().then(y)
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
        if self.is_plain() { &[0., 0.1] } else { &[] }
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // scores, y; scores, dy, dscores.
        Ok([2., 3.])
    }
}
