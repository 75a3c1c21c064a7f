//! Every op in one piece against candle's own chain, or where it has none against smaller ops of this crate,
//! beside a plain copy and a plain addition: on the CPU in f32, and on the first CUDA device there is in f32
//! and bf16, timed between two events.
//!
//! ```text
//! cargo bench --bench fused_vs_unfused                                  # 16M elements
//! cargo bench --features cuda --bench fused_vs_unfused -- cuda          # the GPU alone
//! BENCH_ELEMENTS=65536 cargo bench --bench fused_vs_unfused -- --quick  # does it still run?
//! ```
//!
//! Every op returns a fresh tensor, and on the CPU the page faults of a fresh 64 MB cost more than the
//! arithmetic. `plain_copy` and `plain_add` write to one warm buffer instead; to compare the inner loops
//! alone, have malloc reuse warm memory too: `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000`.
//!
//! Throughput counts the bytes that have to move: each input read and each output written once; of what
//! arithmetic limits, floating-point operations.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{DType, Device, Result, Tensor, Var};
use cases::runner::disagreements;
use cases::{Case, View, check_chain, device, mask, random};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use rayon::prelude::*;

fn elements() -> usize {
    std::env::var("BENCH_ELEMENTS").map_or(1 << 24, |n| n.parse().unwrap())
}

/// Times a call on a device; its result, dropped within the timed region as in use, cannot be optimised away.
fn time<T>(
    group: &mut BenchmarkGroup<WallTime>,
    name: &str,
    (device, throughput): (&Device, &Throughput),
    run: impl Fn() -> Result<T>,
) {
    group.throughput(throughput.clone());
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|launches| {
            let all = || (0..launches).try_for_each(|_| run().map(|y| drop(black_box(y))));
            Duration::from_secs_f64(device::elapsed_ms(device, all).unwrap() / 1e3)
        })
    });
}

/// A call in one of its forms.
type Call<'a> = Box<dyn Fn(&[Tensor]) -> Result<Vec<Tensor>> + 'a>;

/// Checks a case against its formula, on a small tensor like the one that is timed, and candle's chain against
/// the fused call; then times both, forward and forward with backward.
fn compare(c: &mut Criterion, case: &dyn Case, dtype: DType, device: &Device) {
    let Some(&drop_p) = case.bench_drop_ps().last() else { return };
    let small = case.bench_size(1 << 12);
    let devices = std::slice::from_ref(device);
    let wrong = disagreements(case, &small, View::Contiguous, drop_p, dtype, devices).unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    let is_limited_by_arithmetic = case.flop(&small).is_some();
    // Two cores and a large product would take minutes.
    let less = if is_limited_by_arithmetic && !device.is_cuda() { 32 } else { 1 };
    let size = case.bench_size(elements() / less);
    let drop = mask(drop_p);
    let constants = case.constants(&size, dtype, device).unwrap();
    let (x, throughput) = arguments(case, &size, dtype, device);
    let mut forms: Vec<(&str, Call)> =
        vec![("fused", Box::new(|x| case.fused(x, &constants, &drop)))];
    if let Some(theirs) = case.chain(&x, &constants, drop_p) {
        let ours = case.fused(&x, &constants, &drop).unwrap();
        check_chain(case, &size, drop_p, &ours[0], &theirs.unwrap()[0]).unwrap();
        forms.push(("candle", Box::new(|x| case.chain(x, &constants, drop_p).unwrap())));
    }
    if case.composed(&x, &constants, &drop).is_some() {
        forms.push(("composed", Box::new(|x| case.composed(x, &constants, &drop).unwrap())));
    }

    let mut group = c.benchmark_group(on(device, dtype, case.name()));
    if is_limited_by_arithmetic {
        group.sample_size(10);
    }
    let [forward, both] = throughput;
    for (name, call) in &forms {
        let detached: Vec<_> = x.iter().map(Tensor::detach).collect();
        time(&mut group, &format!("{name}/forward"), (device, &forward), || call(&detached));
        let back = || call(&x)?[0].backward();
        time(&mut group, &format!("{name}/forward_backward"), (device, &both), back);
    }
    group.finish();
}

