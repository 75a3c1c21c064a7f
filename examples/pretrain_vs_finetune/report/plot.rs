//! The report as a plot: where fine-tuning ends beside where it began, and what each rate changes.

use std::path::Path;

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::Report;
use super::arm::{Arm, Row};
use super::format::{rounded, signed};
use super::marks::{
    AXIS, Area, Drawn, GRID, LABEL_ROOM, Label, TEXT, colour, marker, write_labels,
};

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Pixels by which arms stand apart, so that their bars do not hide one another.
const APART: i32 = 5;

/// A point of a line with its bar: x, and low, middle and high of y.
type Point = (f64, [f64; 3]);

struct Line {
    label: String,
    /// Its place among the arms, which gives colour and marker.
    arm: usize,
    points: Vec<Point>,
}

struct Panel {
    title: &'static str,
    y_label: &'static str,
    /// Of the numbers along y.
    y_number: fn(f64) -> String,
    lines: Vec<Line>,
    /// Something to compare with, over all x: its label, y and half the width of its band.
    reference: (String, f64, f64),
}

impl Report {
    pub fn plot(&self, path: &Path) -> Result<(), Box<dyn std::error::Error + '_>> {
        let root = SVGBackend::new(path, (1180, 500)).into_drawing_area();
        root.fill(&WHITE)?;
        let panels = [self.losses_panel(), self.differences_panel()];
        for (area, panel) in root.split_evenly((1, panels.len())).iter().zip(&panels) {
            panel.draw(area, &root).map_err(|error| error.to_string())?;
        }
        root.present()?;
        Ok(())
    }

    fn losses_panel(&self) -> Panel {
        let (base, error) = (&self.base.test, self.base.test.standard_error.unwrap_or(0.0));
        let point = |row: &Row| {
            let (loss, error) = (row.test.mean, row.test.standard_error.unwrap_or(0.0));
            (f64::from(row.drop_p), [loss - error, loss, loss + error])
        };
        let line = |(arm, of): (usize, &Arm)| Line {
            label: of.name.into(),
            arm,
            points: of.rows.iter().map(point).collect(),
        };
        Panel {
            title: "Test loss after fine-tuning, mean ± s.e. over seeds",
            y_label: "nats a byte",
            y_number: |y| rounded(y, 2),
            // The first arm is pretraining.
            lines: self.arms.iter().enumerate().skip(1).map(line).collect(),
            reference: (format!("base model {}", rounded(base.mean, 3)), base.mean, error),
        }
    }

    fn differences_panel(&self) -> Panel {
        let point = |row: &Row| {
            let bar = row
                .difference
                .as_ref()
                .map_or([0.0; 3], |d| [d.low.unwrap_or(d.mean), d.mean, d.high.unwrap_or(d.mean)]);
            (f64::from(row.drop_p), bar)
        };
        let line = |(arm, of): (usize, &Arm)| Line {
            label: format!("{} ({})", of.name, of.judged_on),
            arm,
            points: of.rows.iter().map(point).collect(),
        };
        Panel {
            title: "Loss less that of p = 0 in the same arm, 95 % t interval",
            y_label: "difference, nats a byte",
            y_number: |y| signed(y, 2),
            // The stress arm, whose differences are many times larger, is the last.
            lines: self.arms.iter().enumerate().take(self.arms.len() - 1).map(line).collect(),
            reference: ("p = 0".into(), 0.0, 0.0),
        }
    }
}

impl Panel {
    fn draw(&self, area: &Area, root: &Area) -> Drawn {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let max_p = points().fold(0.01f64, |most, (p, _)| most.max(*p));
        let (_, middle, band) = self.reference;
        let ends = points().flat_map(|(_, [low, _, high])| [*low, *high]);
        let ends: Vec<f64> = ends.chain([middle - band, middle + band]).collect();
        let low = ends.iter().copied().fold(f64::INFINITY, f64::min);
        let high = ends.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let margin = 0.06 * (high - low).max(1e-3);

        let caption = ("sans-serif", 16).into_font().color(&TEXT);
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, caption)
            .margin(10)
            .margin_right(LABEL_ROOM)
            .x_label_area_size(42)
            .y_label_area_size(62)
            .build_cartesian_2d(-0.04 * max_p..1.04 * max_p, low - margin..high + margin)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(GRID)
            .axis_style(AXIS)
            .label_style(("sans-serif", 13).into_font().color(&TEXT))
            .x_labels(6)
            .y_labels(8)
            .x_desc("dropout rate p")
            .y_desc(self.y_label)
            .x_label_formatter(&|x| rounded(*x, 2))
            .y_label_formatter(&|y| (self.y_number)(*y))
            .draw()?;

        // What the mesh does not draw stands in pixels of the whole picture.
        let ends = [-0.04 * max_p, 1.04 * max_p];
        let [left, right] = ends.map(|x| chart.backend_coord(&(x, middle)));
        if band > 0.0 {
            let [top, bottom] =
                [band, -band].map(|off| chart.backend_coord(&(0.0, middle + off)).1);
            root.draw(&Rectangle::new(
                [(left.0, top), (right.0, bottom)],
                BLACK.mix(0.12).filled(),
            ))?;
        }
        for x in (left.0..right.0).step_by(9) {
            let dash = [(x, left.1), ((x + 5).min(right.0), left.1)];
            root.draw(&PathElement::new(dash, TEXT.stroke_width(2)))?;
        }
        let mut labels = vec![Label { text: &self.reference.0, line: None, end: right }];
        for line in &self.lines {
            let end = line.draw(&chart, root)?;
            labels.push(Label { text: &line.label, line: Some(line.arm), end });
        }
        write_labels(&labels, right.0, root)
    }
}

impl Line {
    /// Draws the line, its bars and markers; where it ends.
    fn draw(&self, chart: &Chart, root: &Area) -> Result<(i32, i32), Box<dyn std::error::Error>> {
        let colour = colour(self.arm);
        let shift = (self.arm as i32 - 1) * APART;
        let pixel = |p: f64, y: f64| {
            let (x, y) = chart.backend_coord(&(p, y));
            (x + shift, y)
        };
        let middles: Vec<(i32, i32)> =
            self.points.iter().map(|&(p, [_, middle, _])| pixel(p, middle)).collect();
        root.draw(&PathElement::new(middles.clone(), colour.stroke_width(2)))?;
        for (&(p, [low, _, high]), &middle) in self.points.iter().zip(&middles) {
            if low < high {
                let ends = [pixel(p, low), pixel(p, high)];
                root.draw(&PathElement::new(ends, colour.stroke_width(2)))?;
                for (x, y) in ends {
                    root.draw(&PathElement::new([(x - 4, y), (x + 4, y)], colour.stroke_width(2)))?;
                }
            }
            marker(middle, self.arm, root)?;
        }
        middles.last().copied().ok_or_else(|| "an arm without rates".into())
    }
}
