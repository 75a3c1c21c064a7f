//! Rates of dropout that learn, on the synthetic data of the paper: the more there is to learn from, the less is
//! dropped (figure 2 of Gal, Hron, Kendall, "Concrete dropout", arXiv 1705.07832).
//!
//!     cargo run --release -p candle-dropout-models --example concrete_dropout -- --steps 2000

use anyhow::Result;
use candle_dropout_models::Args;
use clap::Parser;

mod model;

fn main() -> Result<()> {
    let args = Args::parse();
    for n in [10, 100, 1000, 10_000] {
        let (drop_ps, rmse) = model::learnt(n, args.steps, args.seed)?;
        println!("{n:6} samples: rates {drop_ps:.3?}, error on others {rmse:.3}");
    }
    Ok(())
}
