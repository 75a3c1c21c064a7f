//! Peak memory of a training step, fused, unfused, and with candle's own dropout, and of each op.
//!
//! On the CPU an allocator counts; on CUDA the device's memory pool does, in which all tensors lie.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use cases::runner::arguments;
use cases::{device, mask};
use serde::Serialize;

use crate::step::{FORMS, Step, size};
use crate::{Common, kept, results};

struct Counting;

static USED: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: usize) {
    let used = USED.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
    PEAK.fetch_max(used, Ordering::Relaxed);
}

fn discount(bytes: usize) {
    USED.fetch_sub(bytes as u64, Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator with the arguments given; the rest counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        discount(layout.size());
        // SAFETY: the caller's.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        discount(layout.size());
        // SAFETY: the caller's.
        unsafe { System.dealloc(memory, layout) }
    }
}

pub fn forget_peak(device: &Device) -> Result<()> {
    PEAK.store(USED.load(Ordering::Relaxed), Ordering::Relaxed);
    Ok(device::forget_peak(device)?)
}

/// Bytes in use, now and at most since `forget_peak`.
pub fn used_and_peak(device: &Device) -> Result<(u64, u64)> {
    Ok(device::used_and_peak(device)?
        .unwrap_or((USED.load(Ordering::Relaxed), PEAK.load(Ordering::Relaxed))))
}

#[derive(Debug, Serialize)]
struct Peak {
    library: &'static str,
    variant: &'static str,
    drop_p: f32,
    /// Weights, the optimizer's state and the batch.
    before_bytes: u64,
    /// What the graph holds on to between forward and backward, beyond that.
    graph_bytes: u64,
    /// The most during the step, beyond that.
    step_bytes: u64,
}

pub fn run(args: &Common, device: &Device) -> Result<bool> {
    let begin = Instant::now();
    let (config, batch) = size(args.small, device);
    let mut peaks = Vec::new();
    for drop_p in [0., 0.1] {
        for form in FORMS {
            let mut step = Step::new(form, &(config.clone(), batch), drop_p, DType::F32, device)?;
            // Scratch memory and modules that stay belong to no step.
            step.run()?;
            forget_peak(device)?;
            let (before, _) = used_and_peak(device)?;
            let loss = step.loss()?;
            let (graph, _) = used_and_peak(device)?;
            step.apply(&loss)?;
            let (_, peak) = used_and_peak(device)?;
            let [library, variant] = form.names();
            let (graph_bytes, step_bytes) =
                (graph.saturating_sub(before), peak.saturating_sub(before));
            let before_bytes = before;
            peaks.push(Peak { library, variant, drop_p, before_bytes, graph_bytes, step_bytes });
        }
    }
    let branches = branches(args.small, device)?;
    let ops = ops(args.small, device)?;
    let mut markdown = markdown(&config, batch, &peaks)?;
    write_branches(&mut markdown, &branches)?;
    write_ops(&mut markdown, &ops)?;
    let seconds = begin.elapsed().as_secs_f64();
    let data = serde_json::json!({
        "small": args.small, "peaks": peaks, "branches": branches, "ops": ops
    });
    let json = results::write_section(&args.out, device, "memory", seconds, &markdown, data)?;
    results::print_section(&json, &markdown);
    Ok(true)
}

