//! `drop_path_add`, sample by sample and the batch as a whole.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::{StochasticDepth, drop_path_add};

pub use formula::formula;

use crate::{Case, Results, dropout};

#[derive(Debug)]
struct DropPathAdd(StochasticDepth);

pub const CASES: &[&dyn Case] =
    &[&DropPathAdd(StochasticDepth::Row), &DropPathAdd(StochasticDepth::Batch)];

impl DropPathAdd {
    fn is_by_sample(&self) -> bool {
        self.0 == StochasticDepth::Row
    }
}

impl Case for DropPathAdd {
    fn name(&self) -> &'static str {
        if self.is_by_sample() { "drop_path_add" } else { "drop_path_add_batch" }
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        vec![size.to_vec(); 2]
    }

    fn takes(&self, size: &[usize]) -> bool {
        !self.is_by_sample() || !size.is_empty()
    }

    fn mask_dims(&self, size: &[usize]) -> Option<Vec<usize>> {
        Some(vec![1, if self.is_by_sample() { size[0] } else { 1 }])
    }

    fn window(&self, drop: &DropMask, size: &[usize], start: &[usize]) -> DropMask {
        if self.is_by_sample() { drop.window(&[1, size[0]], &[0, start[0]]) } else { drop.clone() }
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![drop_path_add(&args[0], &args[1], self.0, drop)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], &args[1], keep, scale)?])
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        let (x, residual) = (&args[0], &args[1]);
        let y = || {
            let ones = Tensor::ones((x.dim(0)?, 1), x.dtype(), x.device())?;
            Ok(vec![(residual + x.broadcast_mul(&dropout::chain(&ones, drop_p)?)?)?])
        };
        (self.is_by_sample() && x.rank() == 2).then(y)
    }

    fn same_bits_but_for(&self) -> Option<&'static [usize]> {
        Some(&[])
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        if self.is_by_sample() { &[0., 0.1] } else { &[] }
    }

    fn bench_size(&self, elements: usize) -> Vec<usize> {
        const SAMPLES: usize = 64;
        vec![SAMPLES, (elements / SAMPLES).max(1)]
    }

    fn moved(&self, size: &[usize], drop: &DropMask) -> Result<[f64; 2]> {
        let keep = drop.to_tensor((1, size[0]), &Device::Cpu)?.to_dtype(DType::F64)?;
        let kept = keep.mean_all()?.to_scalar::<f64>()?;
        // residual, y, and x where kept; dx, and dy where kept; dresidual is dy.
        Ok([2. + kept, 1. + kept])
    }
}
