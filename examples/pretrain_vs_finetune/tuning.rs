//! How long to fine-tune, and with which learning rate: what is best for p = 0 on a seed that is not
//! reported.

use serde::Serialize;

use super::train::CurvePoint;

/// What the tuning seed saw, and what follows from it.
#[derive(Debug, Clone, Serialize)]
pub struct Tuning {
    pub seed: u64,
    /// Dev loss of the pretrained model.
    pub dev_at_start: f64,
    pub curves: Vec<LearningRate>,
    pub chosen: Choice,
    pub steps_from: StepsFrom,
}

/// Who fixed the number of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StepsFrom {
    /// The dev loss of the tuning seed.
    Dev,
    Command,
}

#[derive(Debug, Clone, Serialize)]
pub struct LearningRate {
    pub lr: f64,
    pub curve: Vec<CurvePoint>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Choice {
    pub lr: f64,
    pub steps: usize,
    pub dev_loss: f64,
    /// No more steps were tried: more might be better.
    pub is_last: bool,
}

impl Tuning {
    /// The lowest dev loss after at least one step, or after `steps` of them; the first of equals.
    /// None if no curve has such a point.
    pub fn new(seed: u64, curves: Vec<LearningRate>, steps: Option<usize>) -> Option<Self> {
        let dev_at_start = curves.first()?.curve.first()?.dev_loss;
        let tried = curves.iter().flat_map(|LearningRate { lr, curve }| {
            let last = curve.last().map(|point| point.step);
            curve.iter().map(move |point| Choice {
                lr: *lr,
                steps: point.step,
                dev_loss: point.dev_loss,
                is_last: steps.is_none() && Some(point.step) == last,
            })
        });
        let chosen = tried
            .filter(|choice| steps.map_or(choice.steps > 0, |steps| choice.steps == steps))
            .min_by(|a, b| a.dev_loss.total_cmp(&b.dev_loss))?;
        let steps_from = if steps.is_none() { StepsFrom::Dev } else { StepsFrom::Command };
        Some(Self { seed, dev_at_start, curves, chosen, steps_from })
    }

    pub fn print(&self) {
        println!(
            "tuning: p = 0 on seed {}, which is not reported; dev loss before fine-tuning {:.3}",
            self.seed, self.dev_at_start
        );
        for LearningRate { lr, curve } in &self.curves {
            let best = curve.iter().skip(1).min_by(|a, b| a.dev_loss.total_cmp(&b.dev_loss));
            if let Some(best) = best {
                println!("  learning rate {lr}: best {:.3} at step {}", best.dev_loss, best.step);
            }
        }
        println!("  {}", self.sentence());
    }

