//! What came out: a table for people, JSON with every number, a plot.

mod answer;
mod arm;
pub mod format;
mod markdown;
pub mod marks;
mod plot;
mod text;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

use super::settings::Settings;
use super::train::RunResult;
use super::tuning::{StepsFrom, Tuning};
use answer::Answer;
use arm::{Arm, Base, Judge, Plan, Row, Verdict};
use format::rounded;
pub use text::TextReport;

/// All that was run.
#[derive(Debug)]
pub struct Results {
    pub tuning: Option<Tuning>,
    pub pretrained: Vec<RunResult>,
    pub finetuned: Vec<RunResult>,
    pub stressed: Vec<RunResult>,
}

#[derive(Debug, Serialize)]
pub struct Report {
    answer: Option<Answer>,
    settings: Settings,
    text: TextReport,
    tuning: Option<Tuning>,
    /// Where steps and learning rate of fine-tuning come from.
    recipe: String,
    base: Base,
    /// The stress arm is the last.
    arms: Vec<Arm>,
    pretrained: Vec<RunResult>,
    finetuned: Vec<RunResult>,
    stressed: Vec<RunResult>,
    notes: Vec<&'static str>,
    seconds: f64,
}

impl Report {
    pub fn new(settings: &Settings, text: TextReport, results: Results, elapsed: Duration) -> Self {
        let Results { tuning, pretrained, finetuned, stressed } = results;
        let given_steps = settings.finetune_steps.unwrap_or(settings.finetune.steps);
        let steps = match &tuning {
            Some(Tuning { steps_from: StepsFrom::Dev, .. }) => {
                "the number of steps that is best for p = 0".to_string()
            }
            _ => format!("{given_steps} steps, as the command says"),
        };
        let some_is_lower = "some p from 0.05 to 0.2 has a lower test loss than p = 0";
        let pre = Plan {
            name: "PRE",
            judge: Judge::Dev,
            hypothesis: "H1: in one-epoch pretraining every p > 0 has a higher dev loss than p = 0"
                .into(),
            runs: &pretrained,
            outcome: |run| &run.fixed,
            verdict: all_higher,
            epochs_a_step: text.pretrain_epochs_a_step,
        };
        let tuned = Plan {
            name: "FT-tuned",
            judge: Judge::Test,
            hypothesis: format!("H2: after {steps}, {some_is_lower}"),
            runs: &finetuned,
            outcome: |run| &run.fixed,
            verdict: some_lower,
            epochs_a_step: text.finetune_epochs_a_step,
        };
        let early = Plan {
            name: "FT-early",
            hypothesis: "H3: the same with early stopping on dev, every rate at its own step"
                .into(),
            outcome: |run| &run.early,
            ..tuned.clone()
        };
        let stress_length = format!(
            "{} steps with learning rate {} ({} epochs)",
            settings.stress.steps,
            settings.stress.lr,
            rounded(text.finetune_epochs_a_step * settings.stress.steps as f64, 1)
        );
        let stress = Plan {
            name: "FT-stress",
            hypothesis: format!("H2 in the stress arm: after {stress_length}, {some_is_lower}"),
            runs: &stressed,
            ..tuned.clone()
        };
        let arms: Vec<Arm> = [pre, tuned, early, stress].into_iter().map(Arm::new).collect();
        let base = Base::new(&finetuned);
        let recipe = match &tuning {
            Some(tuning) => {
                format!("on seed {}, which is not reported, {}", tuning.seed, tuning.sentence())
            }
            None => format!(
                "{given_steps} steps with learning rate {}, as the command says",
                settings.finetune.lr
            ),
        };
        let notes = vec![
            "Losses are in nats a byte, without dropout, on fixed windows",
            "base is the p = 0 model of each seed before fine-tuning, its train loss that on the text of \
             fine-tuning; every fine-tuning run starts from it",
            "differences are of the same seed, on the split that an arm is judged on (PRE dev, FT test)",
            "learning rates were not tuned for each p",
        ];
        Self {
            answer: Answer::new(&base, &arms[1], &arms[3], &stress_length),
            settings: settings.clone(),
            text,
            tuning,
            recipe,
            base,
            arms,
            pretrained,
            finetuned,
            stressed,
            notes,
            seconds: elapsed.as_secs_f64(),
        }
    }

