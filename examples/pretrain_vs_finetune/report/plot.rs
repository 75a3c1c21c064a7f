//! The report as a plot.

use std::path::Path;

use plotters::prelude::*;

use super::Report;
use super::arm::{Arm, Row};

impl Report {
    /// Paired difference to p = 0 over p with its 95 % interval, a line an arm.
    pub fn plot(&self, path: &Path) -> Result<(), Box<dyn std::error::Error + '_>> {
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
