//! All rates of one way to train, compared.

use serde::Serialize;

use super::super::stats::{PairedDifference, bootstrap_documents, holm, mean, standard_error};
use super::super::train::{Evaluation, Outcome, Phase, RunResult};

const BOOTSTRAP_DRAWS: usize = 10_000;

/// One rate in one arm.
#[derive(Debug, Serialize)]
pub struct Row {
    pub drop_p: f32,
    pub train: Spread,
    pub dev: Spread,
    pub test: Spread,
    /// Held-out loss less training loss, both without dropout.
    pub gap: Spread,
    /// Judged loss less that of p = 0 in the same seed; none for p = 0.
    pub difference: Option<PairedDifference>,
    /// 95 % interval of the same when documents are redrawn.
    pub documents: Option<(f64, f64)>,
    /// Of fine-tuning: judged loss less that of the same seed before fine-tuning.
    pub to_base: Option<PairedDifference>,
    pub step: f64,
    pub tokens_per_second: f64,
}

#[derive(Debug, Serialize)]
pub struct Spread {
    pub mean: f64,
    pub standard_error: Option<f64>,
    pub values: Vec<f64>,
}

impl Spread {
    fn new(values: Vec<f64>) -> Self {
        Self { mean: mean(&values), standard_error: standard_error(&values), values }
    }
}

/// The models that fine-tuning starts from, one a seed.
#[derive(Debug, Serialize)]
pub struct Base {
    /// On the text of fine-tuning.
    pub train: Spread,
    pub dev: Spread,
    pub test: Spread,
}

