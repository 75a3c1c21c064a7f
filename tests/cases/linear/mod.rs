//! `linear`, with a bias and without. A size is `[.., in, out]`.

mod formula;

use candle_core::{Result, Tensor};
use candle_dropout::{DropMask, linear};

pub use formula::formula;

use crate::{Case, Results};

#[derive(Debug)]
struct Linear {
    has_bias: bool,
}

pub const CASES: &[&dyn Case] = &[&Linear { has_bias: false }, &Linear { has_bias: true }];

impl Case for Linear {
    fn name(&self) -> &'static str {
        if self.has_bias { "linear_bias" } else { "linear" }
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        let Some((&outputs, dims)) = size.split_last() else { return vec![vec![]; 2] };
        let mut arguments = vec![dims.to_vec(), size[size.len().saturating_sub(2)..].to_vec()];
        arguments.extend(self.has_bias.then(|| vec![outputs]));
        arguments
    }

    fn takes(&self, size: &[usize]) -> bool {
        // Without elements it is a chain of candle's ops, which then pass no gradient on.
        size.len() >= 3 && !size.contains(&0)
    }

    fn fitting(&self, size: &[usize]) -> Vec<usize> {
        if self.takes(size) { size.to_vec() } else { [&[2], size].concat() }
    }

    fn awkward(&self) -> &'static [&'static [usize]] {
        &[&[1, 1, 1], &[3, 5, 7, 2], &[2, 3, 4, 33, 65], &[300, 16, 130]]
    }

    fn largest_argument(&self) -> f64 {
        2.
    }

    fn output(&self, arguments: &[Vec<usize>]) -> Vec<usize> {
        let mut output = arguments[0].clone();
        output.pop();
        output.extend(arguments[1].last());
        output
    }

    fn mask_dims(&self, _: &[usize]) -> Option<Vec<usize>> {
        None
    }

    fn drop_ps(&self) -> &'static [f32] {
        &[0.]
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], _: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![linear(&args[0], &args[1], args.get(2))?])
    }

    fn formula(&self, args: &[Tensor], _: &[Tensor], _: &Tensor, _: f64) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], &args[1], args.get(2))?])
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], _: f32) -> Results {
        Some(formula(&args[0], &args[1], args.get(2)).map(|y| vec![y]))
    }
}
