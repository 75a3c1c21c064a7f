//! `zoneout`.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{DType, Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::zoneout;

pub use formula::formula;

use crate::{Case, Results};

#[derive(Debug)]
struct Zoneout;

pub const CASES: &[&dyn Case] = &[&Zoneout];

impl Case for Zoneout {
    fn name(&self) -> &'static str {
        "zoneout"
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        vec![size.to_vec(); 2]
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![zoneout(&args[0], &args[1], drop)?])
    }

    fn formula(&self, args: &[Tensor], _: &[Tensor], keep: &Tensor, _: f64) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], &args[1], keep)?])
    }

    /// The mask from candle's generator, and a selection.
    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        let y = || {
            let (new, old) = (&args[0], &args[1]);
            let draws = Tensor::rand(0f32, 1f32, new.shape(), new.device())?;
            let limit = Tensor::full(drop_p, new.shape(), new.device())?.to_dtype(DType::F32)?;
            Ok(vec![draws.ge(&limit)?.where_cond(new, old)?])
        };
        Some(y())
    }

    fn epsilon(&self, _: &[usize], _: DType) -> f64 {
        0. // elements are copied
    }

    fn same_bits_but_for(&self) -> Option<&'static [usize]> {
        Some(&[])
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        &[0.1]
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // new, old, y; dy, dnew, dold.
        Ok([3., 3.])
    }
}
