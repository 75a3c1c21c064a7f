//! The fused ops against candle's own chains, a plain copy and a plain addition, on the CPU in f32.
//!
//! ```text
//! cargo bench --bench fused_vs_unfused                                  # 16M elements
//! BENCH_ELEMENTS=65536 cargo bench --bench fused_vs_unfused -- --quick  # does it still run?
//! ```
//!
//! Every op returns a fresh tensor, and the page faults of a fresh 64 MB cost more than the arithmetic.
//! `plain_copy` and `plain_add` write to one warm buffer instead; to compare the inner loops alone,
//! have malloc reuse warm memory too: `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000`.
//!
//! Throughput counts the bytes that have to move: each input read and each output written once; of
//! attention, whose arithmetic is the limit, multiply-adds.

use std::hint::black_box;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_dropout::{
    AttentionConfig, AttentionMask, CrossEntropyConfig, DropMask, MaskKey, Rope, RopeConfig,
    StochasticDepth, attention, cross_entropy, drop_path_add, drop_path_kept, dropout, dropout_add,
    softmax_dropout,
};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rayon::prelude::*;

#[allow(dead_code)]
#[path = "../tests/common/reference.rs"]
mod reference;

const DROP_P: f32 = 0.1;
const COLS: usize = 1024;
const SCALE: f64 = 0.125;

fn rows() -> usize {
    let elements = std::env::var("BENCH_ELEMENTS").map_or(1 << 24, |n| n.parse().unwrap());
    (elements / COLS).max(1)
}

fn random(seed: u64) -> Var {
    let mut rng = StdRng::seed_from_u64(seed);
    let x = (0..rows() * COLS).map(|_| rng.random_range(-2f32..2.)).collect();
    Var::from_tensor(&Tensor::from_vec(x, (rows(), COLS), &Device::Cpu).unwrap()).unwrap()
}

fn mask() -> DropMask {
    DropMask::new(DROP_P, MaskKey::new(42)).unwrap()
}

/// Times a closure; its result, dropped within the timed region as in use, cannot be optimised away.
fn time<T>(
    group: &mut BenchmarkGroup<WallTime>,
    name: &str,
    bytes_per_element: usize,
    mut run: impl FnMut() -> T,
) {
    group.throughput(Throughput::Bytes((rows() * COLS * bytes_per_element) as u64));
    group.bench_function(name, |bencher| bencher.iter(|| black_box(run())));
}

/// The largest absolute value.
fn largest(x: &Tensor) -> f32 {
    let largest = || x.abs()?.flatten_all()?.max(D::Minus1)?.to_scalar();
    largest().unwrap()
}

/// Panics unless all elements of two tensors agree to 1e-5 of the largest.
fn assert_close(ours: &Tensor, exact: &Tensor) {
    let error = largest(&(ours - exact).unwrap());
    assert!(error <= 1e-5 * largest(exact), "off by {error}");
}

