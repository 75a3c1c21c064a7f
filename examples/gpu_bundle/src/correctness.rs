//! Every op on a device against its formula in f64 and against the CPU, by the runner of the tests; the optimiser,
//! too.

use std::fmt::Write;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_dropout::Architecture;
use candle_dropout::functional::dropout;
use cases::runner::{SIZES, disagreements, results};
use cases::{Case, DTYPES, View, attention, bits, cases, mask};
use serde::Serialize;

use crate::Common;
use crate::adamw;
use crate::results::{print_section, write_section};
use crate::step::{Form, Step, check_agree, in_llama_style, size};

/// What was checked, how often, and what failed.
#[derive(Debug, Default, Serialize)]
struct Group {
    fact: &'static str,
    cases: usize,
    failures: Vec<String>,
}

impl Group {
    fn new(fact: &'static str) -> Self {
        Self { fact, ..Self::default() }
    }

    fn check(&mut self, case: impl FnOnce() -> Result<Vec<String>>) {
        self.cases += 1;
        match case() {
            Ok(found) => self.failures.extend(found),
            Err(error) => self.failures.push(format!("{error:#}")),
        }
    }
}

/// Beside those that are awkward for any op: rows of whole vectors, as many as fit into registers and more; a
/// row for each size of a team.
const WHOLE_VECTORS: [&[usize]; 11] = [
    &[8209, 8],
    &[64, 8],
    &[33, 64],
    &[33, 136],
    &[9, 256],
    &[9, 768],
    &[34, 1024],
    &[3, 4096],
    &[3, 8192],
    &[3, 8200],
    &[2, 3, 128, 128],
];

/// One by one of the above: element by element and in vectors, in registers and not.
const SMALL_SHAPES: [&[usize]; 6] =
    [&[7], &[2, 3, 17], &[33, 64], &[5, 1032], &[2, 8200], &[2, 2, 9, 16]];

const VIEWED_SHAPES: [&[usize]; 6] =
    [&[5], &[5, 3], &[2, 3, 17], &[2, 3, 4, 5], &[37, 1031], &[24, 256]];

pub fn run(args: &Common, device: &Device) -> Result<bool> {
    let begin = Instant::now();
    let all = [&SIZES[..], &WHOLE_VECTORS].concat();
    let shapes = if args.small { &SMALL_SHAPES[..] } else { &all };
    let viewed: &[&[usize]] = if args.small { &VIEWED_SHAPES[2..3] } else { &VIEWED_SHAPES };
    let drop_ps: &[f32] = if args.small { &[0.1] } else { &[0., 0.1, 0.5, 1.] };
    let mut groups =
        vec![masks(device, shapes), formulas(device, shapes, drop_ps), views(device, viewed)];
    groups.push(repeats(device, if args.small { &[2, 3, 17] } else { &[37, 1031] }));
    if device.is_cuda() {
        groups.push(same_bits_as_the_cpu(device, shapes, drop_ps));
    }
    groups.push(attentions(device, args.small));
    groups.push(transformer(device, args.small));
    groups.push(optimiser(device));

    let mut md = String::from("| fact | cases | failures |\n|---|---|---|\n");
    for Group { fact, cases, failures } in &groups {
        writeln!(md, "| {fact} | {cases} | {} |", failures.len())?;
    }
    let failures: Vec<_> = groups.iter().flat_map(|group| &group.failures).collect();
    let cases: usize = groups.iter().map(|group| group.cases).sum();
    writeln!(md, "\n{cases} cases on {}, {} failures.", place(device), failures.len())?;
    if !device.is_cuda() {
        md.push_str("This is the CPU half: nothing here ran on a GPU.\n");
    }
    for failure in failures.iter().take(20) {
        writeln!(md, "- {failure}")?;
    }
    let right = failures.is_empty();
    let seconds = begin.elapsed().as_secs_f64();
    let data = serde_json::json!({ "small": args.small, "cases": cases, "groups": groups });
    let json = write_section(&args.out, device, "correctness", seconds, &md, data)?;
    print_section(&json, &md);
    Ok(right)
}