    /// Dev and test losses of every run.
    #[cfg(test)]
    pub fn losses(&self) -> Vec<f64> {
        [&self.pretrained, &self.finetuned, &self.stressed]
            .into_iter()
            .flatten()
            .flat_map(|run| [run.fixed.dev.loss(), run.early.test.loss()])
            .collect()
    }

    #[cfg(test)]
    pub fn tuning(&self) -> Option<&Tuning> {
        self.tuning.as_ref()
    }

    pub fn print(&self) {
        print!("\n{}", self.markdown());
    }

    /// Writes report.json, report.md and report.svg.
    pub fn write(&self, out: &Path) -> Result<()> {
        let [json, markdown, svg] =
            ["json", "md", "svg"].map(|kind| out.join("report").with_extension(kind));
        for (path, text) in
            [(&json, serde_json::to_string_pretty(self)?), (&markdown, self.markdown())]
        {
            std::fs::write(path, text)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        self.plot(&svg).map_err(|error| anyhow!("cannot draw {}: {error}", svg.display()))?;
        println!("\nwrote {}, {} and {}", json.display(), markdown.display(), svg.display());
        Ok(())
    }
}

/// Whether every p > 0 is worse than p = 0.
fn all_higher(rows: &[Row]) -> Verdict {
    let signs = || rows.iter().filter_map(|row| row.difference.as_ref());
    if signs().any(|d| d.resolved() == Some(-1.0)) {
        Verdict::Fails
    } else if signs().count() > 0 && signs().all(|d| d.resolved() == Some(1.0)) {
        Verdict::Holds
    } else {
        Verdict::NotResolved
    }
}

/// Whether some p from 0.05 to 0.2 is better than p = 0.
fn some_lower(rows: &[Row]) -> Verdict {
    let signs = || {
        rows.iter()
            .filter(|row| (0.05..=0.2).contains(&row.drop_p))
            .filter_map(|row| row.difference.as_ref())
    };
    if signs().any(|d| d.resolved() == Some(-1.0)) {
        Verdict::Holds
    } else if signs().count() > 0 && signs().all(|d| d.resolved() == Some(1.0)) {
        Verdict::Fails
    } else {
        Verdict::NotResolved
    }
}

#[cfg(test)]
mod tests {
    use super::super::corpus::{Document, Splits};
    use super::super::train::{CurvePoint, Evaluation, Outcome, Phase, Run};
    use super::super::tuning::LearningRate;
    use super::answer::Effect;
    use super::*;

    /// Runs over three rates and four seeds whose losses are `base + effect(p) + seed noise`, from
    /// models of `base + seed noise`.
    fn runs(phase: Phase, effect: impl Fn(f32) -> f64) -> Vec<RunResult> {
        let run = |seed: u64, drop_p: f32| {
            let outcome = |step, effect: f64| {
                let noise = 1.0 + 0.01 * (seed as f64 + f64::from(drop_p) * 7.0).sin();
                let loss = 2.0 + 0.1 * seed as f64 + effect * noise;
                let evaluation =
                    Evaluation { documents: vec![(loss * 50.0, 50), (loss * 70.0, 70)] };
                Outcome { step, train_loss: 1.0, dev: evaluation.clone(), test: evaluation }
            };
            let end = outcome(9, effect(drop_p));
            RunResult {
                run: Run { phase, drop_p, seed },
                start: outcome(0, 0.0),
                early: end.clone(),
                fixed: end,
                curve: vec![CurvePoint { step: 0, batch_loss: None, dev_loss: 3.0 }],
                tokens_per_second: 1.0,
                seconds: 1.0,
                weights: Default::default(),
            }
        };
        (1..=4).flat_map(|seed| [0.0, 0.1, 0.4].map(|p| run(seed, p))).collect()
    }

    /// Pretraining with the effect of a rate; fine-tuning with it and, beside, `gain`; the stress arm
    /// with it and `damage`.
    fn report(effect: impl Fn(f32) -> f64, gain: f64, damage: f64) -> Report {
        report_of(&Settings::for_tests(), true, effect, gain, damage)
    }

