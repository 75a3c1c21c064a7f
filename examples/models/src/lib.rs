//! What the examples and the test share: the command line, data, which variables receive a gradient, a training loop.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use candle_dropout::training::named_vars;
use candle_nn::{Optimizer, VarMap};
use clap::Parser;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// The command line of every example.
#[derive(Debug, Parser)]
pub struct Args {
    /// The folder of the data sets.
    #[arg(long, default_value = "../shared/data")]
    pub data: PathBuf,
    /// Steps of training, of each of the two models.
    #[arg(long, default_value_t = 100)]
    pub steps: usize,
    /// Seed of first weights, batches and masks.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Fail where data is missing, instead of a message.
    #[arg(long)]
    pub require_data: bool,
}

impl Args {
    /// The files of these names below `--data`, or `None` after a message where one is missing: no example fails for
    /// want of its data, but with `--require-data`.
    pub fn files<const N: usize>(&self, names: [&str; N]) -> Result<Option<[PathBuf; N]>> {
        let files = names.map(|name| self.data.join(name));
        let Some(missing) = files.iter().find(|file| !file.is_file()) else {
            return Ok(Some(files));
        };
        let why =
            format!("no file {}; --data names the folder of the data sets", missing.display());
        ensure!(!self.require_data, why);
        println!("skipped: {why}");
        Ok(None)
    }

    /// Batches are drawn from this: the same for both models.
    pub fn batches(&self) -> StdRng {
        StdRng::seed_from_u64(self.seed)
    }
}

/// Prints in how many lines a model's file through `candle_dropout::nn` differs from the one through `candle_nn`.
pub fn print_changed_lines(file: &str, changed: usize) {
    println!("{file}: lines that differ between candle_nn and candle_dropout::nn: {changed}");
}

/// Which variables a loss gives a gradient.
#[derive(Debug)]
pub struct Gradients {
    pub with: usize,
    /// By name: without one, or with nothing but zeros.
    pub without: Vec<String>,
    /// By name: with a number that is not finite.
    pub not_finite: Vec<String>,
}

impl Gradients {
    pub fn of(loss: &Tensor, vars: &VarMap) -> candle_core::Result<Self> {
        let grads = loss.backward()?;
        let mut gradients = Self { with: 0, without: Vec::new(), not_finite: Vec::new() };
        for (name, var) in named_vars(vars)? {
            let size = match grads.get(&var) {
                Some(grad) => grad.abs()?.sum_all()?.to_scalar::<f32>()?,
                None => 0.,
            };
            match size {
                0. => gradients.without.push(name),
                size if size.is_finite() => gradients.with += 1,
                _ => gradients.not_finite.push(name),
            }
        }
        Ok(gradients)
    }
}

/// Trains and prints: variables with and without a gradient, losses, speed. `per_step` is how many `units`
/// (images, tokens) a step takes; `loss` is that of the next batch.
pub fn train(
    label: &str,
    (steps, per_step, units): (usize, usize, &str),
    vars: &VarMap,
    mut optimizer: impl Optimizer,
    mut loss: impl FnMut() -> candle_core::Result<Tensor>,
) -> Result<()> {
    let first = loss()?;
    let gradients = Gradients::of(&first, vars)?;
    ensure!(gradients.not_finite.is_empty(), "not finite: {:?}", gradients.not_finite);
    println!(
        "{label}: {} variables with a gradient, {} without",
        gradients.with,
        gradients.without.len()
    );
    let (begin, mut last) = (Instant::now(), Vec::new());
    for step in 0..steps {
        let loss = loss()?;
        optimizer.backward_step(&loss)?;
        if step + 10 >= steps {
            last.push(loss.to_scalar::<f32>()?);
        }
    }
    let speed = (steps * per_step) as f64 / begin.elapsed().as_secs_f64();
    let mean = last.iter().sum::<f32>() / last.len().max(1) as f32;
    println!(
        "{label}: loss {:.3}, over the last of {steps} steps {mean:.3}; {speed:.0} {units}/s",
        first.to_scalar::<f32>()?
    );
    Ok(())
}

/// The bytes of a file, unpacked by `gzip` if its name ends in `.gz`.
fn bytes(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "gz") {
        return std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    }
    let output = Command::new("gzip").arg("-dc").arg(path).output().context("cannot run gzip")?;
    ensure!(output.status.success(), "gzip cannot unpack {}", path.display());
    Ok(output.stdout)
}

/// The bytes of an idx file in so many dimensions: its header is a magic number and a size for each.
fn idx(path: &Path, dims: u8) -> Result<Vec<u8>> {
    let mut file = bytes(path)?;
    let header = 4 + 4 * usize::from(dims);
    ensure!(
        file.len() >= header && file.starts_with(&[0, 0, 8, dims]),
        "{}: expected an idx file of bytes in {dims} dimensions, got {} bytes that are none",
        path.display(),
        file.len()
    );
    Ok(file.split_off(header))
}

