//! `linear`, `drop_connect_linear` and `dropout_linear`, with a bias and without. A size is `[.., in, out]`.

mod formula;

use candle_core::{Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::{drop_connect_linear, dropout_linear, linear};

pub use formula::formula;

use crate::{Case, Results, dropout};

/// What is dropped; the weight of `linear` is `[in, out]`, of the others `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Drops {
    Nothing,
    Weight,
    X,
}

#[derive(Debug)]
struct Linear {
    drops: Drops,
    has_bias: bool,
}

pub const CASES: &[&dyn Case] = &[
    &Linear { drops: Drops::Nothing, has_bias: false },
    &Linear { drops: Drops::Nothing, has_bias: true },
    &Linear { drops: Drops::Weight, has_bias: false },
    &Linear { drops: Drops::Weight, has_bias: true },
    &Linear { drops: Drops::X, has_bias: false },
    &Linear { drops: Drops::X, has_bias: true },
];

impl Case for Linear {
    fn name(&self) -> &'static str {
        match (self.drops, self.has_bias) {
            (Drops::Nothing, false) => "linear",
            (Drops::Nothing, true) => "linear_bias",
            (Drops::Weight, false) => "drop_connect_linear",
            (Drops::Weight, true) => "drop_connect_linear_bias",
            (Drops::X, false) => "dropout_linear",
            (Drops::X, true) => "dropout_linear_bias",
        }
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        let Some((&outputs, dims)) = size.split_last() else { return vec![vec![]; 2] };
        let mut weight = size[size.len().saturating_sub(2)..].to_vec();
        if self.drops != Drops::Nothing {
            weight.reverse();
        }
        let mut arguments = vec![dims.to_vec(), weight];
        arguments.extend(self.has_bias.then(|| vec![outputs]));
        arguments
    }

    fn takes(&self, size: &[usize]) -> bool {
        size.len() >= 3
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
        output.extend(match self.drops {
            Drops::Nothing => arguments[1].last(),
            _ => arguments[1].first(),
        });
        output
    }

    fn mask_dims(&self, size: &[usize]) -> Option<Vec<usize>> {
        let arguments = self.arguments(size);
        match self.drops {
            Drops::Nothing => None,
            Drops::Weight => Some(arguments[1].clone()),
            Drops::X => Some(arguments[0].clone()),
        }
    }

    /// The mask lacks the last dimension of a size; that of a weight is shared by all samples.
    fn window(&self, drop: &DropMask, size: &[usize], start: &[usize]) -> DropMask {
        match self.mask_dims(size) {
            Some(full) if self.drops == Drops::X => drop.window(&full, &start[..full.len()]),
            _ => drop.clone(),
        }
    }

    fn drop_ps(&self) -> &'static [f32] {
        if self.drops == Drops::Nothing { &[0.] } else { &[0., 0.1, 0.5, 1.] }
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        let (x, weight, bias) = (&args[0], &args[1], args.get(2));
        Ok(vec![match self.drops {
            Drops::Nothing => linear(x, weight, bias)?,
            Drops::Weight => drop_connect_linear(x, weight, bias, drop)?,
            Drops::X => dropout_linear(x, weight, bias, drop)?,
        }])
    }

    fn formula(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        let (x, weight, bias) = (&args[0], &args[1], args.get(2));
        Ok(vec![match self.drops {
            Drops::Nothing => formula(x, weight, bias)?,
            Drops::Weight => formula(x, &dropout::formula(weight, keep, scale)?.t()?, bias)?,
            Drops::X => formula(&dropout::formula(x, keep, scale)?, &weight.t()?, bias)?,
        }])
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        let (x, weight, bias) = (&args[0], &args[1], args.get(2));
        let chain = || match self.drops {
            Drops::Nothing => formula(x, weight, bias),
            Drops::Weight => formula(x, &dropout::chain(weight, drop_p)?.t()?, bias),
            Drops::X => formula(&dropout::chain(x, drop_p)?, &weight.t()?, bias),
        };
        Some(chain().map(|y| vec![y]))
    }
}