    fn report_of(
        settings: &Settings,
        tuned: bool,
        effect: impl Fn(f32) -> f64,
        gain: f64,
        damage: f64,
    ) -> Report {
        let train = vec![Document { name: "a".into(), text: vec![b'a'; 512] }];
        let splits = Splits { train, ..Splits::default() };
        let text = TextReport::new(1, &splits, &splits, settings);
        let point = |step, dev_loss| CurvePoint { step, batch_loss: None, dev_loss };
        let curve = LearningRate { lr: 1e-3, curve: vec![point(0, 2.0), point(9, 1.9)] };
        let results = Results {
            tuning: tuned.then(|| Tuning::new(5, vec![curve], settings.finetune_steps).unwrap()),
            pretrained: runs(Phase::Pretrain, &effect),
            finetuned: runs(Phase::Finetune, |p| gain + effect(p)),
            stressed: runs(Phase::Finetune, |p| damage + effect(p)),
        };
        Report::new(settings, text, results, Duration::from_secs(1))
    }

    fn verdicts(effect: impl Fn(f32) -> f64) -> Vec<Verdict> {
        report(effect, -0.2, 0.5).arms.iter().map(|arm| arm.verdict).collect()
    }

    #[test]
    fn verdicts_follow_the_sign_of_resolved_differences() {
        use Verdict::{Fails, Holds, NotResolved};
        assert_eq!(verdicts(f64::from), [Holds, Fails, Fails, Fails]);
        assert_eq!(verdicts(|p| -f64::from(p)), [Fails, Holds, Holds, Holds]);
        let none: Vec<Verdict> = report(|_| 0.0, 0.0, 0.0).arms.iter().map(|a| a.verdict).collect();
        assert_eq!(none, [NotResolved; 4]);
        // A gain outside 0.05 to 0.2 is not what H2 is about.
        assert_eq!(verdicts(|p| if p > 0.3 { -1.0 } else { f64::from(p) }), [Fails; 4]);
    }

    #[test]
    fn pairing_removes_what_seeds_share() {
        let report = report(f64::from, 0.0, 0.0);
        let difference = report.arms[1].rows[1].difference.as_ref().unwrap();
        assert!(
            (difference.mean - 0.1).abs() < 2e-3 && difference.standard_error.unwrap() < 1e-3,
            "{difference:?}"
        );
        assert_eq!(report.arms[1].best_p, [0.0]);
    }

    #[test]
    fn the_first_sentence_says_whether_fine_tuning_helped() {
        let first = |gain: f64| {
            let report = report(f64::from, gain, 0.5);
            let answer = report.answer.as_ref().unwrap();
            let markdown = report.markdown();
            assert!(markdown.starts_with(&answer.sentence), "{markdown}");
            (answer.fine_tuning, answer.sentence.clone())
        };
        let (effect, sentence) = first(-0.2);
        assert_eq!(effect, Effect::Helped);
        assert!(
            sentence.starts_with("Fine-tuning helped: without dropout, 9 steps (4.5 epochs)"),
            "{sentence}"
        );
        assert!(sentence.contains("from 2.250 ± 0.065 to 2.0"), "{sentence}");
        assert!(sentence.contains("over 4 seeds"), "{sentence}");
        let (effect, sentence) = first(0.2);
        assert_eq!(effect, Effect::Harmed);
        assert!(sentence.starts_with("Fine-tuning did not help, it did harm: "), "{sentence}");
        let (effect, sentence) = first(0.0);
        assert_eq!(effect, Effect::NotResolved);
        assert!(sentence.starts_with("Whether fine-tuning helped is not resolved: "), "{sentence}");
        assert!(sentence.contains(" 0.000 [0.000, 0.000]"), "{sentence}");
    }