impl Base {
    pub fn new(finetuned: &[RunResult]) -> Self {
        let starts: Vec<&Outcome> = finetuned
            .iter()
            .filter(|result| result.run.drop_p == 0.0)
            .map(|result| &result.start)
            .collect();
        let spread = |loss: fn(&Outcome) -> f64| {
            Spread::new(starts.iter().map(|start| loss(start)).collect())
        };
        Self {
            train: spread(|start| start.train_loss),
            dev: spread(|start| start.dev.loss()),
            test: spread(|start| start.test.loss()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Holds,
    Fails,
    #[serde(rename = "not resolved")]
    NotResolved,
}

/// All rates of one way to train, judged on one held-out split.
#[derive(Debug, Serialize)]
pub struct Arm {
    pub name: &'static str,
    pub judged_on: &'static str,
    pub hypothesis: String,
    pub verdict: Verdict,
    /// Over the training text, up to the step that `p = 0` is judged at.
    pub epochs: f64,
    /// Every rate that dev cannot tell from the one with the lowest mean dev loss.
    pub best_p: Vec<f32>,
    pub lowest_dev_p: f32,
    pub seeds: usize,
    pub documents: usize,
    pub rows: Vec<Row>,
}

#[derive(Debug, Clone, Copy)]
pub enum Judge {
    Dev,
    Test,
}

impl Judge {
    fn evaluation(self, outcome: &Outcome) -> &Evaluation {
        match self {
            Self::Dev => &outcome.dev,
            Self::Test => &outcome.test,
        }
    }
}

/// How an arm is judged.
#[derive(Clone)]
pub struct Plan<'a> {
    pub name: &'static str,
    pub judge: Judge,
    pub hypothesis: String,
    pub runs: &'a [RunResult],
    pub outcome: fn(&RunResult) -> &Outcome,
    pub verdict: fn(&[Row]) -> Verdict,
    pub epochs_a_step: f64,
}

impl Arm {
    pub fn new(plan: Plan) -> Self {
        let Plan { name, judge, hypothesis, runs, outcome, verdict, epochs_a_step } = plan;
        let mut rates: Vec<f32> = runs.iter().map(|run| run.run.drop_p).collect();
        rates.sort_by(f32::total_cmp);
        rates.dedup();
        // Runs come in the order of their seeds, so equal positions are pairs.
        let of_rate = |p: f32| -> Vec<Outcome> {
            runs.iter().filter(|run| run.run.drop_p == p).map(outcome).cloned().collect()
        };
        let collect = |outcomes: &[Outcome], f: &dyn Fn(&Outcome) -> f64| {
            outcomes.iter().map(f).collect::<Vec<f64>>()
        };
        let base = of_rate(0.0);
        let judged = |o: &Outcome| judge.evaluation(o).loss();

        let mut differences: Vec<PairedDifference> = rates
            .iter()
            .filter(|&&p| p > 0.0)
            .map(|&p| {
                PairedDifference::new(&subtract(
                    &collect(&of_rate(p), &judged),
                    &collect(&base, &judged),
                ))
            })
            .collect();
        holm(&mut differences);
        let mut differences = differences.into_iter();

        let row = |p: f32| {
            let outcomes = of_rate(p);
            let finetuned: Vec<f64> = runs
                .iter()
                .filter(|run| run.run.drop_p == p && run.run.phase == Phase::Finetune)
                .map(|run| judged(outcome(run)) - judged(&run.start))
                .collect();
            let documents = |outcomes: &[Outcome]| -> Vec<(f64, usize)> {
                let first = &judge.evaluation(&outcomes[0]).documents;
                let sum = |d: usize| {
                    outcomes.iter().map(|o| judge.evaluation(o).documents[d].0).sum::<f64>()
                };
                first
                    .iter()
                    .enumerate()
                    .map(|(d, &(_, tokens))| (sum(d) / outcomes.len() as f64, tokens))
                    .collect()
            };
            let speeds: Vec<f64> = runs
                .iter()
                .filter(|run| run.run.drop_p == p)
                .map(|run| run.tokens_per_second)
                .collect();
            Row {
                drop_p: p,
                train: Spread::new(collect(&outcomes, &|o| o.train_loss)),
                dev: Spread::new(collect(&outcomes, &|o| o.dev.loss())),
                test: Spread::new(collect(&outcomes, &|o| o.test.loss())),
                gap: Spread::new(collect(&outcomes, &|o| judged(o) - o.train_loss)),
                difference: if p > 0.0 { differences.next() } else { None },
                documents: (p > 0.0)
                    .then(|| {
                        bootstrap_documents(
                            &documents(&outcomes),
                            &documents(&base),
                            BOOTSTRAP_DRAWS,
                            0,
                        )
                    })
                    .flatten(),
                to_base: (!finetuned.is_empty()).then(|| PairedDifference::new(&finetuned)),
                step: mean(&collect(&outcomes, &|o| o.step as f64)),
                tokens_per_second: mean(&speeds),
            }
        };
        let rows: Vec<Row> = rates.iter().copied().map(row).collect();
        let (lowest_dev_p, best_p) = best_set(&rows);
        Self {
            name,
            judged_on: match judge {
                Judge::Dev => "dev",
                Judge::Test => "test",
            },
            hypothesis,
            verdict: verdict(&rows),
            best_p,
            lowest_dev_p,
            epochs: epochs_a_step * mean(&collect(&base, &|o| o.step as f64)),
            seeds: base.len(),
            documents: base.first().map_or(0, |o| judge.evaluation(o).documents.len()),
            rows,
        }
    }
}

fn subtract(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// The rate of the lowest mean dev loss, and every rate whose paired interval against it contains
/// 0.
fn best_set(rows: &[Row]) -> (f32, Vec<f32>) {
    let Some(lowest) = rows.iter().min_by(|a, b| a.dev.mean.total_cmp(&b.dev.mean)) else {
        return (0.0, Vec::new());
    };
    let ties = |row: &&Row| {
        PairedDifference::new(&subtract(&row.dev.values, &lowest.dev.values)).contains_zero()
    };
    (lowest.drop_p, rows.iter().filter(ties).map(|row| row.drop_p).collect())
}
