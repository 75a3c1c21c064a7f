//! One training run and its evaluation.

mod guards;
mod model;
mod order;
mod recipe;
mod side_by_side;

use std::time::Instant;

use anyhow::Result;
use candle_core::Device;
use candle_dropout::TransformerConfig;
use candle_nn::Optimizer;
use serde::Serialize;

use super::corpus::{Document, Window, spread, windows};
pub use guards::check_guards;
pub use model::Weights;
use model::{Model, adamw, batch};
use order::window_order;
pub use recipe::{Phase, Recipe, Sites};
pub use side_by_side::side_by_side;

/// What a phase trains and is judged on, the same for every run.
#[derive(Debug)]
pub struct Task {
    pub train: Vec<Document>,
    pub dev: (Vec<Document>, Vec<Window>),
    pub test: (Vec<Document>, Vec<Window>),
    pub recipe: Recipe,
}

/// What every run of the job shares.
#[derive(Debug)]
pub struct Shared {
    pub model: TransformerConfig,
    pub sites: Sites,
    pub device: Device,
    pub eval_batch: usize,
    pub train_windows: usize,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct Run {
    pub phase: Phase,
    pub drop_p: f32,
    pub seed: u64,
}

/// Summed loss and number of tokens of every document, in nats.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    pub documents: Vec<(f64, usize)>,
}

impl Evaluation {
    pub fn loss(&self) -> f64 {
        let (sum, tokens) =
            self.documents.iter().fold((0.0, 0), |(s, n), &(sum, tokens)| (s + sum, n + tokens));
        sum / tokens as f64
    }
}

/// A model as it came out of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    pub step: usize,
    pub train_loss: f64,
    pub dev: Evaluation,
    pub test: Evaluation,
}

#[derive(Debug, Clone, Serialize)]
pub struct CurvePoint {
    pub step: usize,
    /// Mean training loss, with dropout, since the point before.
    pub batch_loss: Option<f64>,
    pub dev_loss: f64,
}

#[derive(Debug, Clone, Serialize)]
pub struct RunResult {
    pub run: Run,
    /// After all steps.
    pub last: Outcome,
    /// At the best dev loss that patience allowed to see; step 0 is a candidate.
    pub early: Outcome,
    pub curve: Vec<CurvePoint>,
    pub tokens_per_second: f64,
    pub seconds: f64,
    #[serde(skip)]
    pub weights: Weights,
}

/// Trains and evaluates; `on_step` hears of every step.
pub fn train(
    run: Run,
    task: &Task,
    shared: &Shared,
    start: Option<&Weights>,
    on_step: impl Fn(),
) -> Result<RunResult> {
    let (recipe, context, begin) =
        (&task.recipe, shared.model.max_position_embeddings, Instant::now());
    let model = Model::new(shared, &run, start)?;
    let mut adamw = adamw(&model, recipe)?;
    let order = window_order(&run, task, context)?;
    let dev = || model.evaluate(shared, &task.dev.0, &task.dev.1);

    let mut best = (0, dev()?.loss(), model.weights()?);
    let mut curve = vec![CurvePoint { step: 0, batch_loss: None, dev_loss: best.1 }];
    let (mut waited, mut sum, mut training_seconds) = (0, 0.0, 0.0);
    for (i, chunk) in order.chunks(recipe.batch).enumerate() {
        let step_begin = Instant::now();
        adamw.set_learning_rate(recipe.lr_at(i));
        let (inputs, targets) = batch(&task.train, chunk, context, &shared.device)?;
        sum += model.step(&mut adamw, &inputs, &targets, recipe.clip, true)?;
        training_seconds += step_begin.elapsed().as_secs_f64();
        on_step();
        let step = i + 1;
        if step % recipe.eval_every == 0 || step == recipe.steps {
            let since = curve.last().map_or(step, |point| step - point.step);
            let point =
                CurvePoint { step, batch_loss: Some(sum / since as f64), dev_loss: dev()?.loss() };
            sum = 0.0;
            if waited < recipe.patience {
                if point.dev_loss < best.1 {
                    (best, waited) = ((step, point.dev_loss, model.weights()?), 0);
                } else {
                    waited += 1;
                }
            }
            curve.push(point);
        }
    }

    let weights = model.weights()?;
    let seen = match run.phase {
        Phase::Pretrain => spread(&order, shared.train_windows),
        Phase::Finetune => windows(&task.train, context),
    };
    let outcome = |step| -> Result<Outcome> {
        let train_loss = model.evaluate(shared, &task.train, &seen)?.loss();
        Ok(Outcome {
            step,
            train_loss,
            dev: dev()?,
            test: model.evaluate(shared, &task.test.0, &task.test.1)?,
        })
    };
    let last = outcome(recipe.steps)?;
    let early = if best.0 == recipe.steps {
        last.clone()
    } else {
        model.restore(&best.2)?;
        outcome(best.0)?
    };
    let tokens = (order.len() * context) as f64;
    let seconds = begin.elapsed().as_secs_f64();
    Ok(RunResult {
        run,
        last,
        early,
        curve,
        tokens_per_second: tokens / training_seconds,
        seconds,
        weights,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn recipe() -> Recipe {
        Recipe {
            steps: 6,
            batch: 2,
            lr: 1e-2,
            warmup: 2,
            final_lr: 0.1,
            weight_decay: 0.0,
            clip: 1.0,
            eval_every: 2,
            patience: 1,
        }
    }

    pub fn task() -> Task {
        let documents: Vec<Document> = (0..4)
            .map(|d| Document {
                name: d.to_string(),
                text: (0..200).map(|i| b'a' + (i * (d + 1) % 7) as u8).collect(),
            })
            .collect();
        let held_out = |d: usize| (documents[d..=d].to_vec(), windows(&documents[d..=d], 8));
        Task {
            train: documents[..2].to_vec(),
            dev: held_out(2),
            test: held_out(3),
            recipe: recipe(),
        }
    }

    pub fn shared() -> Shared {
        let model = TransformerConfig {
            vocab_size: 256,
            max_position_embeddings: 8,
            hidden_size: 8,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            ..TransformerConfig::gpt2()
        };
        Shared { model, sites: Sites::All, device: Device::Cpu, eval_batch: 4, train_windows: 8 }
    }

    #[test]
    fn fine_tuning_starts_from_the_given_weights_and_keeps_the_best_by_dev() {
        let (task, shared) = (task(), shared());
        let base = train(
            Run { phase: Phase::Pretrain, drop_p: 0.0, seed: 1 },
            &task,
            &shared,
            None,
            || (),
        )
        .unwrap();
        let run = Run { phase: Phase::Finetune, drop_p: 0.1, seed: 1 };
        let tuned = train(run, &task, &shared, Some(&base.weights), || ()).unwrap();
        assert_eq!(tuned.curve[0].dev_loss, base.last.dev.loss());
        assert!(tuned.early.dev.loss() <= tuned.curve[0].dev_loss);
        assert_eq!(tuned.curve.iter().map(|p| p.step).collect::<Vec<_>>(), [0, 2, 4, 6]);
    }
}
