//! What came out: a table for people, JSON with every number, a plot.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;
use serde::Serialize;

use super::corpus::{GUARD_BYTES, Splits};
use super::settings::Settings;
use super::stats::{PairedDifference, bootstrap_documents, holm, mean, standard_error};
use super::train::{Evaluation, Outcome, Phase, RunResult};

const BOOTSTRAP_DRAWS: usize = 10_000;

/// The text of a job.
#[derive(Debug, Serialize)]
pub struct TextReport {
    fnv1a_64: String,
    pretrain_bytes: [usize; 3],
    finetune_bytes: [usize; 3],
    pretrain_epochs: f64,
    finetune_epochs: f64,
    held_out: Vec<HeldOut>,
}

#[derive(Debug, Serialize)]
struct HeldOut {
    phase: Phase,
    split: String,
    windows: usize,
    /// Removed because they occur in training text.
    removed: usize,
    /// Evaluated, evenly spaced among the rest.
    used: usize,
}

impl TextReport {
    pub fn new(hash: u64, pretrain: &Splits, finetune: &Splits, settings: &Settings) -> Self {
        let epochs = |recipe: &super::train::Recipe, bytes: usize| {
            (recipe.steps * recipe.batch * settings.context) as f64 / bytes as f64
        };
        let (pretrain_bytes, finetune_bytes) = (pretrain.bytes(), finetune.bytes());
        Self {
            fnv1a_64: format!("{hash:016x}"),
            pretrain_epochs: epochs(&settings.pretrain, pretrain_bytes[0]),
            finetune_epochs: epochs(&settings.finetune, finetune_bytes[0]),
            pretrain_bytes,
            finetune_bytes,
            held_out: Vec::new(),
        }
    }

    pub fn held_out(&mut self, phase: Phase, split: &str, [used, clean, removed]: [usize; 3]) {
        let split = split.to_string();
        let windows = clean + removed;
        self.held_out.push(HeldOut { phase, split, windows, removed, used });
    }

    pub fn print(&self) {
        println!("text: FNV-1a {} over names and bytes", self.fnv1a_64);
        for (name, [train, dev, test], epochs) in [
            ("pretraining", self.pretrain_bytes, self.pretrain_epochs),
            ("fine-tuning", self.finetune_bytes, self.finetune_epochs),
        ] {
            println!("  {name}: train {train} bytes ({epochs:.2} epochs), dev {dev}, test {test}");
        }
        for HeldOut { phase, split, windows, removed, used } in &self.held_out {
            let phase = format!("{phase:?}").to_lowercase();
            println!(
                "  {phase} {split}: {used} windows, of {windows} less {removed} that share {GUARD_BYTES} bytes with \
                 training text"
            );
        }
    }
}

/// One rate in one arm.
#[derive(Debug, Serialize)]
struct Row {
    drop_p: f32,
    train: Spread,
    dev: Spread,
    test: Spread,
    /// Held-out loss less training loss, both without dropout.
    gap: Spread,
    /// Judged loss less that of p = 0 in the same seed; none for p = 0.
    difference: Option<PairedDifference>,
    /// 95 % interval of the same when documents are redrawn.
    documents: Option<(f64, f64)>,
    step: f64,
    tokens_per_second: f64,
}

#[derive(Debug, Serialize)]
struct Spread {
    mean: f64,
    standard_error: Option<f64>,
    values: Vec<f64>,
}

