//! Time and bandwidth of every op, forward and backward, against a plain copy of the same size and
//! candle's own chain of ops, all in one run.
//!
//! Nothing is timed before it agrees with the formula in f64: whole tensors where they are small, else
//! their first, middle and last rows. Data are random. Each fused op is timed twice, and what the two
//! differ by is the noise. The backward pass is that of the op alone: the time of `backward()` on a
//! standing graph, less that of a graph whose ops cost nothing to go back through (candle fills a
//! gradient with zeros and adds to it at each edge).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_dropout::{DropMask, RopeStyle, cross_entropy, dropout_add_norm, reference, rope};

use crate::candle_gpt::MatrixProducts;
use crate::results::{Record, print_section, stem, with_extension, write_section};
use crate::runner::{NORM_EPS, Op, SCALE, beyond_the_naive_error, mask};
use crate::step::{FORMS, Form, Step, check_agree, size};
use crate::timing::{Budget, Timer, Timing};
use crate::{Common, attention, bytes, common, cuda, kept, plot};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub common: Common,
    /// Bytes of x, one size or more [default: 16 kB to 64 MB, and to 1 GB on CUDA].
    #[arg(long, value_delimiter = ',', value_name = "BYTES,..")]
    sizes: Option<Vec<usize>>,
    /// Dtypes of ops and attention [default: f32 on the CPU; on CUDA f32, f16 and bf16, of attention the halves].
    #[arg(long, value_delimiter = ',', value_name = "DTYPE,..")]
    dtypes: Option<Vec<String>>,
    /// Name of the section in the results.
    #[arg(long, default_value = "bench")]
    section: String,
    /// What to measure [default: all].
    #[arg(long, value_delimiter = ',', value_name = "PART,..")]
    only: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum Part {
    /// Ops over one tensor, and the copy they are compared with.
    Ops,
    /// Attention in one op and materialised.
    Attention,
    /// A branch of which only the kept samples are computed.
    Kept,
    /// The training step of the GPT.
    Step,
}

const OPS: [(&str, Op); 9] = [
    ("dropout", Op::Dropout),
    ("dropout_add", Op::DropoutAdd),
    ("dropout_add_bias", Op::DropoutAddBias),
    ("dropout_add_norm", Op::DropoutAddNorm),
    ("activation_dropout", Op::GeluTanhDropout),
    ("softmax_dropout", Op::Softmax),
    ("drop_path_add", Op::DropPathAddRow),
    ("rope", Op::Rope),
    ("cross_entropy", Op::CrossEntropy),
];

const DROP_PS: [f32; 2] = [0., 0.1];

/// Columns of all tensors but those of `drop_path_add`, which have `SAMPLES` samples, those of `rope`,
/// which are `[B, 4, T <= 128, 64]`, and large ones of `cross_entropy`, whose classes are GPT-2's tokens.
const COLS: usize = 1024;
const SAMPLES: usize = 64;
const TOKENS: usize = 50_257;

/// Tensors of at most so many elements are checked as a whole.
const CHECKED_WHOLE: usize = 1 << 20;