/// Random variables, and what a call forward, and one forward and backward, gets through.
fn arguments(
    case: &dyn Case,
    size: &[usize],
    dtype: DType,
    device: &Device,
) -> (Vec<Tensor>, [Throughput; 2]) {
    let dims = case.arguments(size);
    let variable = |(i, dims): (usize, &Vec<usize>)| -> Result<Tensor> {
        Ok(Var::from_tensor(&random(dims, dtype, i as u64)?.to_device(device)?)?.into_inner())
    };
    let x: Vec<_> = dims.iter().enumerate().map(|x| variable(x).unwrap()).collect();
    let throughput = match case.flop(size) {
        Some([forward, backward]) => {
            [forward, forward + backward].map(|flop| Throughput::Elements(flop as u64))
        }
        None => {
            let [forward, backward] = case.moved(size, &mask(0.1)).unwrap();
            let x_bytes = (x[0].elem_count() * dtype.size_in_bytes()) as f64;
            [forward, forward + backward].map(|moved| Throughput::Bytes((moved * x_bytes) as u64))
        }
    };
    (x, throughput)
}

/// On the CPU there is one dtype.
fn on(device: &Device, dtype: DType, name: &str) -> String {
    if device.is_cuda() { format!("cuda/{}/{name}", dtype.as_str()) } else { name.into() }
}

/// Calls `f(x, residual, y)` on chunks, with all threads.
fn in_chunks(
    x: &[f32],
    residual: &[f32],
    y: &mut [f32],
    f: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
) {
    const CHUNK: usize = 1 << 14;
    y.par_chunks_mut(CHUNK)
        .zip(x.par_chunks(CHUNK).zip(residual.par_chunks(CHUNK)))
        .for_each(|(y, (x, residual))| f(x, residual, y));
}

/// What candle makes of a copy and of an addition.
fn copy_and_add(c: &mut Criterion, dtype: DType, device: &Device) {
    let x = |seed| random(&[elements()], dtype, seed).unwrap().to_device(device).unwrap();
    let (x, residual) = (x(1), x(2));
    let bytes = |tensors: usize| {
        Throughput::Bytes((tensors * x.elem_count() * dtype.size_in_bytes()) as u64)
    };
    let mut group = c.benchmark_group(on(device, dtype, "add"));
    time(&mut group, "candle_copy", (device, &bytes(2)), || x.copy());
    time(&mut group, "candle", (device, &bytes(3)), || &x + &residual);
    group.finish();
}

fn plain_copy_and_add(c: &mut Criterion) {
    let x = |seed| random(&[elements()], DType::F32, seed).unwrap().to_vec1::<f32>().unwrap();
    let (x, residual) = (x(1), x(2));
    let y = std::cell::RefCell::new(vec![1f32; x.len()]);
    let bytes = |tensors: usize| Throughput::Bytes((4 * tensors * x.len()) as u64);
    let mut group = c.benchmark_group("add");
    let copy = |x: &[f32], _: &[f32], y: &mut [f32]| y.copy_from_slice(x);
    let add = |x: &[f32], residual: &[f32], y: &mut [f32]| {
        for ((x, residual), y) in x.iter().zip(residual).zip(y) {
            *y = x + residual;
        }
    };
    let copied = || {
        in_chunks(&x, &residual, &mut y.borrow_mut(), copy);
        Ok(())
    };
    let added = || {
        in_chunks(&x, &residual, &mut y.borrow_mut(), add);
        Ok(())
    };
    copied().unwrap();
    assert_eq!(*y.borrow(), x);
    time(&mut group, "plain_copy", (&Device::Cpu, &bytes(2)), copied);
    added().unwrap();
    assert!(y.borrow().iter().zip(x.iter().zip(&residual)).all(|(y, (a, b))| *y == a + b));
    time(&mut group, "plain_add", (&Device::Cpu, &bytes(3)), added);
    group.finish();
}

fn every_op(c: &mut Criterion) {
    plain_copy_and_add(c);
    let mut places = vec![(Device::Cpu, DType::F32)];
    match device::open() {
        Ok(cuda) => places.extend([DType::F32, DType::BF16].map(|dtype| (cuda.clone(), dtype))),
        // The first line: candle may add a backtrace.
        Err(error) => {
            eprintln!("on the CPU alone: {}", error.to_string().lines().next().unwrap_or_default())
        }
    }
    for (device, dtype) in places {
        copy_and_add(c, dtype, &device);
        for case in cases::cases() {
            compare(c, case, dtype, &device);
        }
    }
}

criterion_group!(benches, every_op);
criterion_main!(benches);
