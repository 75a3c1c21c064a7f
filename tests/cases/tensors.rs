//! Tensors, masks, errors.

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::{DropMask, MaskKey, Rate};
use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng};

pub const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// Numbers between -2 and 2, as a tensor on the CPU.
pub fn random(dims: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let x: Vec<f32> = (0..dims.iter().product()).map(|_| rng.random_range(-2. ..2.)).collect();
    Tensor::from_vec(x, dims, &Device::Cpu)?.to_dtype(dtype)
}

/// The mask of tests at a rate.
pub fn mask(drop_p: f32) -> DropMask {
    DropMask::new(drop_p, MaskKey::derive(42, 7)).expect("a rate")
}

/// The scale of what is kept. Nothing is kept at a scale of 0, and candle ends the graph at a
/// multiplication by 0.
pub fn drop_scale(drop: &DropMask) -> f64 {
    match drop.rate() {
        Rate::DROP_ALL => 1.,
        rate => f64::from(rate.scale()),
    }
}

/// The elements of a tensor, bit for bit.
pub fn bits(x: &Tensor) -> Result<Vec<u64>> {
    let x = x.flatten_all()?;
    Ok(match x.dtype() {
        DType::U8 => x.to_vec1::<u8>()?.into_iter().map(u64::from).collect(),
        DType::F16 => x.to_vec1::<f16>()?.iter().map(|x| x.to_bits().into()).collect(),
        DType::BF16 => x.to_vec1::<bf16>()?.iter().map(|x| x.to_bits().into()).collect(),
        DType::F32 => x.to_vec1::<f32>()?.iter().map(|x| x.to_bits().into()).collect(),
        _ => x.to_vec1::<f64>()?.iter().map(|x| x.to_bits()).collect(),
    })
}

/// The largest difference of two tensors in f64; infinite if one is no number where the other is.
pub fn error(a: &Tensor, b: &Tensor) -> Result<f64> {
    assert_eq!(a.dims(), b.dims());
    let differences = (a - b)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(differences.iter().fold(0., |worst, d| match d.is_nan() {
        true => f64::INFINITY,
        false => d.abs().max(worst),
    }))
}

/// The largest absolute value of a tensor in f64.
pub fn largest(x: &Tensor) -> Result<f64> {
    error(x, &x.zeros_like()?)
}

/// The distance from 1 to the next number; for f64, whose naive formula is the reference itself, that
/// of a sum of 65,537 terms in another order.
pub fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 256. * f64::EPSILON,
        DType::F32 => f64::from(f32::EPSILON),
        DType::F16 => f64::from(f16::EPSILON),
        _ => f64::from(bf16::EPSILON),
    }
}
