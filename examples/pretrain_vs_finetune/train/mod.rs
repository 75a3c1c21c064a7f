//! One training run and its evaluation.

mod guards;
mod model;
mod order;
mod recipe;
mod side_by_side;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::Device;
use candle_dropout::TransformerConfig;
use candle_dropout::training::Optimizer;
use serde::Serialize;

use super::corpus::{Document, Window, spread, windows};
pub use guards::check_guards;
pub use model::Weights;
use model::{Model, adamw, batch};
use order::window_order;
pub use recipe::{Phase, Recipe, Sites};
pub use side_by_side::side_by_side;

/// What an arm trains and is judged on, the same for every run. Arms share text, so a copy is cheap.
#[derive(Debug, Clone)]
pub struct Task {
    pub train: Arc<Vec<Document>>,
    pub dev: Arc<(Vec<Document>, Vec<Window>)>,
    pub test: Arc<(Vec<Document>, Vec<Window>)>,
    pub recipe: Recipe,
    /// The step at which an arm of a fixed number of steps takes the model; `recipe.steps` at most.
    pub fixed_step: usize,
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
    /// Before the first step.
    pub start: Outcome,
    /// After the number of steps that the arm fixes.
    pub fixed: Outcome,
    /// At the best dev loss that patience allowed to see; step 0 is a candidate.
    pub early: Outcome,
    pub curve: Vec<CurvePoint>,
    pub tokens_per_second: f64,
    pub seconds: f64,
    /// Those of `fixed`.
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
    let (context, begin) = (shared.model.max_position_embeddings, Instant::now());
    let model = Model::new(shared, &run, start)?;
    let mut fit = fit(&model, &run, task, shared, on_step)?;
    let seen = match run.phase {
        Phase::Pretrain => spread(&fit.order, shared.train_windows),
        Phase::Finetune => windows(&task.train, context),
    };
    let mut outcomes = BTreeMap::new();
    for (&step, weights) in &fit.kept {
        model.restore(weights)?;
        let outcome = Outcome {
            step,
            train_loss: model.evaluate(shared, &task.train, &seen)?.loss(),
            dev: model.evaluate(shared, &task.dev.0, &task.dev.1)?,
            test: model.evaluate(shared, &task.test.0, &task.test.1)?,
        };
        outcomes.insert(step, outcome);
    }
    let outcome = |step| outcomes.get(&step).cloned().context("a step that was not kept");
    let tokens = (fit.steps * task.recipe.batch * context) as f64;
    Ok(RunResult {
        run,
        start: outcome(0)?,
        fixed: outcome(task.fixed_step)?,
        early: outcome(fit.best_step)?,
        weights: fit.kept.remove(&task.fixed_step).context("the weights of the fixed step")?,
        curve: fit.curve,
        tokens_per_second: tokens / fit.training_seconds,
        seconds: begin.elapsed().as_secs_f64(),
    })
}

/// The learning curve alone: nothing is read but training text and dev.
pub fn learning_curve(
    run: Run,
    task: &Task,
    shared: &Shared,
    start: Option<&Weights>,
    on_step: impl Fn(),
) -> Result<Vec<CurvePoint>> {
    Ok(fit(&Model::new(shared, &run, start)?, &run, task, shared, on_step)?.curve)
}

struct Fit {
    order: Vec<Window>,
    curve: Vec<CurvePoint>,
    best_step: usize,
    /// Those that were done.
    steps: usize,
    /// The weights of the start, of the fixed step and of the best.
    kept: BTreeMap<usize, Weights>,
    training_seconds: f64,
}

