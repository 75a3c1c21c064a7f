//! How few weights digits need: an MLP with sparse variational dropout learns which of its weights are noise. Without
//! them it is as good (Molchanov, Ashukha, Vetrov, "Variational dropout sparsifies deep neural networks", arXiv
//! 1701.05369).
//!
//!     cargo run --release -p candle-dropout-models --example variational -- --steps 600

use std::time::Instant;

use anyhow::Result;
use candle_dropout::nn::Linear;
use candle_dropout_models::{Args, Images};
use clap::Parser;

mod model;

use model::Mlp;

fn main() -> Result<()> {
    let (args, begin) = (Args::parse(), Instant::now());
    let Some(files) = args.files(model::FILES)? else { return Ok(()) };
    let [images, labels, test_images, test_labels] = files;
    let digits = Images::mnist(&images, &labels)?;
    let test = Images::mnist(&test_images, &test_labels)?;
    let percent = |mlp: &Mlp<Linear>| test.accuracy(10_000, |images| mlp.forward(images, false));

    let plain = percent(&model::plain(&digits, args.steps, args.seed)?)?;
    let mlp = model::variational(&digits, args.steps, args.seed)?;
    let (unpruned, pruned) = (percent(&mlp.unpruned())?, percent(&mlp.pruned()?)?);
    let (of_layers, of_all) = mlp.sparsity()?;
    println!("of 10000 digits are right");
    println!("  {plain:.2} % by plain layers, trained as long");
    println!("  {unpruned:.2} % by variational layers, with all weights");
    println!("  {pruned:.2} % by the same ones without {:.1} % of weights", 100. * of_all);
    println!("pruned of each layer: {of_layers:.3?}");
    println!("{:.1} s", begin.elapsed().as_secs_f64());
    Ok(())
}
