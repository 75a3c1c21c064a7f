//! Candle's training example for llama2-c, mended: candle-transformers' own `llama2_c.rs`, with one path changed, a
//! token a byte. Through `candle_nn` its norms end the graph, so that the head alone learns.
//!
//!     cargo run --release -p candle-dropout-models --features candle-transformers --example llama2c
//!
//! What candle's example lacks besides: its variables reach no optimiser, since they are made of zeros; and a
//! `VarBuilder` that makes what it is asked for makes the tables of the rotary embedding of random numbers.

use std::collections::HashMap;

use anyhow::Result;
use candle_core::{DType, Device};
use candle_dropout::{nn, seeded_var_builder};
use candle_dropout_models::{Args, Text, print_changed_lines, train};
use clap::Parser;

// `mod before` and `mod after`: the file as it is, and with `candle_dropout::nn` in place of `candle_nn`; and
// CHANGED_LINES, in how many lines.
extern crate candle_core as candle;
include!(concat!(env!("OUT_DIR"), "/llama2c.rs"));
use {after::models::llama2_c, before::models::llama2_c as candles};

const BATCH: (usize, usize) = (8, 128);

/// The sizes of a model, in the `Config` of either module.
macro_rules! config {
    ($model:ident) => {
        $model::Config {
            dim: 128,
            hidden_dim: 352,
            n_layers: 4,
            n_heads: 4,
            n_kv_heads: 4,
            vocab_size: 256,
            seq_len: BATCH.1,
            norm_eps: 1e-5,
        }
    };
}

fn main() -> Result<()> {
    let args = Args::parse();
    let Some([text]) = args.files(["lm/tinyshakespeare.txt"])? else { return Ok(()) };
    let text = Text::read(&text, BATCH.1)?;
    print_changed_lines("llama2_c.rs", CHANGED_LINES);
    let size = (args.steps, BATCH.0 * BATCH.1, "tokens");
    // No tensor is in it, so the tables are computed.
    let no_tables = || nn::VarBuilder::from_tensors(HashMap::new(), DType::F32, &Device::Cpu);

    let vars = nn::VarMap::new();
    let vb = seeded_var_builder(&vars, args.seed, DType::F32, &Device::Cpu);
    let mut cache = candles::Cache::new(false, &config!(candles), no_tables())?;
    let (model, mut batches) = (candles::Llama::load(vb, config!(candles))?, args.batches());
    let adamw = candle_nn::AdamW::new_lr(vars.all_vars(), 1e-3)?;
    train("before, candle_nn", size, &vars, adamw, || {
        let (inputs, targets) = text.batch(BATCH.0, &mut batches)?;
        let logits = model.forward(&inputs, 0, &mut cache)?.flatten_to(1)?;
        candle_nn::loss::cross_entropy(&logits, &targets)
    })?;

    let vars = nn::VarMap::new();
    let vb = seeded_var_builder(&vars, args.seed, DType::F32, &Device::Cpu);
    let mut cache = llama2_c::Cache::new(false, &config!(llama2_c), no_tables())?;
    let (model, mut batches) = (llama2_c::Llama::load(vb, config!(llama2_c))?, args.batches());
    let adamw = nn::AdamW::new_lr(vars.all_vars(), 1e-3)?;
    train("after, candle_dropout::nn", size, &vars, adamw, || {
        let (inputs, targets) = text.batch(BATCH.0, &mut batches)?;
        let logits = model.forward(&inputs, 0, &mut cache)?.flatten_to(1)?;
        nn::loss::cross_entropy(&logits, &targets)
    })
}
