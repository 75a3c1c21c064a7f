//! The report for people, at the terminal and as report.md.

use super::super::stats::mean;
use super::Report;
use super::arm::{Arm, Base, Row, Verdict};
use super::format::{difference, interval, list, p_value, rounded, spread};

const HEAD: [&str; 10] = [
    "arm",
    "p",
    "train",
    "dev",
    "test",
    "to base [95 % CI]",
    "to p = 0 [95 % CI seeds]",
    "95 % CI documents",
    "p Holm",
    "step",
];

type Cells = [String; HEAD.len()];

impl Report {
    pub fn markdown(&self) -> String {
        let stress = self.arms.len() - 1;
        let rows = |arms: &[Arm]| -> Vec<Cells> {
            arms.iter().flat_map(|arm| arm.rows.iter().map(|row| cells(arm.name, row))).collect()
        };
        let base = || vec![base(&self.base)];
        let mut parts = Vec::new();
        if let Some(answer) = &self.answer {
            parts.push(format!("{}\n{}", answer.sentence, answer.stress_sentence));
        }
        parts.push(format!("Fine-tuning: {}.", self.recipe));
        parts.push(table(&[rows(&self.arms[..1]), base(), rows(&self.arms[1..stress])].concat()));
        parts.push("The stress arm:".into());
        parts.push(table(&[base(), rows(&self.arms[stress..])].concat()));
        parts.push(self.arms.iter().map(verdict).collect::<Vec<_>>().join("\n"));
        parts.push(format!("{}.", self.notes.join("; ")));
        let speeds: Vec<f64> = self.pretrained.iter().map(|run| run.tokens_per_second).collect();
        parts.push(format!(
            "{} s on {} with {} runs side by side; {} tokens/s a run in pretraining.",
            rounded(self.seconds, 0),
            self.settings.device,
            self.settings.threads,
            rounded(mean(&speeds), 0)
        ));
        parts.join("\n\n") + "\n"
    }
}

fn cells(arm: &str, row: &Row) -> Cells {
    [
        arm.into(),
        row.drop_p.to_string(),
        spread(&row.train),
        spread(&row.dev),
        spread(&row.test),
        row.to_base.as_ref().map(difference).unwrap_or_default(),
        row.difference.as_ref().map(difference).unwrap_or_default(),
        row.documents.map(interval).unwrap_or_default(),
        row.difference.as_ref().and_then(|d| d.p_holm).map(p_value).unwrap_or_default(),
        rounded(row.step, 0),
    ]
}

fn base(base: &Base) -> Cells {
    let mut cells = Cells::default();
    cells[0] = "base".into();
    for (cell, losses) in cells[2..5].iter_mut().zip([&base.train, &base.dev, &base.test]) {
        *cell = spread(losses);
    }
    cells[HEAD.len() - 1] = "0".into();
    cells
}

fn table(rows: &[Cells]) -> String {
    let head = HEAD.map(String::from);
    let widths: Vec<usize> = (0..HEAD.len())
        .map(|i| [&head].into_iter().chain(rows).map(|row| row[i].chars().count()).max())
        .map(|width| width.unwrap_or(0))
        .collect();
    let line = |row: &Cells| {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        format!("| {} |", cells.collect::<Vec<_>>().join(" | "))
    };
    let rule: Vec<String> = widths.iter().map(|&width| "-".repeat(width + 2)).collect();
    let lines = [line(&head), format!("|{}|", rule.join("|"))];
    lines.into_iter().chain(rows.iter().map(line)).collect::<Vec<_>>().join("\n")
}

fn verdict(arm: &Arm) -> String {
    let verdict = match arm.verdict {
        Verdict::Holds => "holds",
        Verdict::Fails => "fails",
        Verdict::NotResolved => "not resolved",
    };
    let t = |row: &Row| {
        let t = row.difference.as_ref()?.t;
        Some(t.map_or(format!("p {}: no t with one seed", row.drop_p), |t| {
            format!("p {}: t {}", row.drop_p, rounded(t, 2))
        }))
    };
    let t_values: Vec<String> = arm.rows.iter().filter_map(t).collect();
    let best: Vec<String> = arm.best_p.iter().map(f32::to_string).collect();
    format!(
        "- {}: **{verdict}** ({}; {} seeds, {} {} documents). Best p by dev: {}, lowest mean {}.",
        arm.hypothesis,
        t_values.join(", "),
        arm.seeds,
        arm.documents,
        arm.judged_on,
        list(&best),
        arm.lowest_dev_p
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_one_another() {
        let mut row: Cells = Default::default();
        row[2] = "3.178 ± 0.009".into();
        let lines = table(&[row]);
        let bars = |line: &str| -> Vec<usize> {
            line.chars().enumerate().filter(|(_, c)| *c == '|').map(|(i, _)| i).collect()
        };
        let positions: Vec<_> = lines.lines().map(bars).collect();
        assert_eq!(positions.len(), 3);
        assert!(positions.iter().all(|p| *p == positions[0]), "{lines}");
    }
}