    pub fn sentence(&self) -> String {
        let Choice { lr, steps, dev_loss, is_last } = self.chosen;
        let chose = match self.steps_from {
            StepsFrom::Dev => format!("dev chose {steps} steps with learning rate {lr}"),
            StepsFrom::Command => {
                format!("the command says {steps} steps, dev chose learning rate {lr} after them")
            }
        };
        let start = self.dev_at_start;
        let mut sentence = format!("{chose} for p = 0 ({dev_loss:.3}, {start:.3} before)");
        if is_last {
            sentence += "; no more steps were tried: --search-steps allows more";
        }
        let lrs = || self.curves.iter().map(|of| of.lr);
        if self.curves.len() > 1 && lrs().all(|other| other >= lr) {
            sentence += "; no lower learning rate was tried: --finetune-lr takes others";
        } else if self.curves.len() > 1 && lrs().all(|other| other <= lr) {
            sentence += "; no higher learning rate was tried: --finetune-lr takes others";
        }
        // Steps that the command says may be worse than none where others are better.
        let mut tried = self.curves.iter().flat_map(|of| &of.curve);
        if !tried.any(|point| point.dev_loss < start) {
            sentence += "; no number of steps that was tried is better than none";
        } else if dev_loss >= start {
            sentence += "; so many are no better than none, fewer or more are";
        }
        sentence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A curve with a point at every tenth step.
    fn curve(lr: f64, losses: &[f64]) -> LearningRate {
        let points = losses.iter().enumerate();
        let point = |(i, &dev_loss)| CurvePoint { step: 10 * i, batch_loss: None, dev_loss };
        LearningRate { lr, curve: points.map(point).collect() }
    }

    #[test]
    fn the_lowest_dev_loss_decides_and_the_first_of_equals() {
        let curves =
            || vec![curve(2e-3, &[3.2, 3.0, 3.1]), curve(1e-3, &[3.2, 3.1, 2.9, 2.9, 3.0])];
        let tuning = Tuning::new(5, curves(), None).unwrap();
        let expected = Choice { lr: 1e-3, steps: 20, dev_loss: 2.9, is_last: false };
        assert_eq!((tuning.chosen, tuning.dev_at_start), (expected, 3.2));
        let at_ten = Tuning::new(5, curves(), Some(10)).unwrap().chosen;
        assert_eq!((at_ten.lr, at_ten.steps), (2e-3, 10));
        assert!(Tuning::new(5, curves(), Some(15)).is_none());
        assert!(Tuning::new(5, Vec::new(), None).is_none());
    }

    #[test]
    fn an_optimum_at_the_end_and_one_that_is_worse_than_the_start_are_told() {
        let told = |losses: &[f64]| {
            let tuning = Tuning::new(5, vec![curve(1e-3, losses)], None).unwrap();
            (tuning.chosen.steps, tuning.sentence())
        };
        let (steps, sentence) = told(&[3.2, 3.1, 3.0]);
        assert!(steps == 20 && sentence.contains("no more steps were tried"), "{sentence}");
        let (steps, sentence) = told(&[3.2, 3.3, 3.4]);
        assert!(steps == 10 && sentence.ends_with("better than none"), "{sentence}");
        let (_, sentence) = told(&[3.2, 3.0, 3.4]);
        assert!(sentence.ends_with("(3.000, 3.200 before)"), "{sentence}");
        let of_three = |best: usize| {
            let curves = (0..3).map(|i| {
                curve(1e-3 * (i + 1) as f64, &[3.2, if i == best { 3.0 } else { 3.1 }, 3.3])
            });
            Tuning::new(5, curves.collect(), None).unwrap().sentence()
        };
        assert!(of_three(0).contains("no lower learning rate was tried"));
        assert!(of_three(1).ends_with("(3.000, 3.200 before)"), "{}", of_three(1));
        assert!(of_three(2).contains("no higher learning rate was tried"));
    }

    #[test]
    fn steps_of_the_command_are_told_as_such() {
        let told = |losses: &[f64], steps| {
            let curves = vec![curve(2e-3, &[3.2, 3.5, 3.6, 3.7]), curve(1e-3, losses)];
            let tuning = Tuning::new(5, curves, steps).unwrap();
            (tuning.steps_from, tuning.sentence())
        };
        let better = [3.2, 3.1, 3.3, 3.4];
        let (from, sentence) = told(&better, Some(10));
        assert_eq!(from, StepsFrom::Command);
        let begin = "the command says 10 steps, dev chose learning rate 0.001 after them for p = 0 \
                     (3.100, 3.200 before)";
        assert!(sentence.starts_with(begin) && !sentence.contains("none"), "{sentence}");
        // Worse than none, though another number of steps is better.
        let (_, sentence) = told(&better, Some(20));
        assert!(sentence.ends_with("no better than none, fewer or more are"), "{sentence}");
        let (_, sentence) = told(&[3.2, 3.3, 3.3, 3.4], Some(20));
        assert!(sentence.ends_with("that was tried is better than none"), "{sentence}");
        // The same curves without a word of the command.
        let (from, sentence) = told(&better, None);
        assert_eq!(from, StepsFrom::Dev);
        assert!(sentence.starts_with("dev chose 10 steps with learning rate 0.001 "), "{sentence}");
    }
}