fn place(device: &Device) -> &'static str {
    if device.is_cuda() { "CUDA" } else { "the CPU" }
}

/// The dtypes that the device computes in.
fn dtypes(device: &Device) -> impl Iterator<Item = DType> {
    let is_cuda = device.is_cuda();
    DTYPES.into_iter().filter(move |dtype| !(is_cuda && *dtype == DType::F64))
}

/// What an op keeps of ones, recovered, is the mask law on the CPU.
fn masks(device: &Device, shapes: &[&[usize]]) -> Group {
    let mut group = Group::new("masks equal the law bit for bit, whole and in windows");
    for dims in shapes {
        for dtype in dtypes(device) {
            for window in [false, true] {
                group.check(|| {
                    let mut drop = mask(0.3);
                    if window {
                        let full: Vec<usize> = dims.iter().map(|d| d + 5).collect();
                        drop = drop.window(&full, &vec![3; dims.len()]);
                    }
                    let ones = Tensor::ones(*dims, dtype, device)?;
                    let kept = dropout(&ones, &drop)?.ne(0.)?.to_device(&Device::Cpu)?;
                    let same = bits(&kept)? == bits(&drop.to_tensor(*dims, &Device::Cpu)?)?;
                    Ok(failure(same, || format!("mask of {dims:?} in {dtype:?}, window {window}")))
                });
            }
        }
    }
    group
}

fn failure(same: bool, what: impl FnOnce() -> String) -> Vec<String> {
    if same { vec![] } else { vec![what()] }
}

fn formulas(device: &Device, shapes: &[&[usize]], drop_ps: &[f32]) -> Group {
    let mut group =
        Group::new("outputs and gradients are as near the f64 formula as the naive chain is");
    for case in cases() {
        for size in shapes.iter().filter(|size| case.takes(size)) {
            for (drop_p, dtype) in drop_ps.iter().flat_map(|p| dtypes(device).map(move |d| (*p, d)))
            {
                group.check(|| agree(case, size, View::Contiguous, drop_p, dtype, device));
            }
        }
    }
    group
}

fn agree(
    case: &dyn Case,
    size: &[usize],
    view: View,
    drop_p: f32,
    dtype: DType,
    device: &Device,
) -> Result<Vec<String>> {
    Ok(disagreements(case, size, view, drop_p, dtype, std::slice::from_ref(device))?)
}

fn views(device: &Device, shapes: &[&[usize]]) -> Group {
    let mut group = Group::new("so they are for transposed, offset and broadcast arguments");
    for case in cases() {
        for size in shapes.iter().filter(|size| case.takes(size)) {
            for view in [View::Transposed, View::Offset, View::Broadcast] {
                for dtype in dtypes(device) {
                    group.check(|| agree(case, size, view, 0.3, dtype, device));
                }
            }
        }
    }
    group
}

/// Output and gradients of a fused call on random arguments, bit for bit.
fn bits_of(
    case: &dyn Case,
    size: &[usize],
    drop_p: f32,
    dtype: DType,
    device: &Device,
) -> Result<Vec<Vec<u64>>> {
    let results = results(case, size, &mask(drop_p), dtype, device)?;
    Ok(results.iter().map(bits).collect::<candle_core::Result<_>>()?)
}

fn repeats(device: &Device, size: &[usize]) -> Group {
    let mut group = Group::new("a second run gives the same bits");
    for case in cases() {
        let size = &case.fitting(size);
        for dtype in dtypes(device) {
            group.check(|| {
                let run = || bits_of(case, size, 0.4, dtype, device);
                Ok(failure(run()? == run()?, || format!("{case:?} {dtype:?} differs from itself")))
            });
        }
    }
    group
}

