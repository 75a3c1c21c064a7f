//! What the test files share.

pub mod reference;

use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Numbers between -2 and 2, as a tensor on the CPU.
pub fn random(dims: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let x: Vec<f32> = (0..dims.iter().product()).map(|_| rng.random_range(-2. ..2.)).collect();
    Tensor::from_vec(x, dims, &Device::Cpu)?.to_dtype(dtype)
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
