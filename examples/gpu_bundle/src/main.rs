//! One program for a machine with an NVIDIA GPU and no Rust: is it right, how fast is it, how much
//! memory does it take, and the main job. `scripts/gpu-bundle.sh` packs it; all of it also runs on the
//! CPU:
//!
//! ```text
//! cargo run --release --bin gpu_bundle -- correctness
//! cargo run --release --bin gpu_bundle -- bench --small
//! cargo run --release --bin gpu_bundle --features cuda -- bench --device cuda
//! ```
//!
//! Results go to `--out` as `<device>-<date>.json`, `.md` and `.svg`; every subcommand adds its section
//! to the same files. Exit codes: 0 all right, 1 something is wrong, 2 bad arguments, 3 no CUDA device.

mod adamw;
mod bench;
mod candle_gpt;
mod correctness;
mod kept;
mod memory;
mod results;
mod step;
mod timing;

// As the root of an example it has a `main`, which nobody calls here.
#[allow(dead_code)]
#[path = "../../pretrain_vs_finetune/main.rs"]
mod pretrain_vs_finetune;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use candle_core::Device;
use cases::device;
use clap::{Args, Parser, Subcommand};

const NO_DEVICE: u8 = 3;

#[derive(Debug, Parser)]
#[command(
    name = "gpu_bundle",
    version,
    about = "Checks and measures candle-dropout on this machine"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Every op, forward and each gradient, against its formula in f64 and against the CPU; AdamW against the CPU.
    Correctness(Common),
    /// Time and bandwidth of every op against a plain copy and candle's own chain of ops.
    Bench(bench::Args),
    /// Peak memory of a training step: fused, unfused, and with candle's own dropout.
    Memory(Common),
    /// The main job: which dropout for pretraining, which for fine-tuning?
    Train(Box<pretrain_vs_finetune::Args>),
}

#[derive(Debug, Args)]
struct Common {
    /// Where to compute.
    #[arg(long, value_parser = ["cpu", "cuda"], default_value = "cpu")]
    device: String,
    /// Folder for the results.
    #[arg(long, default_value = "results")]
    out: PathBuf,
    /// A run of seconds, for sanitizers and continuous integration; its times mean nothing.
    #[arg(long)]
    small: bool,
}

impl Command {
    fn device(&self) -> &str {
        match self {
            Self::Correctness(common) | Self::Memory(common) => &common.device,
            Self::Bench(args) => &args.common.device,
            Self::Train(args) => &args.device,
        }
    }

    /// True if all is well.
    fn run(&self, device: &Device) -> Result<bool> {
        match self {
            Self::Correctness(common) => correctness::run(common, device),
            Self::Bench(args) => bench::run(args, device),
            Self::Memory(common) => memory::run(common, device),
            Self::Train(args) => pretrain_vs_finetune::run(args).map(|()| true),
        }
    }
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // Before a device is opened: a driver starts threads.
    if let Command::Train(_) = command {
        pretrain_vs_finetune::one_thread_a_run();
    }
    let device = match command.device() {
        "cuda" => match device::open() {
            Ok(device) => device,
            Err(error) => {
                // The first line: candle may add a backtrace.
                let reason = format!("{error:#}");
                eprintln!("no CUDA device: {}", reason.lines().next().unwrap_or_default());
                return ExitCode::from(NO_DEVICE);
            }
        },
        _ => Device::Cpu,
    };
    match command.run(&device) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
