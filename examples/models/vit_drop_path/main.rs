//! A small ViT with stochastic depth on 5,000 images of CIFAR-10. Through `candle_nn` only what no norm and no
//! `softmax_last_dim` lies behind learns: most of the model stays as it was made.
//!
//!     cargo run --release -p candle-dropout-models --example vit_drop_path

use std::sync::Arc;

use anyhow::Result;
use candle_core::{DType, Device, ModuleT};
use candle_dropout::{MaskGenerator, nn, seeded_var_builder};
use candle_dropout_models::{Args, Images, print_changed_lines, train};
use clap::Parser;

mod model;
// `mod before`: model.rs with `candle_nn` in place of `candle_dropout::nn`; and CHANGED_LINES, in how many lines.
include!(concat!(env!("OUT_DIR"), "/vit_drop_path.rs"));

const BATCH: usize = 16;

fn main() -> Result<()> {
    let args = Args::parse();
    let data = ["cifar10_sub/train5000.bin.gz", "cifar10_sub/test2000.bin.gz"];
    let Some([images, test]) = args.files(data)? else { return Ok(()) };
    let (images, test) = (Images::cifar(&images)?, Images::cifar(&test)?);
    print_changed_lines("model.rs", CHANGED_LINES);
    let size = (args.steps, BATCH, "images");

    let vars = nn::VarMap::new();
    let generator = Arc::new(MaskGenerator::new(args.seed));
    let vb = seeded_var_builder(&vars, args.seed, DType::F32, &Device::Cpu);
    let (model, mut batches) = (before::Vit::new(0.1, &generator, vb)?, args.batches());
    let adamw = candle_nn::AdamW::new_lr(vars.all_vars(), 1e-3)?;
    train("before, candle_nn", size, &vars, adamw, || {
        let (images, classes) = images.batch(BATCH, &mut batches)?;
        candle_nn::loss::cross_entropy(&model.forward_t(&images, true)?, &classes)
    })?;

    let vars = nn::VarMap::new();
    let generator = Arc::new(MaskGenerator::new(args.seed));
    let vb = seeded_var_builder(&vars, args.seed, DType::F32, &Device::Cpu);
    let (model, mut batches) = (model::Vit::new(0.1, &generator, vb)?, args.batches());
    let adamw = nn::AdamW::new_lr(vars.all_vars(), 1e-3)?;
    train("after, candle_dropout::nn", size, &vars, adamw, || {
        let (images, classes) = images.batch(BATCH, &mut batches)?;
        nn::loss::cross_entropy(&model.forward_t(&images, true)?, &classes)
    })?;
    let accuracy = test.accuracy(500, |images| model.forward_t(images, false))?;
    println!("after, candle_dropout::nn: {accuracy:.1} % of 500 test images are right");
    Ok(())
}