pub fn run(args: &Args, device: &Device) -> Result<bool> {
    let small = args.common.small;
    let budget = match (small, device.is_cuda()) {
        (true, _) => Budget { sample_ms: 0.1, total_ms: 1., min_samples: 3 },
        (false, true) => Budget { sample_ms: 1., total_ms: 60., min_samples: 11 },
        (false, false) => Budget { sample_ms: 1., total_ms: 150., min_samples: 7 },
    };
    // Before anything is measured: what a pool has kept does not count as free.
    let sizes = args.sizes(device)?;
    let mut bench = Bench {
        begin: Instant::now(),
        args,
        timer: Timer { device: device.clone(), budget },
        copies: BTreeMap::new(),
        records: vec![],
        failures: vec![],
        is_complete: false,
    };
    let dtypes = args.dtypes()?;
    // What an earlier run left is not taken for this one's.
    bench.save()?;
    if args.is_wanted(Part::Attention) {
        for (dtype, dims) in attention::cases(dtypes.clone(), device, small) {
            bench.attempt(&format!("attention, {dtype:?}, {dims:?}"), |bench| {
                let timer = bench.timer.clone();
                attention::measure_all(&timer, dtype, dims, |record| bench.add(record))
            })?;
        }
    }
    if args.is_wanted(Part::Ops) {
        let default = if device.is_cuda() {
            vec![DType::BF16, DType::F16, DType::F32]
        } else {
            vec![DType::F32]
        };
        for dtype in dtypes.unwrap_or(default) {
            for &bytes in &sizes {
                bench.ops(dtype, bytes)?;
            }
        }
    }
    if args.is_wanted(Part::Kept) {
        bench.attempt("kept samples", |bench| bench.kept(small))?;
    }
    if args.is_wanted(Part::Step) {
        bench.attempt("GPT step", |bench| bench.steps(small))?;
    }
    bench.is_complete = true;
    if args.section.starts_with("bench") && args.is_wanted(Part::Ops) {
        let svg = with_extension(&stem(&args.common.out, device)?, "svg");
        let title = cuda::name(device)?.unwrap_or_else(|| "CPU".into());
        plot::roofline(&svg, &title, &bench.records).context("cannot draw the plot")?;
    }
    print_section(&bench.save()?, &bench.markdown()?);
    Ok(bench.failures.is_empty())
}

impl Args {
    fn is_wanted(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    fn dtypes(&self) -> Result<Option<Vec<DType>>> {
        let parse = |name: &String| match name.as_str() {
            "f32" => Ok(DType::F32),
            "f16" => Ok(DType::F16),
            "bf16" => Ok(DType::BF16),
            other => bail!("--dtypes: expected f32, f16 or bf16, got {other}"),
        };
        self.dtypes.as_ref().map(|names| names.iter().map(parse).collect()).transpose()
    }

    /// Bytes of x, none of which leaves less than a fortieth of the device's memory to a tensor.
    fn sizes(&self, device: &Device) -> Result<Vec<usize>> {
        const ALL: [usize; 5] = [16 << 10, 256 << 10, 4 << 20, 64 << 20, 1 << 30];
        let sizes = match (&self.sizes, self.common.small) {
            (Some(sizes), _) => sizes.clone(),
            (None, true) => ALL[..2].to_vec(),
            (None, false) if device.is_cuda() => ALL.to_vec(),
            (None, false) => ALL[..4].to_vec(),
        };
        for bytes in &sizes {
            ensure!(*bytes >= 16 << 10, "--sizes: expected at least 16384 bytes, got {bytes}");
        }
        let largest = cuda::memory_bytes(device)?.map_or(usize::MAX, |free| free / 40);
        let (fitting, too_large): (Vec<_>, Vec<_>) =
            sizes.into_iter().partition(|bytes| *bytes <= largest);
        for bytes in too_large {
            eprintln!(
                "bench: {bytes} bytes of x are left out, too many for the memory of the device"
            );
        }
        Ok(fitting)
    }
}

struct Bench<'a> {
    begin: Instant,
    args: &'a Args,
    timer: Timer,
    /// GB/s of a plain copy by dtype and bytes.
    copies: BTreeMap<(&'static str, usize), f64>,
    records: Vec<Record>,
    /// What could not be measured, and why.
    failures: Vec<String>,
    /// Nothing more is to come.
    is_complete: bool,
}

/// The rows of x, or the samples, and what is in each.
fn shape(op: Op, dtype: DType, bytes: usize) -> Vec<usize> {
    let elements = bytes / dtype.size_in_bytes();
    match op {
        Op::DropPathAddRow => vec![SAMPLES, elements / SAMPLES],
        Op::Rope => {
            let t = (elements / 256).min(128);
            vec![elements / (256 * t), 4, t, 64]
        }
        Op::CrossEntropy if elements > CHECKED_WHOLE => vec![elements / TOKENS, TOKENS],
        _ => vec![elements / COLS, COLS],
    }
}

impl Bench<'_> {
    /// Measures something and saves what there is so far. A failure, such as a wrong result, is noted; what
    /// follows is measured all the same.
    fn attempt(&mut self, what: &str, measure: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if let Err(error) = measure(self) {
            // The first line: candle may add a backtrace.
            let reason = format!("{error:#}");
            self.failures.push(format!("{what}: {}", reason.lines().next().unwrap_or_default()));
            eprintln!("bench: FAILED: {what}: {reason}");
        }
        eprintln!("bench: {what}, {:.0} s", self.begin.elapsed().as_secs_f64());
        self.save().map(|_| ())
    }

