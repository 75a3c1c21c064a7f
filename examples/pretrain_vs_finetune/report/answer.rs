//! What a reader has to know before any rate is compared: whether fine-tuning helped at all.

use serde::Serialize;

use super::arm::{Arm, Base, Row};
use super::format::{difference, list, rounded, spread};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    Helped,
    Harmed,
    #[serde(rename = "not resolved")]
    NotResolved,
}

impl Effect {
    /// Of fine-tuning at one rate: test loss less that before fine-tuning, paired by seed.
    fn of(row: &Row) -> Self {
        match &row.to_base {
            Some(d) if !d.contains_zero() && d.mean < 0.0 => Self::Helped,
            Some(d) if !d.contains_zero() => Self::Harmed,
            _ => Self::NotResolved,
        }
    }
}

/// The first sentences of the report.
#[derive(Debug, Serialize)]
pub struct Answer {
    /// Of fine-tuning without dropout for the number of steps of FT-tuned.
    pub fine_tuning: Effect,
    pub sentence: String,
    pub stress_sentence: String,
}

impl Answer {
    pub fn new(base: &Base, tuned: &Arm, stress: &Arm, stress_length: &str) -> Option<Self> {
        let row = tuned.rows.iter().find(|row| row.drop_p == 0.0)?;
        let (fine_tuning, to_base) = (Effect::of(row), row.to_base.as_ref()?);
        let verdict = match fine_tuning {
            Effect::Helped => "Fine-tuning helped",
            Effect::Harmed => "Fine-tuning did not help, it did harm",
            Effect::NotResolved => "Whether fine-tuning helped is not resolved",
        };
        let sentence = format!(
            "{verdict}: without dropout, {:.0} steps ({} epochs) took the test loss from {} to {} nats a byte, \
             {} (paired, 95 % t interval over {} seeds).",
            row.step,
            rounded(tuned.epochs, 1),
            spread(&base.test),
            spread(&row.test),
            difference(to_base),
            tuned.seeds,
        );
        Some(Self { fine_tuning, sentence, stress_sentence: stressed(stress, stress_length) })
    }
}

/// At which rates the stress arm helped, and at which it did harm; that it is too long only where it is.
fn stressed(arm: &Arm, length: &str) -> String {
    let clauses: Vec<String> = [
        (Effect::Harmed, "worse"),
        (Effect::Helped, "better"),
        (Effect::NotResolved, "not resolved"),
    ]
    .into_iter()
    .filter_map(|(effect, what)| {
        let rates: Vec<String> = arm
            .rows
            .iter()
            .filter(|row| Effect::of(row) == effect)
            .map(|row| row.drop_p.to_string())
            .collect();
        (!rates.is_empty()).then(|| format!("{what} at p = {}", list(&rates)))
    })
    .collect();
    let all_harmed = arm.rows.iter().all(|row| Effect::of(row) == Effect::Harmed);
    let moral = if all_harmed {
        "; that is too long for all of them, and what a rate gains there is damage avoided, not a better model"
    } else {
        ""
    };
    format!(
        "{}, {length}, against the model before fine-tuning: {}{moral}.",
        arm.name,
        clauses.join("; ")
    )
}
