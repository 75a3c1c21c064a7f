//! candle-transformers' own model files, small and with random weights, through `candle_nn` and, with this one path
//! changed, through `candle_dropout::nn`: which of their variables receive a gradient.
//!
//!     cargo test --release -p candle-dropout-models --features candle-transformers -- --nocapture

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::seeded_var_builder;
use candle_dropout::training::named_vars;
use candle_dropout_models::Gradients;
use candle_nn::{VarBuilder, VarMap};

// `mod before` and `mod after`: the files as they are, and with `candle_dropout::nn` in place of `candle_nn`; and
// CHANGED_LINES of each, in itself and in the files that it needs.
extern crate candle_core as candle;
include!(concat!(env!("OUT_DIR"), "/candle_transformers.rs"));

/// What is run of each model is one text, for either module.
mod through_candle {
    use crate::before::models;
    use candle_nn as nn;
    include!("runs.rs");
}

mod through_ours {
    use crate::after::models;
    use candle_dropout::nn;
    include!("runs.rs");
}

/// A model, built and run once: its output.
type Run = fn(VarBuilder) -> Result<Tensor>;

/// The gradients of a weighted sum of the output: of a plain one a final LayerNorm hides everything.
fn gradients(run: Run) -> Result<Gradients> {
    let vars = VarMap::new();
    let run = || run(seeded_var_builder(&vars, 3, DType::F32, &Device::Cpu));
    let wave = |count: usize, step: f32| {
        Tensor::from_iter((0..count).map(|at| (step * (at + 1) as f32).sin()), &Device::Cpu)
    };
    // Weights that wait for a checkpoint are made as zeros, behind which no gradient is anything else. Not by much:
    // ConvNeXt takes the root of a channel's sum of squares, whose gradient is NaN where GELU leaves only zeros.
    run()?;
    for var in named_vars(&vars)?.values() {
        let other = (wave(var.elem_count(), 0.7)? * 0.02)?.reshape(var.shape())?;
        var.set(&(var.as_tensor() + other)?)?;
    }
    let output = run()?.flatten_all()?;
    let weights = wave(output.elem_count(), 1.7)?;
    Gradients::of(&(output * weights)?.sum_all()?, &vars)
}

/// Model, variables, how many have no gradient through `candle_nn`, and in how many lines of the model's file, and of
/// the files that it needs, the path changes. Through `candle_dropout::nn` no variable is without a gradient.
const EXPECTED: [(&str, usize, usize, (usize, usize)); 13] = [
    ("bert", 43, 41, (2, 19)),
    ("bigcode", 28, 27, (2, 0)),
    ("convnext", 152, 150, (1, 0)),
    ("dinov2", 36, 34, (7, 0)),
    ("distilbert", 41, 39, (6, 19)),
    ("gemma", 20, 4, (8, 0)),
    ("llama", 21, 20, (4, 19)),
    ("llama2_c", 21, 20, (3, 0)),
    ("mistral", 21, 8, (9, 19)),
    ("phi", 33, 31, (3, 19)),
    ("qwen2", 26, 25, (6, 19)),
    ("t5", 47, 16, (6, 19)),
    ("vit", 40, 18, (7, 19)),
];

/// How many lines change, in a model's file and in those that it needs.
fn changed_lines(model: &str) -> Option<(usize, usize)> {
    CHANGED_LINES.iter().find(|(name, ..)| *name == model).map(|&(_, own, needed)| (own, needed))
}

#[test]
fn every_variable_learns_through_nn() -> Result<()> {
    println!(
        "| model | variables | without a gradient, candle_nn | candle_dropout::nn \
        | lines changed in its file | in files that it needs |"
    );
    println!("|---|---|---|---|---|---|");
    let (mut found, mut wrong) = (Vec::new(), Vec::new());
    for ((name, candles), (_, ours)) in through_candle::ALL.into_iter().zip(through_ours::ALL) {
        let (before, after) = (gradients(candles)?, gradients(ours)?);
        let count = before.with + before.without.len();
        let (own, needed) = changed_lines(name).expect("build.rs has counted the lines of each");
        println!(
            "| {name} | {count} | {} | {} | {own} | {needed} |",
            before.without.len(),
            after.without.len()
        );
        found.push((name, count, before.without.len(), (own, needed)));
        assert_eq!(after.with + after.without.len() + after.not_finite.len(), count, "{name}");
        wrong.extend(after.not_finite.iter().map(|var| format!("{name}: {var} is not finite")));
        wrong.extend(after.without.iter().map(|var| format!("{name}: {var} has none")));
    }
    assert_eq!(wrong, [""; 0], "gradients through candle_dropout::nn");
    assert_eq!(found, EXPECTED);
    Ok(())
}
