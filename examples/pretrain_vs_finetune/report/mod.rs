//! What came out: a table for people, JSON with every number, a plot.

mod arm;
mod plot;
mod table;
mod text;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

use super::settings::Settings;
use super::train::RunResult;
use arm::{Arm, Judge, Row, Verdict};
pub use text::TextReport;

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

    /// Writes report.json and report.svg.
    pub fn write(&self, out: &Path) -> Result<()> {
        let (json, svg) = (out.join("report.json"), out.join("report.svg"));
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(&json, text).with_context(|| format!("cannot write {}", json.display()))?;
        self.plot(&svg).map_err(|error| anyhow!("cannot draw {}: {error}", svg.display()))?;
        println!("wrote {} and {}", json.display(), svg.display());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::corpus::Splits;
    use super::super::train::{CurvePoint, Evaluation, Outcome, Phase, Run};
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