/// Checks an op and its gradient against the naive formula with the same mask, and that candle's chain,
/// whose mask is its own, agrees in the mean absolute value; then times both, forward and forward with
/// backward.
fn compare(
    c: &mut Criterion,
    name: &str,
    bytes_per_element: (usize, usize),
    x: &Var,
    fused: impl Fn() -> Result<Tensor>,
    unfused: impl Fn() -> Result<Tensor>,
    naive: impl Fn(&Tensor, f64) -> Result<Tensor>,
) {
    let keep = mask().to_tensor(x.shape(), &Device::Cpu).unwrap();
    let exact = naive(&keep, f64::from(mask().rate().scale())).unwrap();
    let ours = fused().unwrap();
    assert_close(&ours, &exact);
    let gradient = |y: &Tensor| y.sqr().unwrap().backward().unwrap().get(x).unwrap().clone();
    assert_close(&gradient(&ours), &gradient(&exact));
    let size = |y: &Tensor| y.abs().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    let ratio = size(&unfused().unwrap()) / size(&ours);
    assert!((ratio - 1.).abs() < 0.01, "candle's chain computes something else: {ratio}");

    let mut group = c.benchmark_group(name);
    let (forward, backward) = bytes_per_element;
    time(&mut group, "fused/forward", forward, || fused().unwrap());
    time(&mut group, "candle/forward", forward, || unfused().unwrap());
    time(&mut group, "fused/forward_backward", forward + backward, || {
        fused().unwrap().backward().unwrap()
    });
    time(&mut group, "candle/forward_backward", forward + backward, || {
        unfused().unwrap().backward().unwrap()
    });
    group.finish();
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

fn add(c: &mut Criterion) {
    let (x, residual) = (random(1).as_detached_tensor(), random(2).as_detached_tensor());
    let sum = (&x + &residual).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let elements = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (x_elements, residual_elements) = (elements(&x), elements(&residual));
    let mut y = vec![1f32; sum.len()];
    let mut group = c.benchmark_group("add");
    let copy = |x: &[f32], _: &[f32], y: &mut [f32]| y.copy_from_slice(x);
    in_chunks(&x_elements, &residual_elements, &mut y, copy);
    assert_eq!(y, x_elements);
    time(&mut group, "plain_copy", 8, || in_chunks(&x_elements, &residual_elements, &mut y, copy));
    let add = |x: &[f32], residual: &[f32], y: &mut [f32]| {
        for ((x, residual), y) in x.iter().zip(residual).zip(y) {
            *y = x + residual;
        }
    };
    in_chunks(&x_elements, &residual_elements, &mut y, add);
    assert_eq!(y, sum);
    time(&mut group, "plain_add", 12, || in_chunks(&x_elements, &residual_elements, &mut y, add));
    time(&mut group, "candle", 12, || (&x + &residual).unwrap());
    group.finish();
}

fn dropouts(c: &mut Criterion) {
    let (x, residual) = (random(1), random(2));
    let candle = candle_nn::Dropout::new(DROP_P);
    compare(
        c,
        "dropout",
        (8, 8),
        &x,
        || dropout(&x, &mask()),
        || candle.forward(&x, true),
        |keep, drop_scale| reference::dropout(&x, keep, drop_scale),
    );
    compare(
        c,
        "dropout_add",
        (12, 8),
        &x,
        || dropout_add(&x, &residual, None, &mask()),
        || residual.as_tensor() + candle.forward(&x, true)?,
        |keep, drop_scale| reference::dropout_add(&x, &residual, None, keep, drop_scale),
    );
    compare(
        c,
        "softmax_dropout",
        (8, 12),
        &x,
        || softmax_dropout(&x, SCALE, &AttentionMask::None, &mask()),
        || candle.forward(&candle_nn::ops::softmax(&(x.as_tensor() * SCALE)?, D::Minus1)?, true),
        |keep, drop_scale| {
            reference::softmax_dropout(&x, SCALE, &AttentionMask::None, keep, drop_scale)
        },
    );
}

/// Attention in one op against its scores materialised around `softmax_dropout`, causal and not.
fn attentions(c: &mut Criterion) {
    // [B, H, S, D]; so few elements mean that the bench is only to run.
    let shapes: &[[usize; 4]] = match rows() >= 1 << 10 {
        true => &[[4, 8, 256, 64], [1, 8, 1024, 64], [1, 4, 2048, 64], [1, 4, 1024, 128]],
        false => &[[1, 2, 64, 32]],
    };
    for dims in shapes {
        let var = |seed| {
            let mut rng = StdRng::seed_from_u64(seed);
            let x = (0..dims.iter().product()).map(|_| rng.random_range(-2f32..2.)).collect();
            Var::from_tensor(&Tensor::from_vec(x, &dims[..], &Device::Cpu).unwrap()).unwrap()
        };
        let (q, k, v) = (var(1), var(2), var(3));
        for (causal, drop_p) in [(false, 0.), (false, DROP_P), (true, 0.), (true, DROP_P)] {
            let drop = DropMask::new(drop_p, MaskKey::new(42)).unwrap();
            let fused = || {
                let config = AttentionConfig { causal, ..Default::default() };
                attention(&q, &k, &v, &config, &drop)
            };
            let materialised = || {
                let mask = if causal { AttentionMask::Causal } else { AttentionMask::None };
                let scale = 1. / (dims[3] as f64).sqrt();
                softmax_dropout(&q.matmul(&k.t()?)?, scale, &mask, &drop)?.matmul(&v)
            };
            let gradient =
                |y: &Tensor| y.sqr().unwrap().backward().unwrap().get(&k).unwrap().clone();
            let (ours, exact) = (fused().unwrap(), materialised().unwrap());
            assert_close(&ours, &exact);
            assert_close(&gradient(&ours), &gradient(&exact));

            let of = if causal { "causal" } else { "full" };
            let mut group = c.benchmark_group(format!("attention/{dims:?}/{of}/drop_p {drop_p}"));
            // Throughput: multiply-adds of the two products of the forward pass, and of the five of backward.
            let products = dims.iter().product::<usize>() as u64 * dims[2] as u64 * 2;
            let products = products / if causal { 2 } else { 1 };
            let mut time = |name: &str, products, run: &dyn Fn()| {
                group.throughput(Throughput::Elements(products));
                group.bench_function(name, |bencher| bencher.iter(run));
            };
            let backward = |y: Result<Tensor>| drop_of(y.unwrap().backward().unwrap());
            time("fused/forward", products, &|| drop_of(fused().unwrap()));
            time("materialised/forward", products, &|| drop_of(materialised().unwrap()));
            time("fused/forward_backward", products * 7 / 2, &|| backward(fused()));
            time("materialised/forward_backward", products * 7 / 2, &|| backward(materialised()));
            group.finish();
        }
    }
}

/// Drops a result that must have been computed.
fn drop_of<T>(result: T) {
    black_box(result);
}

/// Times a closure that moves so many bytes.
fn time_bytes<T>(
    group: &mut BenchmarkGroup<WallTime>,
    name: &str,
    bytes: usize,
    mut run: impl FnMut() -> T,
) {
    group.throughput(Throughput::Bytes(bytes as u64));
    group.bench_function(name, |bencher| bencher.iter(|| black_box(run())));
}

/// Output and gradient, checked against each other, then timed.
fn compare_exactly(
    c: &mut Criterion,
    name: &str,
    x: &Var,
    [forward, backward]: [usize; 2],
    fused: impl Fn() -> Result<Tensor>,
    candle: impl Fn() -> Result<Tensor>,
) {
    let gradient = |y: Tensor| y.sqr().unwrap().backward().unwrap().get(x).unwrap().clone();
    let (ours, theirs) = (fused().unwrap(), candle().unwrap());
    assert_close(&ours, &theirs);
    assert_close(&gradient(ours), &gradient(theirs));
    let mut group = c.benchmark_group(name);
    time_bytes(&mut group, "fused/forward", forward, || fused().unwrap());
    time_bytes(&mut group, "candle/forward", forward, || candle().unwrap());
    let both = forward + backward;
    time_bytes(&mut group, "fused/forward_backward", both, || fused().unwrap().backward().unwrap());
    time_bytes(&mut group, "candle/forward_backward", both, || {
        candle().unwrap().backward().unwrap()
    });
    group.finish();
}

/// Queries of 8 heads of 64 elements at 128 positions. Candle's fast `rope` has no backward pass, its
/// `rope_slow` has.
fn ropes(c: &mut Criterion) {
    const DIMS: [usize; 3] = [8, 128, 64];
    let x = random(1).flatten_all().unwrap();
    let batch = (x.elem_count() / DIMS.iter().product::<usize>()).max(1);
    let elements = batch * DIMS.iter().product::<usize>();
    let x = x.narrow(0, 0, elements.min(x.elem_count())).unwrap();
    let x = x.reshape((batch, DIMS[0], DIMS[1], DIMS[2])).unwrap();
    let x = Var::from_tensor(&x).unwrap();
    let config = RopeConfig { head_size: DIMS[2], max_positions: DIMS[1], ..Default::default() };
    let table = Rope::new(&config, DType::F32, &Device::Cpu).unwrap();
    compare_exactly(
        c,
        "rope",
        &x,
        [8 * elements; 2],
        || table.rotate(&x, 0),
        || candle_nn::rotary_emb::rope_slow(&x, table.cos(), table.sin()),
    );
    let mut group = c.benchmark_group("rope");
    time_bytes(&mut group, "candle_without_backward/forward", 8 * elements, || {
        candle_nn::rotary_emb::rope(&x, table.cos(), table.sin()).unwrap()
    });
    group.finish();
}

/// A small vocabulary and GPT-2's.
fn cross_entropies(c: &mut Criterion) {
    for classes in [96, 50_257] {
        let x = random(1).flatten_all().unwrap();
        let rows = x.elem_count() / classes;
        let x = x.narrow(0, 0, rows * classes).unwrap().reshape((rows, classes)).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let target = |row: usize| (row * 7919 % classes) as u32;
        let targets: Vec<u32> = (0..rows).map(target).collect();
        let targets = Tensor::from_vec(targets, rows, &Device::Cpu).unwrap();
        let config = CrossEntropyConfig::default();
        compare_exactly(
            c,
            &format!("cross_entropy/{classes}"),
            &x,
            [4 * rows * classes, 8 * rows * classes],
            || cross_entropy(&x, &targets, &config),
            || candle_nn::loss::cross_entropy(&x, &targets),
        );
    }
}

/// An MLP under stochastic depth per sample, all samples computed and masked or the kept ones alone.
fn kept_samples(c: &mut Criterion) {
    const SAMPLES: usize = 64;
    let t = (rows() / SAMPLES / 4).clamp(1, 64);
    let c_embd = 256;
    let weight = |rows: usize, cols: usize, seed| {
        let mut rng = StdRng::seed_from_u64(seed);
        let w: Vec<f32> = (0..rows * cols).map(|_| rng.random_range(-0.1..0.1)).collect();
        Var::from_tensor(&Tensor::from_vec(w, (rows, cols), &Device::Cpu).unwrap()).unwrap()
    };
    let x = weight(SAMPLES * t, c_embd, 1).reshape((SAMPLES, t, c_embd)).unwrap();
    let x = Var::from_tensor(&x).unwrap();
    let (up, down) = (weight(c_embd, 4 * c_embd, 2), weight(4 * c_embd, c_embd, 3));
    let branch = |x: &Tensor| -> Result<Tensor> {
        let (b, t, c) = x.dims3()?;
        x.reshape((b * t, c))?.matmul(&up)?.relu()?.matmul(&down)?.reshape((b, t, c))
    };
    for drop_p in [0.1, 0.4] {
        let drop = DropMask::new(drop_p, MaskKey::new(42)).unwrap();
        let row = StochasticDepth::Row;
        let kept = || drop_path_kept(&x, &x, row, &drop, branch);
        let masked = || drop_path_add(&branch(&x)?, &x, row, &drop);
        let gradient = |y: Tensor| y.sqr().unwrap().backward().unwrap().get(&x).unwrap().clone();
        assert_close(&kept().unwrap(), &masked().unwrap());
        assert_close(&gradient(kept().unwrap()), &gradient(masked().unwrap()));
        let mut group = c.benchmark_group(format!("drop_path_kept/{drop_p}"));
        group.bench_function("kept/forward", |b| b.iter(|| kept().unwrap()));
        group.bench_function("masked/forward", |b| b.iter(|| masked().unwrap()));
        group.bench_function("kept/forward_backward", |b| {
            b.iter(|| kept().unwrap().backward().unwrap())
        });
        group.bench_function("masked/forward_backward", |b| {
            b.iter(|| masked().unwrap().backward().unwrap())
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = add, dropouts, attentions, ropes, cross_entropies, kept_samples
}
criterion_main!(benches);