    fn add(&mut self, record: Record) -> Result<()> {
        self.records.push(record);
        self.save().map(|_| ())
    }

    fn markdown(&self) -> Result<String> {
        let mut md = String::new();
        if !self.is_complete {
            md.push_str("This run was stopped before its end.\n\n");
        }
        md += &markdown(&self.records, self.args.common.small)?;
        if !self.failures.is_empty() {
            md.push_str("\nFailed, so not timed:\n\n");
        }
        for failure in &self.failures {
            writeln!(md, "- {failure}")?;
        }
        Ok(md)
    }

    fn save(&self) -> Result<PathBuf> {
        let Args { common, section, .. } = self.args;
        let data = serde_json::json!({
            "small": common.small, "complete": self.is_complete, "records": self.records,
            "failures": self.failures
        });
        let seconds = self.begin.elapsed().as_secs_f64();
        let device = &self.timer.device;
        write_section(&common.out, device, section, seconds, &self.markdown()?, data)
    }

    /// Random tensors, one for each argument, from `set`.
    fn arguments(&self, op: Op, dims: &[usize], dtype: DType, set: usize) -> Result<Vec<Tensor>> {
        let random = |(i, dims): (usize, Vec<usize>)| -> Result<Tensor> {
            // Small tensors as the tests draw them; large ones on the device, in a second less.
            let device = &self.timer.device;
            if dims.iter().product::<usize>() <= CHECKED_WHOLE {
                return Ok(common::random(&dims, dtype, (8 * set + i) as u64)?.to_device(device)?);
            }
            Ok(Tensor::randn(0f32, 1., dims, device)?.to_dtype(dtype)?)
        };
        op.arguments(dims).into_iter().enumerate().map(random).collect()
    }

    /// A plain copy of x, and each op at each rate.
    fn ops(&mut self, dtype: DType, bytes: usize) -> Result<()> {
        let of_size = format!("{dtype:?}, {bytes} bytes");
        self.attempt(&format!("copy, {of_size}"), |bench| bench.copy(dtype, bytes))?;
        for (name, op) in OPS {
            let drop_ps: &[f32] = match op {
                // Without a rate it returns x itself.
                Op::Dropout => &DROP_PS[1..],
                // These know no rate.
                Op::Rope | Op::CrossEntropy => &DROP_PS[..1],
                _ => &DROP_PS,
            };
            for &drop_p in drop_ps {
                self.attempt(&format!("{name}, {of_size}, drop p {drop_p}"), |bench| {
                    bench.op(name, op, dtype, bytes, drop_p)
                })?;
            }
        }
        Ok(())
    }