impl Spread {
    fn new(values: Vec<f64>) -> Self {
        Self { mean: mean(&values), standard_error: standard_error(&values), values }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Holds,
    Fails,
    #[serde(rename = "not resolved")]
    NotResolved,
}

/// All rates of one way to train, judged on one held-out split.
#[derive(Debug, Serialize)]
struct Arm {
    name: &'static str,
    judged_on: &'static str,
    hypothesis: &'static str,
    verdict: Verdict,
    /// Every rate that dev cannot tell from the one with the lowest mean dev loss.
    best_p: Vec<f32>,
    lowest_dev_p: f32,
    /// Mean dev loss of the models that the runs start from.
    dev_at_start: f64,
    seeds: usize,
    documents: usize,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
pub struct Report {
    settings: Settings,
    text: TextReport,
    arms: Vec<Arm>,
    runs: Vec<RunResult>,
    notes: Vec<&'static str>,
    seconds: f64,
}

impl Report {
    pub fn new(
        settings: &Settings,
        text: TextReport,
        pretrained: Vec<RunResult>,
        finetuned: Vec<RunResult>,
        elapsed: Duration,
    ) -> Self {
        let in_window = |p: f32| (0.05..=0.2).contains(&p);
        let some_lower = |rows: &[Row]| {
            let signs = || {
                rows.iter()
                    .filter(|row| in_window(row.drop_p))
                    .filter_map(|row| row.difference.as_ref())
            };
            if signs().any(|d| d.resolved() == Some(-1.0)) {
                Verdict::Holds
            } else if signs().count() > 0 && signs().all(|d| d.resolved() == Some(1.0)) {
                Verdict::Fails
            } else {
                Verdict::NotResolved
            }
        };
        let all_higher = |rows: &[Row]| {
            let signs = || rows.iter().filter_map(|row| row.difference.as_ref());
            if signs().any(|d| d.resolved() == Some(-1.0)) {
                Verdict::Fails
            } else if signs().count() > 0 && signs().all(|d| d.resolved() == Some(1.0)) {
                Verdict::Holds
            } else {
                Verdict::NotResolved
            }
        };
        let last = |run: &RunResult| run.last.clone();
        let early = |run: &RunResult| run.early.clone();
        let h1 = "H1: in one-epoch pretraining every p > 0 has a higher dev loss than p = 0";
        let h2 = "H2: after a fixed number of epochs on little data some p from 0.05 to 0.2 has a lower test loss than p = 0";
        let h3 = "H3: the same with early stopping on dev";
        let arms = vec![
            Arm::new("PRE", Judge::Dev, h1, &pretrained, last, all_higher),
            Arm::new("FT-fixed", Judge::Test, h2, &finetuned, last, some_lower),
            Arm::new("FT-early", Judge::Test, h3, &finetuned, early, some_lower),
        ];
        let runs = pretrained.into_iter().chain(finetuned).collect();
        let notes = vec![
            "losses are in nats a byte, without dropout, on fixed windows",
            "one learning rate for every p: it was not tuned for each",
            "fine-tuning starts from the p = 0 model of its seed",
        ];
        Self { settings: settings.clone(), text, arms, runs, notes, seconds: elapsed.as_secs_f64() }
    }

    /// Final dev and test loss of every run.
    #[cfg(test)]
    pub fn losses(&self) -> Vec<f64> {
        self.runs.iter().flat_map(|run| [run.last.dev.loss(), run.early.test.loss()]).collect()
    }

    pub fn print(&self) {
        print!("{}", self.table());
    }

    fn table(&self) -> String {
        let mut out = String::new();
        let signed = |value: f64| format!("{value:+.3}");
        let _ = writeln!(
            out,
            "\n{:9} {:>5} {:>14} {:>14} {:>14} {:>7}  {:>10}  {:>18}  {:>18} {:>7} {:>6} {:>9}",
            "arm",
            "p",
            "train",
            "dev",
            "test",
            "gap",
            "difference",
            "95 % CI seeds",
            "95 % CI documents",
            "p Holm",
            "step",
            "tokens/s"
        );
        for arm in &self.arms {
            for row in &arm.rows {
                let spread = |s: &Spread| match s.standard_error {
                    Some(error) => format!("{:.3} +-{:.3}", s.mean, error),
                    None => format!("{:.3}", s.mean),
                };
                let interval = |interval: Option<(f64, f64)>| {
                    interval.map_or("-".into(), |(low, high)| {
                        format!("[{}, {}]", signed(low), signed(high))
                    })
                };
                let d = row.difference.as_ref();
                let _ = writeln!(
                    out,
                    "{:9} {:>5} {:>14} {:>14} {:>14} {:>7}  {:>10}  {:>18}  {:>18} {:>7} {:>6.0} {:>9.0}",
                    arm.name,
                    row.drop_p,
                    spread(&row.train),
                    spread(&row.dev),
                    spread(&row.test),
                    signed(row.gap.mean),
                    d.map_or("-".into(), |d| signed(d.mean)),
                    interval(d.and_then(|d| d.low.zip(d.high))),
                    interval(row.documents),
                    d.and_then(|d| d.p_holm).map_or("-".into(), |p| format!("{p:.3}")),
                    row.step,
                    row.tokens_per_second,
                );
            }
        }
        let _ = writeln!(
            out,
            "\n{}; difference to p = 0 of the same seed on the split each arm is judged on (PRE dev, FT test)",
            self.notes.join("; ")
        );
        for arm in &self.arms {
            let best: Vec<String> = arm.best_p.iter().map(f32::to_string).collect();
            let verdict = match arm.verdict {
                Verdict::Holds => "holds",
                Verdict::Fails => "fails",
                Verdict::NotResolved => "not resolved",
            };
            let _ = writeln!(
                out,
                "\n{}\n  {verdict} ({}; {} seeds, {} {} documents)",
                arm.hypothesis,
                arm.t_values(),
                arm.seeds,
                arm.documents,
                arm.judged_on
            );
            let _ = writeln!(
                out,
                "  best p by dev: {} (lowest mean {}; dev loss before training {:.3})",
                best.join(", "),
                arm.lowest_dev_p,
                arm.dev_at_start
            );
        }
        let _ = writeln!(
            out,
            "\n{:.0} s on {} with {} runs side by side",
            self.seconds, self.settings.device, self.settings.threads
        );
        out
    }

