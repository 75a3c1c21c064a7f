//! A convolutional net with dropout, on MNIST. Each of its variables has a gradient through `candle_nn`, too: what
//! changes with the path are the masks, which here follow from a seed.
//!
//!     cargo run --release -p candle-dropout-models --example mnist

use anyhow::Result;
use candle_core::{DType, Device, ModuleT};
use candle_dropout::{nn, seeded_var_builder, set_seed};
use candle_dropout_models::{Args, Images, print_changed_lines, train};
use clap::Parser;

mod model;
// `mod before`: model.rs with `candle_nn` in place of `candle_dropout::nn`; and CHANGED_LINES, in how many lines.
include!(concat!(env!("OUT_DIR"), "/mnist.rs"));

const BATCH: usize = 64;

fn main() -> Result<()> {
    let args = Args::parse();
    let Some([images, labels, test_images, test_labels]) = args.files([
        "mnist/train-images-idx3-ubyte.gz",
        "mnist/train-labels-idx1-ubyte.gz",
        "mnist/t10k-images-idx3-ubyte.gz",
        "mnist/t10k-labels-idx1-ubyte.gz",
    ])?
    else {
        return Ok(());
    };
    let images = Images::mnist(&images, &labels)?;
    let test = Images::mnist(&test_images, &test_labels)?;
    print_changed_lines("model.rs", CHANGED_LINES);
    let size = (args.steps, BATCH, "images");

    let vars = nn::VarMap::new();
    let vb = seeded_var_builder(&vars, args.seed, DType::F32, &Device::Cpu);
    let (model, mut batches) = (before::Cnn::new(vb)?, args.batches());
    let adamw = candle_nn::AdamW::new_lr(vars.all_vars(), 1e-3)?;
    train("before, candle_nn", size, &vars, adamw, || {
        let (images, classes) = images.batch(BATCH, &mut batches)?;
        candle_nn::loss::cross_entropy(&model.forward_t(&images, true)?, &classes)
    })?;

    set_seed(args.seed);
    let vars = nn::VarMap::new();
    let vb = seeded_var_builder(&vars, args.seed, DType::F32, &Device::Cpu);
    let (model, mut batches) = (model::Cnn::new(vb)?, args.batches());
    let adamw = nn::AdamW::new_lr(vars.all_vars(), 1e-3)?;
    train("after, candle_dropout::nn", size, &vars, adamw, || {
        let (images, classes) = images.batch(BATCH, &mut batches)?;
        nn::loss::cross_entropy(&model.forward_t(&images, true)?, &classes)
    })?;
    let accuracy = test.accuracy(1000, |images| model.forward_t(images, false))?;
    println!("after, candle_dropout::nn: {accuracy:.1} % of 1000 test images are right");
    Ok(())
}