/// Images with their classes.
pub struct Images {
    /// `[N, C, H, W]`, from -1 to 1.
    pub pixels: Tensor,
    /// `[N]`, u32.
    pub classes: Tensor,
}

/// A class and an image of 3 x 32 x 32 pixels.
const CIFAR_RECORD: usize = 1 + 3 * 32 * 32;

impl Images {
    /// Two of MNIST's files, `..-images-idx3-ubyte.gz` and `..-labels-idx1-ubyte.gz`.
    pub fn mnist(images: &Path, labels: &Path) -> Result<Self> {
        Self::new(images, &idx(images, 3)?, &idx(labels, 1)?, (1, 28, 28))
    }

    /// A file of CIFAR-10's binary layout: a class, then 3 x 32 x 32 pixels.
    pub fn cifar(path: &Path) -> Result<Self> {
        let records = bytes(path)?;
        ensure!(
            records.len() % CIFAR_RECORD == 0,
            "{}: expected records of {CIFAR_RECORD} bytes, got {} bytes",
            path.display(),
            records.len()
        );
        let (mut pixels, mut classes) = (Vec::new(), Vec::new());
        for record in records.chunks(CIFAR_RECORD) {
            classes.push(record[0]);
            pixels.extend_from_slice(&record[1..]);
        }
        Self::new(path, &pixels, &classes, (3, 32, 32))
    }

    fn new(
        path: &Path,
        pixels: &[u8],
        classes: &[u8],
        (c, h, w): (usize, usize, usize),
    ) -> Result<Self> {
        let (n, device) = (classes.len(), &Device::Cpu);
        ensure!(n > 0, "{}: expected images, got none", path.display());
        ensure!(
            pixels.len() == n * c * h * w,
            "{}: expected {n} images of {c} x {h} x {w} pixels, as there are classes, got {} pixels",
            path.display(),
            pixels.len()
        );
        if let Some(class) = classes.iter().find(|&&class| class > 9) {
            bail!("{}: expected classes below 10, got {class}", path.display());
        }
        let pixels: Vec<f32> = pixels.iter().map(|&pixel| f32::from(pixel) / 127.5 - 1.).collect();
        let classes: Vec<u32> = classes.iter().map(|&class| class.into()).collect();
        Ok(Self {
            pixels: Tensor::from_vec(pixels, (n, c, h, w), device)?,
            classes: Tensor::from_vec(classes, n, device)?,
        })
    }

    /// `n` images drawn at random, and their classes.
    pub fn batch(&self, n: usize, random: &mut StdRng) -> candle_core::Result<(Tensor, Tensor)> {
        let count = self.classes.elem_count() as u32;
        let ids: Vec<u32> = (0..n).map(|_| random.random_range(0..count)).collect();
        let ids = Tensor::from_vec(ids, n, &Device::Cpu)?;
        Ok((self.pixels.index_select(&ids, 0)?, self.classes.index_select(&ids, 0)?))
    }

    /// The share of the first `n` that a model gets right, in percent.
    pub fn accuracy(
        &self,
        n: usize,
        model: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<f32> {
        let count = self.classes.elem_count();
        ensure!(n <= count, "accuracy: expected {n} images or more, got {count}");
        let logits = model(&self.pixels.narrow(0, 0, n)?)?; // [N, classes]
        let right = logits.argmax(1)?.eq(&self.classes.narrow(0, 0, n)?)?;
        Ok(100. * right.to_dtype(candle_core::DType::F32)?.mean_all()?.to_scalar::<f32>()?)
    }
}

/// A text, a token a byte, in windows of `t`.
pub struct Text {
    tokens: Vec<u8>,
    t: usize,
}

impl Text {
    pub fn read(path: &Path, t: usize) -> Result<Self> {
        let tokens = bytes(path)?;
        ensure!(
            tokens.len() > t,
            "{}: expected more than the {t} bytes of a window, got {}",
            path.display(),
            tokens.len()
        );
        Ok(Self { tokens, t })
    }

    /// Its first `bytes`, a window of them at least.
    pub fn first(mut self, bytes: usize) -> Self {
        self.tokens.truncate(bytes.max(self.t + 1));
        self
    }

    /// `b` windows drawn at random, and the tokens that follow: `[B, T]` and `[B T]`, u32.
    pub fn batch(&self, b: usize, random: &mut StdRng) -> candle_core::Result<(Tensor, Tensor)> {
        let (t, mut inputs, mut targets) = (self.t, Vec::new(), Vec::new());
        for _ in 0..b {
            let start = random.random_range(0..self.tokens.len() - t);
            let window = &self.tokens[start..=start + t];
            inputs.extend(window[..t].iter().map(|&byte| u32::from(byte)));
            targets.extend(window[1..].iter().map(|&byte| u32::from(byte)));
        }
        let inputs = Tensor::from_vec(inputs, (b, t), &Device::Cpu)?;
        Ok((inputs, Tensor::from_vec(targets, b * t, &Device::Cpu)?))
    }
}
