//! Characters of a book by an LSTM with too few of them to learn from: kinds of recurrent dropout beside one another,
//! and which of them keep it from learning its text by heart.
//!
//!     cargo run --release -p candle-dropout-models --example recurrent -- --steps 900
//!
//! `experiment.rs` has the sizes; `tests/recurrent.rs` asserts what is said there.

use anyhow::Result;
use candle_dropout_models::Args;
use clap::Parser;

mod experiment;
mod model;

use experiment::{KINDS, Texts};

fn main() -> Result<()> {
    let args = Args::parse();
    let Some(files) = args.files(Texts::FILES)? else { return Ok(()) };
    let texts = Texts::read(&files)?;
    println!("loss on another book after {} steps, seed {}:", args.steps, args.seed);
    for (name, dropout) in KINDS {
        println!(
            "{name:<20} {:.3}",
            experiment::test_loss(dropout, args.seed, args.steps, &texts)?
        );
    }
    Ok(())
}
