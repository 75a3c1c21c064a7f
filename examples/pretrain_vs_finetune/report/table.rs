//! The report for people.

use std::fmt::Write as _;

use super::Report;
use super::arm::{Arm, Row, Spread, Verdict};

impl Report {
    pub fn table(&self) -> String {
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
}

impl Arm {
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
