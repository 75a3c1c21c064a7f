//! `gaussian`: noise that multiplies, noise that is added, samples of a distribution. Its numbers follow from key and
//! window of a mask; its rate has no part in them.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{Device, Result, Tensor};
use candle_dropout::functional::{gaussian_dropout, gaussian_noise, reparameterize};
use candle_dropout::{DropMask, NoiseKey};

pub use formula::formula;

use crate::Case;

#[derive(Debug)]
enum Gaussian {
    Dropout,
    Noise,
    Reparameterize,
}

pub const CASES: &[&dyn Case] = &[&Gaussian::Dropout, &Gaussian::Noise, &Gaussian::Reparameterize];

const STD: f64 = 0.5;

impl Case for Gaussian {
    fn name(&self) -> &'static str {
        match self {
            Self::Dropout => "gaussian_dropout",
            Self::Noise => "gaussian_noise",
            Self::Reparameterize => "reparameterize",
        }
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        vec![size.to_vec(); if matches!(self, Self::Reparameterize) { 2 } else { 1 }]
    }

    fn drop_ps(&self) -> &'static [f32] {
        &[0.5]
    }

    fn keep(&self, size: &[usize], drop: &DropMask) -> Result<Tensor> {
        NoiseKey::from(drop).to_tensor(size, &Device::Cpu)
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        let noise = Some(&NoiseKey::from(drop));
        Ok(vec![match self {
            Self::Dropout => gaussian_dropout(&args[0], STD, noise)?,
            Self::Noise => gaussian_noise(&args[0], STD, noise)?,
            Self::Reparameterize => reparameterize(&args[0], &args[1], noise)?,
        }])
    }

    fn formula(&self, args: &[Tensor], _: &[Tensor], z: &Tensor, _: f64) -> Result<Vec<Tensor>> {
        Ok(vec![match self {
            Self::Dropout => formula(&args[0], Some(&args[0]), z, STD)?,
            Self::Noise => formula(&args[0], None, z, STD)?,
            Self::Reparameterize => formula(&args[0], Some(&args[1]), z, 1.)?,
        }])
    }

    fn same_bits_but_for(&self) -> Option<&'static [usize]> {
        Some(&[])
    }
}
