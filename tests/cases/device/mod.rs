//! What a device tells beside its results: its name, its memory, the time between two events.

#[cfg_attr(not(feature = "cuda"), path = "no_cuda.rs")]
mod cuda;

use std::time::Instant;

use candle_core::{Device, Result};

pub use cuda::{cache_bytes, forget_peak, memory_bytes, name, open, used_and_peak};

/// How long `work` takes: between two events around what it launches, all earlier work done by then; on the
/// CPU by the clock.
pub fn elapsed_ms(device: &Device, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    if let Some(ms) = cuda::elapsed_ms(device, &mut work)? {
        return Ok(ms);
    }
    let begin = Instant::now();
    work()?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}