    #[test]
    fn the_stress_arm_is_told_rate_by_rate_and_its_moral_only_where_all_did_harm() {
        let told = |effect: fn(f32) -> f64, damage| {
            report(effect, -0.2, damage).answer.unwrap().stress_sentence
        };
        let all = told(|p| -f64::from(p), 0.5);
        let arm = "FT-stress, 40 steps with learning rate 0.002 (20.0 epochs), against the model before \
                   fine-tuning: ";
        assert!(all.starts_with(&format!("{arm}worse at p = 0, 0.1 and 0.4; that is")), "{all}");
        assert!(all.ends_with(
            "that is too long for all of them, and what a rate gains there is damage avoided, not a better model."
        ), "{all}");
        let some = told(|p| -f64::from(p), 0.2);
        assert_eq!(some, format!("{arm}worse at p = 0 and 0.1; better at p = 0.4."));
        let none = told(|_| 0.0, -0.2);
        assert_eq!(none, format!("{arm}better at p = 0, 0.1 and 0.4."));
    }

    #[test]
    fn hypotheses_name_their_steps_by_where_these_come_from() {
        let told = |given: Option<usize>, tuned: bool| {
            let mut settings = Settings::for_tests();
            settings.finetune_steps = given;
            let report = report_of(&settings, tuned, f64::from, -0.2, 0.5);
            [1, 3].map(|arm: usize| report.arms[arm].hypothesis.clone())
        };
        let tail = "some p from 0.05 to 0.2 has a lower test loss than p = 0";
        let stress = "H2 in the stress arm: after 40 steps with learning rate 0.002 (20.0 epochs)";
        let [chosen, long] = told(None, true);
        assert_eq!(chosen, format!("H2: after the number of steps that is best for p = 0, {tail}"));
        assert_eq!(long, format!("{stress}, {tail}"));
        for tuned in [true, false] {
            let [given, long] = told(Some(9), tuned);
            assert_eq!(given, format!("H2: after 9 steps, as the command says, {tail}"));
            assert_eq!(long, format!("{stress}, {tail}"));
        }
    }

    #[test]
    fn the_model_before_fine_tuning_is_a_row_of_both_tables() {
        let report = report(f64::from, -0.2, 0.5);
        let markdown = report.markdown();
        let row = |line: &&str| {
            let mut cells = line.split('|').map(str::trim);
            cells.nth(1) == Some("base") && cells.nth(3) == Some("2.250 ± 0.065")
        };
        assert_eq!(markdown.lines().filter(row).count(), 2, "{markdown}");
        // Fine-tuning is compared with it at every rate, pretraining is not.
        let compared = |arm: &Arm| arm.rows.iter().filter(|row| row.to_base.is_some()).count();
        assert_eq!(report.arms.iter().map(compared).collect::<Vec<_>>(), [0, 3, 3, 3]);
        let to_base = report.arms[1].rows[0].to_base.as_ref().unwrap();
        assert!((to_base.mean + 0.2).abs() < 2e-3, "{to_base:?}");
    }

    #[test]
    fn table_json_and_plot_are_written() {
        let out =
            std::env::temp_dir().join(format!("candle-dropout-report-{}", std::process::id()));
        std::fs::create_dir_all(&out).unwrap();
        let report = report(f64::from, -0.2, 0.5);
        report.write(&out).unwrap();
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap();
        assert_eq!(json["arms"][0]["verdict"], "holds");
        assert_eq!(json["answer"]["fine_tuning"], "helped");
        assert_eq!(json["tuning"]["chosen"]["steps"], 9);
        for runs in ["pretrained", "finetuned", "stressed"] {
            assert_eq!(json[runs].as_array().unwrap().len(), 12);
        }
        let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
        assert_eq!(read("report.md"), report.markdown());
        assert!(!read("report.md").contains("-0.000"), "{}", report.markdown());
        let plot = read("report.svg");
        let texts: Vec<&str> = plot.lines().map(str::trim).collect();
        for label in
            ["base model 2.250", "FT-tuned", "FT-stress", "PRE (dev)", "FT-early (test)", "p = 0"]
        {
            assert!(texts.contains(&label), "{label}: {plot}");
        }
        let is_signed_zero = |text: &&str| {
            text.starts_with(['-', '+']) && text.chars().all(|c| matches!(c, '-' | '+' | '0' | '.'))
        };
        assert_eq!(texts.iter().find(|text| is_signed_zero(text)), None);
        std::fs::remove_dir_all(out).unwrap();
    }
}
