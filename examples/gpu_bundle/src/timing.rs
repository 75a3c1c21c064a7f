//! How long something takes: many launches between two events (on the CPU: two readings of the clock),
//! many times over, of which the median and the spread count.

use std::collections::VecDeque;

use candle_core::{Device, Result};
use cases::device::{cache_bytes, elapsed_ms};

/// How much time a measurement may take.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// A sample lasts at least this long, if `MAX_LAUNCHES` launches do.
    pub sample_ms: f64,
    pub total_ms: f64,
    pub min_samples: usize,
}

const MAX_LAUNCHES: usize = 200;
const MAX_SAMPLES: usize = 51;

#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// The median of the samples, a launch.
    pub ms: f64,
    /// The first and the third quartile.
    pub ms_low: f64,
    pub ms_high: f64,
    pub samples: usize,
    pub launches: usize,
}

#[derive(Clone, Debug)]
pub struct Timer {
    pub device: Device,
    pub budget: Budget,
}

impl Timer {
    /// Times `run(set)` with the sets of arguments in turn. On CUDA the results of the last turn are kept,
    /// so that the memory written to changes as that read from does; on the CPU, where the allocator would
    /// ask the system for fresh pages, only the latest.
    pub fn time<T>(&self, sets: usize, mut run: impl FnMut(usize) -> Result<T>) -> Result<Timing> {
        let kept = if self.device.is_cuda() { sets } else { 1 };
        let (mut alive, mut set) = (VecDeque::with_capacity(kept), 0);
        let mut launch = || -> Result<()> {
            if alive.len() == kept {
                alive.pop_front();
            }
            alive.push_back(run(set)?);
            set = (set + 1) % sets;
            Ok(())
        };
        let mut sample = |launches: usize| {
            let ms = elapsed_ms(&self.device, || (0..launches).try_for_each(|_| launch()))?;
            Result::Ok(ms / launches as f64)
        };
        // Loads modules, fills the memory pool, wakes threads.
        sample(2)?;
        let once = sample(1)?.max(1e-4);
        let launches = (self.budget.sample_ms / once).ceil().clamp(1., MAX_LAUNCHES as f64);
        let samples = (self.budget.total_ms / (once * launches)) as usize;
        let samples = samples.clamp(self.budget.min_samples, MAX_SAMPLES);
        let launches = launches as usize;
        let mut times = (0..samples).map(|_| sample(launches)).collect::<Result<Vec<_>>>()?;
        times.sort_by(f64::total_cmp);
        let quantile = |q: f64| times[((samples - 1) as f64 * q).round() as usize];
        let (ms, ms_low, ms_high) = (quantile(0.5), quantile(0.25), quantile(0.75));
        Ok(Timing { ms, ms_low, ms_high, samples, launches })
    }

    /// Sets of arguments of `bytes` each that together are several times larger than the last cache, but at most
    /// 64: a few kilobytes stay in it.
    pub fn sets(&self, bytes: usize) -> Result<usize> {
        const CPU_CACHE_BYTES: usize = 32 << 20;
        let cache = cache_bytes(&self.device)?.unwrap_or(CPU_CACHE_BYTES);
        Ok((4 * cache).div_ceil(bytes.max(1)).clamp(1, 64))
    }
}
