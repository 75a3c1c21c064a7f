//! A build without CUDA. Twin of `cuda.rs`.

use candle_core::{Device, Result, bail};

pub fn open() -> Result<Device> {
    bail!("this program was built without CUDA; build it with --features cuda")
}

pub fn name(_: &Device) -> Result<Option<String>> {
    Ok(None)
}

pub fn cache_bytes(_: &Device) -> Result<Option<usize>> {
    Ok(None)
}

pub fn memory_bytes(_: &Device) -> Result<Option<usize>> {
    Ok(None)
}

pub fn elapsed_ms(_: &Device, _: impl FnMut() -> Result<()>) -> Result<Option<f64>> {
    Ok(None)
}

pub fn forget_peak(_: &Device) -> Result<()> {
    Ok(())
}

pub fn used_and_peak(_: &Device) -> Result<Option<(u64, u64)>> {
    Ok(None)
}
