//! nanoGPT on Shakespeare, a token a byte. Through `candle_nn` only the head learns: norms and `softmax_last_dim` end
//! the graph without a word.
//!
//!     cargo run --release -p candle-dropout-models --example nanogpt

use anyhow::Result;
use candle_core::{DType, Device, ModuleT};
use candle_dropout::{nn, seeded_var_builder, set_seed};
use candle_dropout_models::{Args, Text, print_changed_lines, train};
use clap::Parser;

mod model;
// `mod before`: model.rs with `candle_nn` in place of `candle_dropout::nn`; and CHANGED_LINES, in how many lines.
include!(concat!(env!("OUT_DIR"), "/nanogpt.rs"));

const BATCH: (usize, usize) = (8, 128);
const SIZE: (usize, usize, usize) = (4, 4, 128); // layers, heads, width

fn main() -> Result<()> {
    let args = Args::parse();
    let Some([text]) = args.files(["lm/tinyshakespeare.txt"])? else { return Ok(()) };
    let text = Text::read(&text, BATCH.1)?;
    print_changed_lines("model.rs", CHANGED_LINES);
    let size = (args.steps, BATCH.0 * BATCH.1, "tokens");
    let (layers, heads, width) = SIZE;

    let vars = nn::VarMap::new();
    let vb = seeded_var_builder(&vars, args.seed, DType::F32, &Device::Cpu);
    let config = before::Config { vocab: 256, block: BATCH.1, layers, heads, width, drop_p: 0.1 };
    let (model, mut batches) = (before::Gpt::new(&config, vb)?, args.batches());
    let adamw = candle_nn::AdamW::new_lr(vars.all_vars(), 1e-3)?;
    train("before, candle_nn", size, &vars, adamw, || {
        let (inputs, targets) = text.batch(BATCH.0, &mut batches)?;
        let logits = model.forward_t(&inputs, true)?.flatten_to(1)?;
        candle_nn::loss::cross_entropy(&logits, &targets)
    })?;

    set_seed(args.seed);
    let vars = nn::VarMap::new();
    let vb = seeded_var_builder(&vars, args.seed, DType::F32, &Device::Cpu);
    let config = model::Config { vocab: 256, block: BATCH.1, layers, heads, width, drop_p: 0.1 };
    let (model, mut batches) = (model::Gpt::new(&config, vb)?, args.batches());
    let adamw = nn::AdamW::new_lr(vars.all_vars(), 1e-3)?;
    train("after, candle_dropout::nn", size, &vars, adamw, || {
        let (inputs, targets) = text.batch(BATCH.0, &mut batches)?;
        let logits = model.forward_t(&inputs, true)?.flatten_to(1)?;
        nn::loss::cross_entropy(&logits, &targets)
    })
}