fn same_bits_as_the_cpu(device: &Device, shapes: &[&[usize]], drop_ps: &[f32]) -> Group {
    let mut group = Group::new("element-wise results in f32 equal the CPU's bit for bit");
    for case in cases() {
        let Some(but_for) = case.same_bits_but_for() else { continue };
        for size in shapes.iter().filter(|size| case.takes(size)) {
            for drop_p in drop_ps {
                group.check(|| {
                    let on = |device: &Device| bits_of(case, size, *drop_p, DType::F32, device);
                    let (ours, cpu) = (on(device)?, on(&Device::Cpu)?);
                    let pairs = ours.iter().zip(&cpu).enumerate();
                    let same = pairs.into_iter().all(|(i, (a, b))| a == b || but_for.contains(&i));
                    Ok(failure(same, || format!("{case:?} {size:?} drop p {drop_p}")))
                });
            }
        }
    }
    group
}

/// Attention as one op: every head size of the kernels and one between, tails of every tile, grouped heads,
/// each field of the config, each view.
fn attentions(device: &Device, small: bool) -> Group {
    let mut group = Group::new("attention and its gradients are as near the f64 formula, too");
    let mut check = |case: &dyn Case, size: [usize; 6], view, drop_p| {
        for dtype in dtypes(device) {
            group.check(|| agree(case, &size, view, drop_p, dtype, device));
        }
    };
    let (common, rest): (Vec<&dyn Case>, Vec<_>) =
        attention::CASES.iter().partition(|case| !case.bench_drop_ps().is_empty());
    let head_sizes: &[usize] = if small { &[64] } else { &[32, 40, 64, 96, 128, 200, 256] };
    let lengths: &[(usize, usize)] =
        if small { &[(70, 90)] } else { &[(1, 1), (1, 300), (300, 1), (64, 128), (130, 257)] };
    for d in head_sizes {
        for (queries, keys) in lengths {
            for case in &common {
                for drop_p in [0., 0.1] {
                    check(*case, [2, 4, 2, *queries, *keys, *d], View::Contiguous, drop_p);
                }
            }
        }
    }
    for size in [[3, 4, 2, 70, 70, 64], [3, 2, 1, 150, 65, 128], [3, 2, 2, 5, 300, 32]] {
        for case in &rest {
            check(*case, size, View::Contiguous, 0.3);
        }
    }
    for view in View::ALL {
        for case in &common {
            check(*case, [2, 4, 2, 70, 130, 64], view, 0.1);
        }
    }
    group
}

/// The model as a whole: every parameter's gradient, fused against unfused, and against the CPU's.
fn transformer(device: &Device, small: bool) -> Group {
    let mut group =
        Group::new("the Transformer's loss and every gradient: fused, unfused, and on the CPU");
    let (gpt2, batch) = (size(small, &Device::Cpu).0, 4);
    let llama = in_llama_style(&gpt2);
    for (config, drop_p) in [(&gpt2, 0.), (&gpt2, 0.1), (&llama, 0.), (&llama, 0.1)] {
        let style = config.architecture;
        let size = (config.clone(), batch);
        let new = |form, device: &Device| Step::new(form, &size, drop_p, DType::F32, device);
        let mut compare = |what: &str, ours: Form, other: Form, place: &Device| {
            group.check(|| {
                let (ours, other) = (new(ours, device)?, new(other, place)?);
                let agree = check_agree(&format!("{style:?} {what}"), &ours, &other, 2e-3);
                Ok(agree.err().iter().map(|e| e.to_string()).collect())
            });
        };
        compare("fused against unfused", Form::Fused, Form::Unfused, device);
        compare("fused against the CPU", Form::Fused, Form::Fused, &Device::Cpu);
        if drop_p == 0. && style == Architecture::Gpt2 {
            compare("against candle's ops alone", Form::Fused, Form::Candle, device);
        }
    }
    group
}

/// AdamW in every dtype, with and without clipping, loss scale and master weights, over a saved state.
fn optimiser(device: &Device) -> Group {
    let mut group = Group::new(if device.is_cuda() {
        "AdamW's weights, moments, norm and loss scale equal the CPU's bit for bit"
    } else {
        "AdamW's weights, norm and loss scale equal those by candle's in f32 bit for bit"
    });
    for trial in adamw::trials() {
        group.check(|| trial.disagreements(device));
    }
    group
}