/// What `forward` and backward from its result hold and need beyond what is there before.
fn peak(
    device: &Device,
    [library, variant]: [&'static str; 2],
    drop_p: f32,
    forward: impl Fn() -> candle_core::Result<Tensor>,
) -> Result<Peak> {
    // Scratch memory and modules that stay belong to no call.
    forward()?.backward()?;
    forget_peak(device)?;
    let (before_bytes, _) = used_and_peak(device)?;
    let y = forward()?;
    let (graph, _) = used_and_peak(device)?;
    y.backward()?;
    let (_, most) = used_and_peak(device)?;
    let [graph_bytes, step_bytes] = [graph, most].map(|bytes| bytes.saturating_sub(before_bytes));
    Ok(Peak { library, variant, drop_p, before_bytes, graph_bytes, step_bytes })
}

/// A residual branch under stochastic depth.
fn branches(small: bool, device: &Device) -> Result<Vec<Peak>> {
    let branch = kept::Branch::new(DType::F32, small, device)?;
    let mut peaks = Vec::new();
    for drop_p in kept::DROP_PS {
        for form in kept::FORMS {
            peaks.push(peak(device, form.names(), drop_p, || branch.forward(form, drop_p))?);
        }
    }
    Ok(peaks)
}

/// An op and its size.
#[derive(Debug, Serialize)]
struct OfOp {
    op: &'static str,
    size: Vec<usize>,
    #[serde(flatten)]
    peak: Peak,
}

/// Every op that is measured, at the highest of its rates, and candle's chain.
fn ops(small: bool, device: &Device) -> Result<Vec<OfOp>> {
    let mut peaks = Vec::new();
    for case in cases::cases() {
        let size = case.bench_size(if small { 1 << 12 } else { 1 << 20 });
        let Some(&drop_p) = case.bench_drop_ps().last() else { continue };
        let (constants, drop) = (case.constants(&size, DType::F32, device)?, mask(drop_p));
        let vars = arguments(case, &size, DType::F32)?
            .iter()
            .map(|x| Var::from_tensor(&x.to_device(device)?))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let args: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let mut add = |names, forward: &dyn Fn() -> candle_core::Result<Tensor>| -> Result<()> {
            let peak = peak(device, names, drop_p, forward)?;
            peaks.push(OfOp { op: case.name(), size: size.clone(), peak });
            Ok(())
        };
        let fused = || Ok(case.fused(&args, &constants, &drop)?.remove(0));
        add(["candle-dropout", "fused"], &fused)?;
        if case.chain(&args, &constants, drop_p).is_some() {
            let chain = || match case.chain(&args, &constants, drop_p) {
                Some(results) => Ok(results?.remove(0)),
                None => candle_core::bail!("{case:?} has no chain"),
            };
            add(["candle", "chain"], &chain)?;
        }
    }
    Ok(peaks)
}

fn write_branches(md: &mut String, peaks: &[Peak]) -> Result<()> {
    md.push_str(
        "\nAn MLP as a residual branch under stochastic depth per sample, forward and backward:\n\n\
         | drop p | branch | peak MB | held MB |\n|---|---|---|---|\n",
    );
    for Peak { library, variant, drop_p, graph_bytes, step_bytes, .. } in peaks {
        let [peak, held] = [step_bytes, graph_bytes].map(|bytes| *bytes as f64 / 1e6);
        writeln!(md, "| {drop_p} | {library}, {variant} | {peak:.1} | {held:.1} |")?;
    }
    Ok(())
}

fn write_ops(md: &mut String, peaks: &[OfOp]) -> Result<()> {
    md.push_str(
        "\nEach op forward and backward in f32, beyond its arguments:\n\n\
         | op | size | drop p | | peak MB | held MB |\n|---|---|---|---|---|---|\n",
    );
    for OfOp { op, size, peak } in peaks {
        let Peak { library, variant, drop_p, graph_bytes, step_bytes, .. } = peak;
        let [peak, held] = [step_bytes, graph_bytes].map(|bytes| *bytes as f64 / 1e6);
        writeln!(
            md,
            "| `{op}` | {size:?} | {drop_p} | {library}, {variant} | {peak:.1} | {held:.1} |"
        )?;
    }
    Ok(())
}

fn markdown(
    config: &candle_dropout::TransformerConfig,
    batch: usize,
    peaks: &[Peak],
) -> Result<String> {
    let mut md = format!(
        "A training step (AdamW, f32) of a GPT with {} layers, width {}, {} heads on {batch} x {} \
         tokens; MB of 10^6 bytes beyond weights, optimizer and batch. \"held\" is what the graph \
         keeps between forward and backward.\n\n\
         | drop p | step | peak MB | held MB | held beyond p = 0 |\n|---|---|---|---|---|\n",
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.max_position_embeddings
    );
    for peak in peaks {
        let Peak { library, variant, drop_p, graph_bytes, step_bytes, .. } = peak;
        let is_without =
            |p: &&Peak| p.drop_p == 0. && p.library == *library && p.variant == *variant;
        let without = peaks.iter().find(is_without).map_or(0, |p| p.graph_bytes);
        let mb = |bytes: u64| bytes as f64 / 1e6;
        writeln!(
            md,
            "| {drop_p} | {library}, {variant} | {:.1} | {:.1} | {:.1} |",
            mb(*step_bytes),
            mb(*graph_bytes),
            mb(*graph_bytes) - mb(without)
        )?;
    }
    Ok(md)
}