    fn copy(&mut self, dtype: DType, bytes: usize) -> Result<()> {
        let dims = shape(Op::Dropout, dtype, bytes);
        let sets = self.timer.sets(2 * bytes)?;
        let x = (0..sets)
            .map(|set| Ok(self.arguments(Op::Dropout, &dims, dtype, set)?.remove(0)))
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

    fn op(&mut self, name: &str, op: Op, dtype: DType, bytes: usize, drop_p: f32) -> Result<()> {
        let (dims, drop, dtype_name) = (shape(op, dtype, bytes), mask(drop_p), dtype.as_str());
        let arguments = op.arguments(&dims).len();
        let sets = self.timer.sets((arguments + 1) * bytes)?;
        let args = (0..sets)
            .map(|set| self.arguments(op, &dims, dtype, set))
            .collect::<Result<Vec<_>>>()?;
        check(op, &dims, &args[0], &drop, dtype).with_context(|| {
            format!("{name} in {dtype:?} on {dims:?} with drop p {drop_p} is not timed")
        })?;
        let constants = constants(op, &args[0][0])?;
        let fused = |args: &[Tensor]| fused(op, args, &constants, &drop);
        let chain = |args: &[Tensor]| chain(op, args, &constants, drop_p);
        check_chain(op, drop_p, &fused(&args[0])?[0], &chain(&args[0])?[0])?;

        let keep = drop.to_tensor(op.mask_dims(&dims[..1]), &Device::Cpu)?;
        let kept = match op {
            Op::DropPathAddRow => keep.to_dtype(DType::F64)?.mean_all()?.to_scalar::<f64>()?,
            _ => 1.,
        };
        let (forward, backward) = bytes::per_element(op, kept);
        let elements: usize = dims.iter().product();
        let x_bytes = (elements * dtype.size_in_bytes()) as f64;
        let copy = self.copies.get(&(dtype_name, bytes)).copied();
        let record = |[library, variant]: [&str; 2], pass, timing, per_element: f64| {
            let what = [library, variant, name, pass, dtype_name];
            Record::new(what, drop_p, &dims, timing).with_bytes(per_element * x_bytes, copy)
        };
        let timer = &self.timer;
        let vars = args
            .iter()
            .map(|args| args.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>())
            .collect::<candle_core::Result<Vec<_>>>()?;
        let tracked: Vec<Vec<Tensor>> = vars
            .iter()
            .map(|set| set.iter().map(|var| var.as_tensor().clone()).collect())
            .collect();
        let mut records = Vec::new();
        let (ours, theirs) = (["candle-dropout", "fused"], ["candle", "chain"]);

        let time = || timer.time(sets, |set| fused(&args[set]));
        let mut first = record(ours, "forward", time()?, forward);
        let other = timer.time(sets, |set| chain(&args[set]))?;
        first.again_ms = Some(time()?.ms);
        records.extend([first, record(theirs, "forward", other, forward)]);

        let both = forward + backward;
        let time = || timer.time(sets, |set| fused(&tracked[set])?[0].backward());
        let mut first = record(ours, "forward_backward", time()?, both);
        let other = timer.time(sets, |set| chain(&tracked[set])?[0].backward())?;
        first.again_ms = Some(time()?.ms);
        records.extend([first, record(theirs, "forward_backward", other, both)]);

        // Nothing of candle's goes back from a scalar to logits without work of its own.
        if op == Op::CrossEntropy {
            self.records.extend(records);
            return Ok(());
        }
        let graphs = tracked.iter().map(|args| Ok(fused(args)?.swap_remove(0)));
        let graphs = graphs.collect::<Result<Vec<_>>>()?;
        let free = tracked.iter().map(|args| free_to_go_back(op, args));
        let free = free.collect::<candle_core::Result<Vec<_>>>()?;
        let time = || -> Result<Option<Timing>> {
            let edges = timer.time(sets, |set| free[set].backward())?;
            let whole = timer.time(sets, |set| graphs[set].backward())?;
            Ok(whole.less(edges))
        };
        // Below the noise there is nothing to report.
        if let (Some(timing), Some(again)) = (time()?, time()?) {
            let mut first = record(ours, "backward", timing, backward);
            first.again_ms = Some(again.ms);
            records.push(first);
        }
        self.records.extend(records);
        Ok(())
    }

    /// Stochastic depth around an MLP: the kept samples computed alone, or all of them and then masked.
    fn kept(&mut self, small: bool) -> Result<()> {
        let device = self.timer.device.clone();
        let dtypes =
            if device.is_cuda() { vec![DType::F32, DType::BF16] } else { vec![DType::F32] };
        for dtype in dtypes {
            let branch = kept::Branch::new(dtype, small, &device)?;
            for drop_p in kept::DROP_PS {
                branch.check(drop_p, if dtype == DType::F32 { 1e-5 } else { 1e-2 })?;
                for form in kept::FORMS {
                    let [library, variant] = form.names();
                    let op =
                        if form == kept::Form::Masked { "masked_mlp" } else { "drop_path_kept" };
                    for pass in ["forward", "forward_backward"] {
                        let time = || match pass {
                            "forward" => {
                                self.timer.time(1, |_| branch.forward(form, drop_p).map(|_| ()))
                            }
                            _ => self
                                .timer
                                .time(1, |_| branch.forward(form, drop_p)?.backward().map(|_| ())),
                        };
                        let what = [library, variant, op, pass, dtype.as_str()];
                        let mut record = Record::new(what, drop_p, branch.dims(), time()?);
                        record.again_ms = Some(time()?.ms);
                        self.add(record)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The training step of the GPT in every form, and its matrix products alone.
    fn steps(&mut self, small: bool) -> Result<()> {
        let device = self.timer.device.clone();
        let size = size(small, &device);
        let dtypes =
            if device.is_cuda() { vec![DType::F32, DType::BF16] } else { vec![DType::F32] };
        for drop_p in DROP_PS {
            let new = |form| Step::new(form, &size, drop_p, DType::F32, &device);
            check_agree("fused GPT", &new(Form::Fused)?, &new(Form::Unfused)?, 1e-3)?;
            if drop_p == 0. {
                check_agree("candle's GPT", &new(Form::Candle)?, &new(Form::Unfused)?, 1e-3)?;
            }
        }
        let (config, batch) = &size;
        let dims =
            [*batch, config.max_position_embeddings, config.hidden_size, config.num_hidden_layers];
        for dtype in dtypes {
            let like = Tensor::zeros(1, DType::F32, &device)?;
            let products = MatrixProducts::new(config, *batch, dtype, &like)?;
            let timing = self.timer.time(1, |_| products.run())?;
            let what =
                ["candle", "matrix products alone", "gpt_step", "training_step", dtype.as_str()];
            let mut record = Record::new(what, 0., &dims, timing);
            record.flop = Some(products.flop());
            self.add(record)?;
            for drop_p in DROP_PS {
                for form in FORMS {
                    let mut step = Step::new(form, &size, drop_p, dtype, &device)?;
                    let timing = self.timer.time(1, |_| step.run())?;
                    let loss = step.loss()?.to_scalar::<f32>()?;
                    ensure!(loss.is_finite(), "the loss of {form:?} in {dtype:?} is {loss}");
                    let [library, variant] = form.names();
                    let what = [library, variant, "gpt_step", "training_step", dtype.as_str()];
                    let mut record = Record::new(what, drop_p, &dims, timing);
                    record.again_ms = Some(self.timer.time(1, |_| step.run())?.ms);
                    self.add(record)?;
                }
            }
        }
        Ok(())
    }
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

/// What a program has before it calls an op: of `rope` the tables, and the same in the dtype of x, as candle's
/// wants them; of `cross_entropy` the targets.
fn constants(op: Op, x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
    match op {
        Op::Rope => {
            let (cos, sin) = op.tables(x)?;
            let (x_cos, x_sin) = (cos.to_dtype(x.dtype())?, sin.to_dtype(x.dtype())?);
            Ok(vec![cos, sin, x_cos, x_sin])
        }
        Op::CrossEntropy => Ok(vec![op.targets(x)?]),
        _ => Ok(vec![]),
    }
}

/// The results of an op; backward begins at the first.
fn fused(
    op: Op,
    args: &[Tensor],
    constants: &[Tensor],
    drop: &DropMask,
) -> candle_core::Result<Vec<Tensor>> {
    let y = match (op, args, constants) {
        (Op::DropoutAddNorm, [x, residual, ..], _) => {
            let (z, n) = dropout_add_norm(x, Some(residual), None, &op.norm(args), drop)?;
            return Ok(vec![n, z]);
        }
        (Op::Rope, [x], [cos, sin, ..]) => rope(x, cos, sin, RopeStyle::HalfSplit),
        (Op::CrossEntropy, [logits], [targets]) => {
            cross_entropy(logits, targets, &op.loss_config())
        }
        _ => op.fused(args, drop),
    };
    Ok(vec![y?])
}

/// A graph with the edges of an op, of which the backward pass is nothing but candle's own bookkeeping:
/// it passes the gradient on as it is. (A bias or a weight has too few elements to count.)
fn free_to_go_back(op: Op, args: &[Tensor]) -> candle_core::Result<Tensor> {
    match args {
        [x, residual, ..] if op == Op::DropoutAddNorm => (x + residual)?.reshape(x.shape()),
        [x] => x.reshape(x.shape()),
        [x, residual, ..] => x + residual,
        [] => candle_core::bail!("an op without arguments"),
    }
}

/// What a user of candle writes; the draws differ from ours.
fn chain(
    op: Op,
    args: &[Tensor],
    constants: &[Tensor],
    drop_p: f32,
) -> candle_core::Result<Vec<Tensor>> {
    let drop = |x: &Tensor| match drop_p {
        0. => Ok(x.clone()),
        _ => candle_nn::ops::dropout(x, drop_p),
    };
    let y = match (op, args) {
        (Op::Dropout, [x]) => drop(x),
        (Op::DropoutAdd, [x, residual]) => residual + drop(x)?,
        (Op::DropoutAddBias, [x, residual, bias]) => residual + drop(&x.broadcast_add(bias)?)?,
        (Op::DropoutAddNorm, [x, residual, weight]) => {
            let z = (residual + drop(x)?)?;
            // candle's fast norms end the graph.
            let n = candle_nn::ops::rms_norm_slow(&z, weight, NORM_EPS as f32)?;
            return Ok(vec![n, z]);
        }
        (Op::GeluTanhDropout, [x]) => drop(&x.gelu()?),
        (Op::Softmax, [scores]) => drop(&candle_nn::ops::softmax(&(scores * SCALE)?, D::Minus1)?),
        (Op::DropPathAddRow, [x, residual]) => {
            let keep = drop(&Tensor::ones((x.dim(0)?, 1), x.dtype(), x.device())?)?;
            residual + x.broadcast_mul(&keep)?
        }
        // candle's fast one ends the graph.
        (Op::Rope, [x]) => candle_nn::rotary_emb::rope_slow(x, &constants[2], &constants[3]),
        (Op::CrossEntropy, [logits]) => {
            candle_nn::loss::cross_entropy(&logits.to_dtype(DType::F32)?, &constants[0])
        }
        _ => candle_core::bail!("no chain for {op:?}"),
    };
    Ok(vec![y?])
}

/// The output and each gradient of `op(args)` times `dy`, as they lie on the device.
fn with_gradients(
    op: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    args: &[Tensor],
    dy: &Tensor,
) -> Result<Vec<Tensor>> {
    let vars = args.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>()?;
    let tracked: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = op(&tracked)?;
    let grads = (&y * dy)?.backward()?;
    let mut results = vec![y];
    for (i, var) in vars.iter().enumerate() {
        results.push(grads.get(var).with_context(|| format!("no gradient {i}"))?.clone());
    }
    Ok(results)
}

/// Demands that the output and each gradient of a fused op are as near the formula in f64, with the same
/// mask, as the formula in the op's dtype is: on the whole tensor, or on some rows of it.
fn check(op: Op, dims: &[usize], args: &[Tensor], drop: &DropMask, dtype: DType) -> Result<()> {
    let dy = match op {
        Op::CrossEntropy => op.output_gradient(dims, dtype)?.to_device(args[0].device())?,
        _ => (args[0].flip(&[1])? * 0.5)?,
    };
    let ours = with_gradients(|args| op.fused(args, drop), args, &dy)?;
    let rows = dims[0];
    let elements: usize = dims.iter().product();
    let (count, starts) = match elements <= CHECKED_WHOLE {
        true => (rows, vec![0]),
        false => {
            let count = if op == Op::DropPathAddRow { 1 } else { rows.min(8) };
            (count, vec![0, rows / 2, rows - count])
        }
    };
    for start in starts {
        let part = |x: &Tensor| -> candle_core::Result<Tensor> {
            // A bias and its gradient have no rows. Of a view all of x would travel.
            let rows = x.rank() >= 2;
            let x = if rows { x.narrow(0, start, count)?.force_contiguous()? } else { x.clone() };
            x.to_device(&Device::Cpu)
        };
        let parts = |all: &[Tensor]| all.iter().map(part).collect::<candle_core::Result<Vec<_>>>();
        let drop = match op {
            Op::DropPathAddRow => drop.window(&[1, rows], &[0, start]),
            Op::Rope | Op::CrossEntropy => drop.clone(),
            _ => drop.window(dims, &[start, 0]),
        };
        // A loss is the mean over all rows, to which these contribute so much.
        let share = if op == Op::CrossEntropy { count as f64 / rows as f64 } else { 1. };
        let targets = match op {
            Op::CrossEntropy => Some(op.targets(&args[0])?.narrow(0, start, count)?),
            _ => None,
        };
        let (args, dy) = (parts(args)?, (part(&dy)? * share)?);
        let wide = |x: &Tensor| x.to_dtype(DType::F64);
        let wide_args = args.iter().map(wide).collect::<candle_core::Result<Vec<_>>>()?;
        let naive = |args: &[Tensor]| match &targets {
            Some(targets) => {
                let targets = targets.to_device(&Device::Cpu)?;
                reference::cross_entropy(&args[0], &targets, &op.loss_config())
            }
            None => op.naive(args, &drop),
        };
        let mut ours = parts(&ours)?;
        if let Some(targets) = &targets {
            // The loss of these rows alone; the gradient is that of the whole.
            let rows = args[0].to_device(targets.device())?;
            ours[0] = cross_entropy(&rows, targets, &op.loss_config())?.to_device(&Device::Cpu)?;
        }
        let mut exact = with_gradients(naive, &wide_args, &wide(&dy)?)?;
        let mut naive = with_gradients(naive, &args, &dy)?;
        if count < rows && args.last().is_some_and(|last| last.rank() == 1) {
            // The gradient of a bias or a weight sums over all rows.
            for results in [&mut ours, &mut exact, &mut naive] {
                results.pop();
            }
        }
        let to_f64 =
            |all: Vec<Tensor>| all.iter().map(wide).collect::<candle_core::Result<Vec<_>>>();
        let (ours, naive) = (to_f64(ours)?, to_f64(naive)?);
        let beyond = beyond_the_naive_error(op, [&ours, &naive, &exact], &dy, &drop, dtype)?;
        ensure!(beyond.is_empty(), "rows from {start} on: {}", beyond.join(", "));
    }
    Ok(())
}

/// Demands that candle's chain computes the same thing, if not with the same draws: that its output has
/// the same mean absolute value.
fn check_chain(op: Op, drop_p: f32, ours: &Tensor, theirs: &Tensor) -> Result<()> {
    let is_loss = op == Op::CrossEntropy;
    if op == Op::DropPathAddRow && drop_p > 0. || !is_loss && ours.elem_count() < CHECKED_WHOLE {
        return Ok(());
    }
    let tolerance = if is_loss { 1e-4 } else { 0.02 };
    let mean = |y: &Tensor| y.abs()?.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>();
    let ratio = mean(theirs)? / mean(ours)?;
    ensure!(
        (ratio - 1.).abs() < tolerance,
        "candle's chain for {op:?} computes something else: {ratio}"
    );
    Ok(())
}

fn human(bytes: f64) -> String {
    match bytes {
        b if b < 1e6 => format!("{:.0} kB", b / 1024.),
        b if b < 1e9 => format!("{:.0} MB", b / 1048576.),
        b => format!("{:.0} GB", b / 1073741824.),
    }
}

fn markdown(records: &[Record], small: bool) -> Result<String> {
    let mut md = String::new();
    if small {
        md.push_str("A run of seconds that shows the program works; its times mean nothing.\n\n");
    }
    md.push_str(
        "GB/s counts each input read and each output written once. \"of copy\" is that against a plain \
         copy of x in this run. \"again\" is the same version timed once more. \"candle\" is the time of \
         candle's own chain of ops over ours.\n\n\
         | op | pass | dtype | drop p | x | ms | quartiles | again | GB/s | of copy | candle |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let same = |a: &Record, b: &Record| {
        (&a.op, &a.pass, &a.dtype, &a.shape) == (&b.op, &b.pass, &b.dtype, &b.shape)
            && a.drop_p == b.drop_p
    };
    let is_elementwise =
        |r: &Record| r.op != "gpt_step" && !attention::OPS.contains(&r.op.as_str());
    let is_listed = |r: &&Record| r.op == "copy" || r.library != "candle" && is_elementwise(r);
    for record in records.iter().filter(is_listed) {
        let theirs =
            records.iter().find(|r| r.library == "candle" && r.op != "copy" && same(r, record));
        let elements: usize = record.shape.iter().product();
        let size = if record.dtype == "f32" { 4 } else { 2 };
        let or_dash = |x: Option<String>| x.unwrap_or_else(|| "-".into());
        writeln!(
            md,
            "| `{}` | {} | {} | {} | {} | {:.4} | {:.4} to {:.4} | {} | {} | {} | {} |",
            record.op,
            record.pass,
            record.dtype,
            record.drop_p,
            human((elements * size) as f64),
            record.ms,
            record.ms_low,
            record.ms_high,
            or_dash(record.again_ms.map(|ms| format!("{:+.0} %", (ms / record.ms - 1.) * 100.))),
            or_dash(record.gb_s.map(|x| format!("{x:.1}"))),
            or_dash(record.of_copy.map(|x| format!("{:.0} %", x * 100.))),
            or_dash(theirs.map(|theirs| format!("{:.1}x", theirs.ms / record.ms))),
        )?;
    }
    md.push_str(&attention::markdown(records)?);
    let steps: Vec<_> = records.iter().filter(|r| r.op == "gpt_step").collect();
    if let Some(shape) = steps.first().map(|step| &step.shape) {
        writeln!(
            md,
            "\nA training step of a GPT, [batch, tokens, width, layers] = {shape:?}: forward, loss, \
             backward, clip, AdamW.\n\n| step | dtype | drop p | ms | quartiles | again | GFLOP/s |\n\
             |---|---|---|---|---|---|---|"
        )?;
    }
    for step in steps {
        let again = step.again_ms.map(|ms| format!("{:+.0} %", (ms / step.ms - 1.) * 100.));
        let rate = step.flop.map(|flop| format!("{:.0}", flop / step.ms / 1e6));
        writeln!(
            md,
            "| {}, {} | {} | {} | {:.3} | {:.3} to {:.3} | {} | {} |",
            step.library,
            step.variant,
            step.dtype,
            step.drop_p,
            step.ms,
            step.ms_low,
            step.ms_high,
            again.unwrap_or_else(|| "-".into()),
            rate.unwrap_or_else(|| "-".into()),
        )?;
    }
    Ok(md)
}
