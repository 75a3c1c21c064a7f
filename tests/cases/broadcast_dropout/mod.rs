//! `broadcast_dropout` over the first and the last dimension, `alpha_dropout` and `embedding_dropout`.

pub mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::{alpha_dropout, broadcast_dropout, embedding_dropout};

use crate::{Case, Results, dropout};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    First,
    Last,
    Alpha,
    Words,
}
use Form::*;

#[derive(Debug)]
struct BroadcastDropout(Form);

pub const CASES: &[&dyn Case] = &[
    &BroadcastDropout(Last),
    &BroadcastDropout(First),
    &BroadcastDropout(Alpha),
    &BroadcastDropout(Words),
];

/// Words of the vocabulary, one of which is all that occurs of it in a text.
const WORDS: usize = 11;

impl BroadcastDropout {
    fn shared(&self, size: &[usize]) -> usize {
        if self.0 == First { 0 } else { size.len().saturating_sub(1) }
    }

    /// What belongs to the mask, of sizes or of places; a scalar, which is refused, has nothing.
    fn own(&self, size: &[usize]) -> Vec<usize> {
        let shared = self.shared(size);
        size.iter().enumerate().filter(|(d, _)| *d != shared).map(|(_, size)| *size).collect()
    }
}

impl Case for BroadcastDropout {
    fn name(&self) -> &'static str {
        match self.0 {
            First => "broadcast_dropout_first",
            Last => "broadcast_dropout",
            Alpha => "alpha_dropout",
            Words => "embedding_dropout",
        }
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        vec![size.to_vec()]
    }

    fn takes(&self, size: &[usize]) -> bool {
        !size.is_empty()
    }

    fn awkward(&self) -> &'static [&'static [usize]] {
        &[&[2, 3, 4, 5], &[3, 1, 7, 1], &[1, 1, 129], &[5, 600]]
    }

    fn mask_dims(&self, size: &[usize]) -> Option<Vec<usize>> {
        Some(if self.0 == Words { vec![WORDS] } else { self.own(size) })
    }

    fn window(&self, drop: &DropMask, size: &[usize], start: &[usize]) -> DropMask {
        match self.0 {
            Words => drop.clone(),
            _ => drop.window(&self.own(size), &self.own(start)),
        }
    }

    fn constants(&self, size: &[usize], _: DType, device: &Device) -> Result<Vec<Tensor>> {
        if self.0 != Words {
            return Ok(vec![]);
        }
        let dims = self.own(size);
        let ids = (0..dims.iter().product()).map(|i: usize| (i * i % WORDS) as u32).collect();
        Ok(vec![Tensor::from_vec(ids, dims, device)?])
    }

    fn fused(&self, args: &[Tensor], constants: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        let (x, shared) = (&args[0], self.shared(args[0].dims()));
        Ok(vec![match self.0 {
            First | Last => broadcast_dropout(x, shared, drop)?,
            Alpha => alpha_dropout(x, shared, drop)?,
            Words => embedding_dropout(x, &constants[0], drop)?,
        }])
    }

    fn formula(
        &self,
        args: &[Tensor],
        constants: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        let (x, shared) = (&args[0], self.shared(args[0].dims()));
        Ok(vec![match self.0 {
            First | Last => formula::formula(x, keep, shared, scale)?,
            Alpha => formula::alpha(x, keep, shared, scale)?,
            Words => formula::words(x, &constants[0], keep, scale)?,
        }])
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        let x = &args[0];
        let y = || {
            let ones = Tensor::ones((x.dim(0)?, 1), x.dtype(), x.device())?;
            Ok(vec![x.broadcast_mul(&dropout::chain(&ones, drop_p)?)?])
        };
        (self.0 == Last && x.rank() == 2).then(y)
    }

    fn same_bits_but_for(&self) -> Option<&'static [usize]> {
        Some(&[])
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        if self.0 == Last { &[0.1] } else { &[] }
    }

    fn moved(&self, size: &[usize], drop: &DropMask) -> Result<[f64; 2]> {
        let keep = drop.to_tensor(self.own(size), &Device::Cpu)?.to_dtype(DType::F64)?;
        // y, and x where kept; dx, and dy where kept.
        Ok([1. + keep.mean_all()?.to_scalar::<f64>()?; 2])
    }
}
