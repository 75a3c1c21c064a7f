//! Time and bandwidth of every op, forward and backward, against a plain copy of the same size and
//! candle's own chain of ops, all in one run.
//!
//! Nothing is timed before it agrees with the formula in f64: whole tensors where they are small, else
//! their first, middle and last rows. Data are random. Each fused op is timed twice, and what the two
//! differ by is the noise. The backward pass is that of the op alone: the time of `backward()` on a
//! standing graph, less that of a graph whose ops cost nothing to go back through (candle fills a
//! gradient with zeros and adds to it at each edge).

mod attention;
mod check;
mod markdown;
mod models;
mod ops;
mod plot;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use cases::device::{memory_bytes, name};

use crate::Common;
use crate::results::{Record, print_section, stem, with_extension, write_section};
use crate::timing::{Budget, Timer};

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
        let title = name(device)?.unwrap_or_else(|| "CPU".into());
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
        let largest = memory_bytes(device)?.map_or(usize::MAX, |free| free / 40);
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
        md += &markdown::markdown(&self.records, self.args.common.small)?;
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
}