    /// Writes report.json and report.svg.
    pub fn write(&self, out: &Path) -> Result<()> {
        let (json, svg) = (out.join("report.json"), out.join("report.svg"));
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(&json, text).with_context(|| format!("cannot write {}", json.display()))?;
        self.plot(&svg).map_err(|error| anyhow!("cannot draw {}: {error}", svg.display()))?;
        println!("wrote {} and {}", json.display(), svg.display());
        Ok(())
    }

    /// Paired difference to p = 0 over p with its 95 % interval, a line an arm.
    fn plot(&self, path: &Path) -> Result<(), Box<dyn std::error::Error + '_>> {
        let points = |arm: &Arm| -> Vec<(f64, f64, f64, f64)> {
            let of = |row: &Row| {
                let p = f64::from(row.drop_p);
                row.difference.as_ref().map_or((p, 0.0, 0.0, 0.0), |d| {
                    (p, d.low.unwrap_or(d.mean), d.mean, d.high.unwrap_or(d.mean))
                })
            };
            arm.rows.iter().map(of).collect()
        };
        let all: Vec<_> = self.arms.iter().flat_map(points).collect();
        let max_p = all.iter().fold(0.0f64, |m, point| m.max(point.0));
        let low = all.iter().fold(0.0f64, |m, point| m.min(point.1));
        let high = all.iter().fold(0.0f64, |m, point| m.max(point.3));
        let margin = 0.08 * (high - low).max(1e-3);

        let root = SVGBackend::new(path, (860, 520)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(
                "Loss against dropout rate: difference to p = 0, 95 % t interval over seeds",
                ("sans-serif", 18),
            )
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d(
                -0.04 * max_p..1.08 * max_p.max(0.01),
                low - margin..high + margin,
            )?;
        chart.configure_mesh().x_desc("dropout rate p").y_desc("difference, nats a byte").draw()?;
        chart.draw_series(LineSeries::new(
            [(-0.04 * max_p, 0.0), (1.08 * max_p, 0.0)],
            BLACK.stroke_width(1),
        ))?;
        for ((i, arm), colour) in self.arms.iter().enumerate().zip([&BLUE, &RED, &GREEN]) {
            // Arms stand a little apart so that their bars do not hide one another.
            let shifted: Vec<_> = points(arm)
                .into_iter()
                .map(|(p, l, m, h)| (p + (i as f64 - 1.0) * 0.008 * max_p, l, m, h))
                .collect();
            let line =
                LineSeries::new(shifted.iter().map(|&(p, _, m, _)| (p, m)), colour.stroke_width(2));
            chart.draw_series(line)?.label(format!("{} ({})", arm.name, arm.judged_on)).legend(
                move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)),
            );
            let bars = shifted
                .iter()
                .map(|&(p, l, m, h)| ErrorBar::new_vertical(p, l, m, h, colour.filled(), 8));
            chart.draw_series(bars)?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK)
            .draw()?;
        root.present()?;
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
enum Judge {
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

impl Arm {
    fn new(
        name: &'static str,
        judge: Judge,
        hypothesis: &'static str,
        runs: &[RunResult],
        outcome: impl Fn(&RunResult) -> Outcome,
        verdict: impl Fn(&[Row]) -> Verdict,
    ) -> Self {
        let mut rates: Vec<f32> = runs.iter().map(|run| run.run.drop_p).collect();
        rates.sort_by(f32::total_cmp);
        rates.dedup();
        // Runs come in the order of their seeds, so equal positions are pairs.
        let of_rate = |p: f32| -> Vec<Outcome> {
            runs.iter().filter(|run| run.run.drop_p == p).map(&outcome).collect()
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
                step: mean(&collect(&outcomes, &|o| o.step as f64)),
                tokens_per_second: mean(&speeds),
            }
        };
        let rows: Vec<Row> = rates.iter().copied().map(row).collect();
        let starts: Vec<f64> =
            runs.iter().filter_map(|run| Some(run.curve.first()?.dev_loss)).collect();
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
            dev_at_start: mean(&starts),
            seeds: base.len(),
            documents: base.first().map_or(0, |o| judge.evaluation(o).documents.len()),
            rows,
        }
    }

