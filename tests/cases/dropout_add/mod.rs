//! `dropout_add`, with a bias and without.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::dropout_add;

pub use formula::formula;

use crate::{Case, Results, dropout};

#[derive(Debug)]
struct DropoutAdd {
    has_bias: bool,
}

pub const CASES: &[&dyn Case] = &[&DropoutAdd { has_bias: false }, &DropoutAdd { has_bias: true }];

impl Case for DropoutAdd {
    fn name(&self) -> &'static str {
        if self.has_bias { "dropout_add_bias" } else { "dropout_add" }
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        let mut arguments = vec![size.to_vec(); 2];
        arguments.extend(self.has_bias.then(|| vec![size.last().copied().unwrap_or(1)]));
        arguments
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![dropout_add(&args[0], &args[1], args.get(2), drop)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], &args[1], args.get(2), keep, scale)?])
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        let y = || {
            let x = args.get(2).map_or(Ok(args[0].clone()), |bias| args[0].broadcast_add(bias))?;
            Ok(vec![(&args[1] + dropout::chain(&x, drop_p)?)?])
        };
        Some(y())
    }

    fn same_bits_but_for(&self) -> Option<&'static [usize]> {
        // The gradient of the bias is a sum, in another order.
        Some(if self.has_bias { &[3] } else { &[] })
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        &[0., 0.1]
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // x, residual, y, a bias counts nothing; dy, dx, and dy once more for dbias; dresidual is dy.
        Ok([3., if self.has_bias { 3. } else { 2. }])
    }
}
