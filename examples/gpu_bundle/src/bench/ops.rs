//! Ops that memory limits, beside a plain copy.

use anyhow::{Context, Result};
use candle_core::{DType, Tensor, Var};
use cases::{Case, check_chain, mask, random};

use super::{Bench, check};
use crate::results::Record;
use crate::timing::Timing;

/// Columns of the tensors that a copy is measured with.
const COLS: usize = 1024;

impl Bench<'_> {
    /// A plain copy of x, and each op at each rate.
    pub fn ops(&mut self, dtype: DType, bytes: usize) -> Result<()> {
        let of_size = format!("{dtype:?}, {bytes} bytes");
        self.attempt(&format!("copy, {of_size}"), |bench| bench.copy(dtype, bytes))?;
        let elements = bytes / dtype.size_in_bytes();
        for case in cases::cases() {
            let size = case.bench_size(elements);
            // What arithmetic limits is measured by itself.
            if case.flop(&size).is_some() {
                continue;
            }
            for &drop_p in case.bench_drop_ps() {
                let what = format!("{}, {of_size}, drop p {drop_p}", case.name());
                self.attempt(&what, |bench| bench.op(case, &size, dtype, bytes, drop_p))?;
            }
        }
        Ok(())
    }

    /// Random tensors, from `set`.
    fn random(&self, dims: &[Vec<usize>], dtype: DType, set: usize) -> Result<Vec<Tensor>> {
        let random = |(i, dims): (usize, &Vec<usize>)| -> Result<Tensor> {
            // Small tensors as the tests draw them; large ones on the device, in a second less.
            let device = &self.timer.device;
            if dims.iter().product::<usize>() <= check::WHOLE {
                return Ok(random(dims, dtype, (8 * set + i) as u64)?.to_device(device)?);
            }
            Ok(Tensor::randn(0f32, 1., dims.as_slice(), device)?.to_dtype(dtype)?)
        };
        dims.iter().enumerate().map(random).collect()
    }

    fn copy(&mut self, dtype: DType, bytes: usize) -> Result<()> {
        let dims = vec![bytes / dtype.size_in_bytes() / COLS, COLS];
        let sets = self.timer.sets(2 * bytes)?;
        let x = (0..sets)
            .map(|set| Ok(self.random(std::slice::from_ref(&dims), dtype, set)?.remove(0)))
            .collect::<Result<Vec<_>>>()?;
        // A copy that an op of candle makes, into fresh memory like every op's output.
        let time = || self.timer.time(sets, |set| x[set].copy());
        let (timing, again) = (time()?, time()?);
        let what = ["candle", "chain", "copy", "forward", dtype.as_str()];
        let mut record = Record::new(what, 0., &dims, timing).with_bytes(2. * bytes as f64, None);
        record.again_ms = Some(again.ms);
        self.copies.insert((dtype.as_str(), bytes), record.gb_s.unwrap_or(f64::NAN));
        self.records.push(record);
        Ok(())
    }

    fn op(
        &mut self,
        case: &dyn Case,
        size: &[usize],
        dtype: DType,
        bytes: usize,
        drop_p: f32,
    ) -> Result<()> {
        let (dims, drop, timer) = (case.arguments(size), mask(drop_p), &self.timer);
        let sets = timer.sets((dims.len() + 1) * bytes)?;
        let args =
            (0..sets).map(|set| self.random(&dims, dtype, set)).collect::<Result<Vec<_>>>()?;
        check::check(case, size, &args[0], &drop, dtype).with_context(|| {
            format!("{} in {dtype:?} on {size:?} with drop p {drop_p} is not timed", case.name())
        })?;
        let constants = case.constants(size, dtype, &timer.device)?;
        let fused = |args: &[Tensor]| case.fused(args, &constants, &drop);
        let chain = |args: &[Tensor]| {
            let y = case.chain(args, &constants, drop_p);
            y.unwrap_or_else(|| candle_core::bail!("{case:?} has no chain"))
        };
        let has_chain = case.chain(&args[0], &constants, drop_p).is_some();
        if has_chain {
            check_chain(case, size, drop_p, &fused(&args[0])?[0], &chain(&args[0])?[0])?;
        }

        let [forward, backward] = case.moved(size, &drop)?;
        let elements: usize = dims[0].iter().product();
        let x_bytes = (elements * dtype.size_in_bytes()) as f64;
        let copy = self.copies.get(&(dtype.as_str(), bytes)).copied();
        let record = |[library, variant]: [&str; 2], pass, timing, per_element: f64| {
            let what = [library, variant, case.name(), pass, dtype.as_str()];
            Record::new(what, drop_p, &dims[0], timing).with_bytes(per_element * x_bytes, copy)
        };
        // Ours once more after theirs, for the noise.
        let both = |pass, ours: Timing, theirs: Option<Timing>, again: Timing, per_element| {
            let mut first = record(["candle-dropout", "fused"], pass, ours, per_element);
            first.again_ms = Some(again.ms);
            let other = theirs.map(|time| record(["candle", "chain"], pass, time, per_element));
            std::iter::once(first).chain(other)
        };
        let tracked = args
            .iter()
            .map(|args| args.iter().map(tracked).collect::<candle_core::Result<Vec<_>>>())
            .collect::<candle_core::Result<Vec<_>>>()?;
        let mut records = Vec::new();

        let time = || timer.time(sets, |set| fused(&args[set]));
        let other = || timer.time(sets, |set| chain(&args[set]));
        let (first, other) = (time()?, has_chain.then(other).transpose()?);
        records.extend(both("forward", first, other, time()?, forward));

        let time = || timer.time(sets, |set| fused(&tracked[set])?[0].backward());
        let other = || timer.time(sets, |set| chain(&tracked[set])?[0].backward());
        let (first, other) = (time()?, has_chain.then(other).transpose()?);
        records.extend(both("forward_backward", first, other, time()?, forward + backward));

        let edges = tracked.iter().map(|args| case.edges(args)).collect::<Option<Vec<_>>>();
        if let Some(edges) = edges {
            let edges = edges.into_iter().collect::<candle_core::Result<Vec<_>>>()?;
            let graphs = tracked.iter().map(|args| Ok(fused(args)?.swap_remove(0)));
            let graphs = graphs.collect::<candle_core::Result<Vec<_>>>()?;
            let time = || -> Result<Option<Timing>> {
                let edges = timer.time(sets, |set| edges[set].backward())?;
                let whole = timer.time(sets, |set| graphs[set].backward())?;
                Ok(whole.less(edges))
            };
            // Below the noise there is nothing to report.
            if let (Some(first), Some(again)) = (time()?, time()?) {
                records.extend(both("backward", first, None, again, backward));
            }
        }
        self.records.extend(records);
        Ok(())
    }
}

/// A variable with this value, as a call takes it.
fn tracked(x: &Tensor) -> candle_core::Result<Tensor> {
    Ok(Var::from_tensor(x)?.into_inner())
}

impl Timing {
    /// What is left without `other`; nothing if that lies within the spread of both.
    fn less(self, other: Self) -> Option<Self> {
        let noise = (self.ms_high - self.ms_low) + (other.ms_high - other.ms_low);
        let ms = self.ms - other.ms;
        (ms > noise).then_some(Self {
            ms,
            ms_low: ms - noise / 2.,
            ms_high: ms + noise / 2.,
            ..self
        })
    }
}