fn fit(model: &Model, run: &Run, task: &Task, shared: &Shared, on_step: impl Fn()) -> Result<Fit> {
    let (recipe, context) = (&task.recipe, shared.model.max_position_embeddings);
    let (mut adamw, schedule) = (adamw(model, recipe)?, recipe.schedule()?);
    let order = window_order(run, task, context)?;
    let dev_loss =
        || Ok::<_, anyhow::Error>(model.evaluate(shared, &task.dev.0, &task.dev.1)?.loss());

    let mut kept = BTreeMap::from([(0, model.weights()?)]);
    let mut best = (0, dev_loss()?);
    let mut curve = vec![CurvePoint { step: 0, batch_loss: None, dev_loss: best.1 }];
    let (mut waited, mut sum, mut training_seconds) = (0, 0.0, 0.0);
    let mut steps = 0;
    for (i, chunk) in order.chunks(recipe.batch).enumerate() {
        let step_begin = Instant::now();
        adamw.set_learning_rate(schedule.at(i));
        let (inputs, targets) = batch(&task.train, chunk, context, &shared.device)?;
        sum += model.step(&mut adamw, &inputs, &targets, true)?;
        training_seconds += step_begin.elapsed().as_secs_f64();
        on_step();
        let step = i + 1;
        let is_fixed = step == task.fixed_step;
        if is_fixed {
            kept.insert(step, model.weights()?);
        }
        if step % recipe.eval_every == 0 || is_fixed || step == recipe.steps {
            let since = curve.last().map_or(step, |point| step - point.step);
            let point =
                CurvePoint { step, batch_loss: Some(sum / since as f64), dev_loss: dev_loss()? };
            sum = 0.0;
            if waited < recipe.patience {
                if point.dev_loss < best.1 {
                    if ![0, task.fixed_step].contains(&best.0) {
                        kept.remove(&best.0);
                    }
                    kept.insert(step, model.weights()?);
                    (best, waited) = ((step, point.dev_loss), 0);
                } else {
                    waited += 1;
                }
            }
            curve.push(point);
        }
        steps = step;
        if step >= task.fixed_step && waited >= recipe.patience {
            break;
        }
    }
    // Who counts steps expects all of them.
    (steps..recipe.steps).for_each(|_| on_step());
    Ok(Fit { order, curve, best_step: best.0, steps, kept, training_seconds })
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
        let held_out =
            |d: usize| Arc::new((documents[d..=d].to_vec(), windows(&documents[d..=d], 8)));
        Task {
            train: Arc::new(documents[..2].to_vec()),
            dev: held_out(2),
            test: held_out(3),
            recipe: recipe(),
            fixed_step: recipe().steps,
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

    fn base(task: &Task) -> RunResult {
        let run = Run { phase: Phase::Pretrain, drop_p: 0.0, seed: 1 };
        train(run, task, &shared(), None, || ()).unwrap()
    }

    fn bits(weights: &Weights) -> Vec<Vec<u32>> {
        let bits = |tensor: &candle_core::Tensor| {
            let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values.into_iter().map(f32::to_bits).collect()
        };
        weights.values().map(bits).collect()
    }

    #[test]
    fn fine_tuning_starts_from_the_given_weights_and_keeps_the_best_by_dev() {
        let (task, shared) = (task(), shared());
        let base = base(&task);
        let run = Run { phase: Phase::Finetune, drop_p: 0.1, seed: 1 };
        let tuned = train(run, &task, &shared, Some(&base.weights), || ()).unwrap();
        assert_eq!(tuned.start.dev.loss(), base.fixed.dev.loss());
        assert_eq!(tuned.start.test.loss(), base.fixed.test.loss());
        assert_eq!(tuned.curve[0].dev_loss, base.fixed.dev.loss());
        assert!(tuned.early.dev.loss() <= tuned.curve[0].dev_loss);
        assert_eq!(tuned.curve.iter().map(|p| p.step).collect::<Vec<_>>(), [0, 2, 4, 6]);
    }

    #[test]
    fn a_run_ends_when_patience_does_but_not_before_its_fixed_step() {
        let shared = shared();
        let run = Run { phase: Phase::Finetune, drop_p: 0.0, seed: 1 };
        // So high a learning rate that nothing after the first point is better.
        let recipe = Recipe { steps: 40, lr: 3.0, warmup: 0, clip: 1e9, ..recipe() };
        let steps_of = |fixed_step| {
            let task = Task { recipe: recipe.clone(), fixed_step, ..task() };
            let counted = std::cell::Cell::new(0);
            let result =
                train(run, &task, &shared, None, || counted.set(counted.get() + 1)).unwrap();
            assert_eq!(counted.get(), 40);
            (result.curve.last().unwrap().step, result.early.step, result.fixed.step)
        };
        assert_eq!(steps_of(40), (40, 0, 40));
        assert_eq!(steps_of(8), (8, 0, 8));
        assert_eq!(steps_of(1), (1, 0, 1));
    }

    #[test]
    fn the_fixed_step_of_a_longer_run_is_the_end_of_a_shorter_one() {
        let (shared, whole) = (shared(), Recipe { final_lr: 1.0, ..recipe() });
        let base = base(&task());
        let run = Run { phase: Phase::Finetune, drop_p: 0.1, seed: 1 };
        let tuned = |steps, fixed_step| {
            let task = Task { recipe: Recipe { steps, ..whole.clone() }, fixed_step, ..task() };
            train(run, &task, &shared, Some(&base.weights), || ()).unwrap()
        };
        let (long, short) = (tuned(6, 3), tuned(3, 3));
        assert_eq!((long.fixed.step, short.fixed.step), (3, 3));
        assert_eq!(long.fixed.test.documents, short.fixed.test.documents);
        assert_eq!(bits(&long.weights), bits(&short.weights));
        assert_eq!(long.curve.iter().map(|p| p.step).collect::<Vec<_>>(), [0, 2, 3, 4, 6]);
        let curve = learning_curve(
            run,
            &Task { recipe: whole, fixed_step: 3, ..task() },
            &shared,
            Some(&base.weights),
            || (),
        );
        let losses = |curve: &[CurvePoint]| curve.iter().map(|p| p.dev_loss).collect::<Vec<_>>();
        assert_eq!(losses(&curve.unwrap()), losses(&long.curve));
    }
}
