//! Sparse variational dropout on the real thing; skipped where there is no data.
//!
//!     cargo test --release -p candle-dropout-models --test variational -- --nocapture

use std::path::Path;

use anyhow::Result;
use candle_dropout::nn::Linear;
use candle_dropout_models::{Args, Images};
use clap::Parser;

#[path = "../variational/model.rs"]
mod model;

use model::Mlp;

#[test]
fn four_of_five_weights_go_and_accuracy_stays() -> Result<()> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let args = Args { data, ..Args::parse_from(["test"]) };
    let Some(files) = args.files(model::FILES)? else { return Ok(()) };
    let [images, labels, test_images, test_labels] = files;
    let digits = Images::mnist(&images, &labels)?;
    let test = Images::mnist(&test_images, &test_labels)?;
    let percent = |mlp: &Mlp<Linear>| test.accuracy(10_000, |images| mlp.forward(images, false));

    let plain = percent(&model::plain(&digits, 600, 42)?)?;
    let mlp = model::variational(&digits, 600, 42)?;
    let (unpruned, pruned) = (percent(&mlp.unpruned())?, percent(&mlp.pruned()?)?);
    let (of_layers, sparsity) = mlp.sparsity()?;
    println!("plain {plain:.2} %, unpruned {unpruned:.2} %, pruned {pruned:.2} %");
    println!("sparsity {sparsity:.3}, of the layers {of_layers:.3?}");
    assert!(unpruned > 95., "it has learned digits: {unpruned} %");
    assert!(sparsity > 0.8, "{sparsity}");
    assert!(unpruned - pruned < 0.5, "unpruned {unpruned} %, pruned {pruned} %");
    Ok(())
}