    fn t_values(&self) -> String {
        let t = |row: &Row| {
            let t = row.difference.as_ref()?.t;
            Some(t.map_or(format!("p {}: no t with one seed", row.drop_p), |t| {
                format!("p {}: t {t:.2}", row.drop_p)
            }))
        };
        self.rows.iter().filter_map(t).collect::<Vec<_>>().join(", ")
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

#[cfg(test)]
mod tests {
    use super::super::train::{CurvePoint, Run};
    use super::*;

    /// Runs whose dev and test losses are `base + effect(p) + seed noise`.
    fn runs(effect: impl Fn(f32) -> f64) -> Vec<RunResult> {
        let run = |seed: u64, drop_p: f32| {
            let loss = 2.0
                + 0.1 * seed as f64
                + effect(drop_p) * (1.0 + 0.01 * (seed as f64 + f64::from(drop_p) * 7.0).sin());
            let evaluation = Evaluation { documents: vec![(loss * 50.0, 50), (loss * 70.0, 70)] };
            let last =
                Outcome { step: 9, train_loss: 1.0, dev: evaluation.clone(), test: evaluation };
            RunResult {
                run: Run { phase: Phase::Finetune, drop_p, seed },
                early: last.clone(),
                last,
                curve: vec![CurvePoint { step: 0, batch_loss: None, dev_loss: 3.0 }],
                tokens_per_second: 1.0,
                seconds: 1.0,
                weights: Default::default(),
            }
        };
        (1..=4).flat_map(|seed| [0.0, 0.1, 0.4].map(|p| run(seed, p))).collect()
    }

    fn report(effect: impl Fn(f32) -> f64) -> Report {
        let settings = Settings::for_tests();
        let text = TextReport::new(1, &Splits::default(), &Splits::default(), &settings);
        let runs = runs(effect);
        Report::new(&settings, text, runs.clone(), runs, Duration::from_secs(1))
    }

    fn verdicts(effect: impl Fn(f32) -> f64) -> Vec<Verdict> {
        report(effect).arms.iter().map(|arm| arm.verdict).collect()
    }

    #[test]
    fn verdicts_follow_the_sign_of_resolved_differences() {
        use Verdict::{Fails, Holds, NotResolved};
        assert_eq!(verdicts(f64::from), [Holds, Fails, Fails]);
        assert_eq!(verdicts(|p| -f64::from(p)), [Fails, Holds, Holds]);
        assert_eq!(verdicts(|_| 0.0), [NotResolved; 3]);
        // A gain outside 0.05 to 0.2 is not what H2 is about.
        assert_eq!(verdicts(|p| if p > 0.3 { -1.0 } else { f64::from(p) }), [Fails, Fails, Fails]);
    }

    #[test]
    fn pairing_removes_what_seeds_share() {
        let report = report(f64::from);
        let difference = report.arms[1].rows[1].difference.as_ref().unwrap();
        assert!(
            (difference.mean - 0.1).abs() < 2e-3 && difference.standard_error.unwrap() < 1e-3,
            "{difference:?}"
        );
        assert_eq!(report.arms[1].best_p, [0.0]);
    }

    #[test]
    fn table_json_and_plot_are_written() {
        let out =
            std::env::temp_dir().join(format!("candle-dropout-report-{}", std::process::id()));
        std::fs::create_dir_all(&out).unwrap();
        let report = report(f64::from);
        report.write(&out).unwrap();
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap();
        assert_eq!(json["arms"][0]["verdict"], "holds");
        assert_eq!(json["runs"].as_array().unwrap().len(), 24);
        assert!(std::fs::read_to_string(out.join("report.svg")).unwrap().contains("FT-early"));
        assert!(report.table().contains("best p by dev: 0 (lowest mean 0;"), "{}", report.table());
        std::fs::remove_dir_all(out).unwrap();
    }
}
