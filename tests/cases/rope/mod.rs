//! `rope` at positions from 0 on, in both styles.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::{RopeStyle, rope};

pub use formula::formula;

use crate::{Case, Results};

#[derive(Debug)]
struct Rope(RopeStyle);

pub const CASES: &[&dyn Case] = &[&Rope(RopeStyle::HalfSplit), &Rope(RopeStyle::Interleaved)];

impl Case for Rope {
    fn name(&self) -> &'static str {
        match self.0 {
            RopeStyle::HalfSplit => "rope",
            RopeStyle::Interleaved => "rope_interleaved",
        }
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        vec![size.to_vec()]
    }

    fn takes(&self, size: &[usize]) -> bool {
        matches!(size.len(), 2..=4) && size[size.len() - 1].is_multiple_of(2)
    }

    fn awkward(&self) -> &'static [&'static [usize]] {
        &[&[1, 2], &[5, 6], &[3, 7, 34], &[2, 3, 5, 16], &[2, 9, 37, 64]]
    }

    fn mask_dims(&self, _: &[usize]) -> Option<Vec<usize>> {
        None
    }

    fn drop_ps(&self) -> &'static [f32] {
        &[0.]
    }

    /// Cosines and sines, f32 numbers whatever the dtype of x; and the same in its dtype, as candle wants
    /// them and the formula computes.
    fn constants(&self, size: &[usize], dtype: DType, device: &Device) -> Result<Vec<Tensor>> {
        let &[.., t, d] = size else { candle_core::bail!("no positions") };
        let positions = Tensor::arange(0u32, t as u32, &Device::Cpu)?.to_dtype(DType::F64)?;
        let frequencies: Vec<f64> = (0..d / 2).map(|j| 0.9f64.powi(j as i32 % 100)).collect();
        let frequencies = Tensor::from_vec(frequencies, (1, d / 2), &Device::Cpu)?;
        let angles = positions.reshape((t, 1))?.broadcast_mul(&frequencies)?;
        let table = |table: Tensor| table.to_dtype(DType::F32)?.to_device(device);
        let (cos, sin) = (table(angles.cos()?)?, table(angles.sin()?)?);
        let (x_cos, x_sin) = (cos.to_dtype(dtype)?, sin.to_dtype(dtype)?);
        Ok(vec![cos, sin, x_cos, x_sin])
    }

    fn fused(&self, args: &[Tensor], tables: &[Tensor], _: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![rope(&args[0], &tables[0], &tables[1], self.0)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        tables: &[Tensor],
        _: &Tensor,
        _: f64,
    ) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], &tables[2], &tables[3], self.0)?])
    }

    fn chain(&self, args: &[Tensor], tables: &[Tensor], _: f32) -> Results {
        // Candle's fast one ends the graph.
        let y = || candle_nn::rotary_emb::rope_slow(&args[0], &tables[2], &tables[3]);
        (self.0 == RopeStyle::HalfSplit && args[0].rank() == 4).then(|| Ok(vec![y()?]))
    }

    fn same_bits_but_for(&self) -> Option<&'static [usize]> {
        Some(&[])
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        if self.0 == RopeStyle::HalfSplit { &[0.] } else { &[] }
    }

    /// `[B, 4, T, 64]` with at most 128 positions.
    fn bench_size(&self, elements: usize) -> Vec<usize> {
        let t = (elements / 256).clamp(1, 128);
        vec![(elements / (256 * t)).max(1), 4, t, 64]
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // x, y, the tables count nothing; dy, dx.
        Ok([2., 2.])
    }
}
