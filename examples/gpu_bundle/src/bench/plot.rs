//! GB/s over the size of x: each op forward, fused and as candle's chain, under the roof of a plain copy.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::results::Record;

const COLOURS: [RGBColor; 9] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
    RGBColor(23, 190, 207),
    RGBColor(188, 189, 34),
    RGBColor(127, 127, 127),
];

/// One panel a dtype, at drop p = 0.1.
pub fn roofline(path: &Path, title: &str, records: &[Record]) -> Result<()> {
    let rated = records.iter().filter(|r| r.gb_s.is_some());
    let mut dtypes: Vec<&str> = rated.map(|r| r.dtype.as_str()).collect();
    dtypes.sort_unstable();
    dtypes.dedup();
    let root = SVGBackend::new(path, (560 * dtypes.len() as u32, 520)).into_drawing_area();
    root.fill(&WHITE)?;
    let subtitle = "forward, drop p = 0.1 where there is one; solid: fused, dashed: candle's chain";
    let root = root.titled(&format!("{title}: {subtitle}"), ("sans-serif", 17))?;
    for (area, dtype) in root.split_evenly((1, dtypes.len())).iter().zip(dtypes) {
        panel(area, dtype, records).map_err(|e| anyhow!("{e}"))?;
    }
    root.present()?;
    Ok(())
}

fn panel(
    area: &DrawingArea<SVGBackend, plotters::coord::Shift>,
    dtype: &str,
    records: &[Record],
) -> Result<(), Box<dyn std::error::Error>> {
    let element_bytes = if dtype == "f32" { 4. } else { 2. };
    let points = |op: &str, library: &str| -> Vec<(f64, f64)> {
        let has_rate = records.iter().any(|r| r.op == op && r.drop_p > 0.);
        let is_wanted = |r: &&Record| {
            r.dtype == dtype
                && r.op == op
                && r.pass == "forward"
                && r.library == library
                && (r.drop_p > 0. || !has_rate)
        };
        let point =
            |r: &Record| Some((r.shape.iter().product::<usize>() as f64 * element_bytes, r.gb_s?));
        records.iter().filter(is_wanted).filter_map(point).collect()
    };
    let all = records.iter().filter(|r| r.dtype == dtype && r.pass == "forward");
    let rates: Vec<f64> = all.filter_map(|r| r.gb_s).collect();
    let most = rates.iter().copied().fold(1e-3, f64::max) * 2.;
    let least = rates.iter().copied().fold(most, f64::min) / 2.;
    let mut chart = ChartBuilder::on(area)
        .caption(dtype, ("sans-serif", 15))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d((8e3..4e9).log_scale(), (least..most).log_scale())?;
    chart.configure_mesh().x_desc("bytes of x").y_desc("GB/s").light_line_style(WHITE).draw()?;
    let roof = points("copy", "candle");
    chart
        .draw_series(LineSeries::new(roof, BLACK.stroke_width(2)))?
        .label("plain copy")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], BLACK.stroke_width(2)));
    let mut ops: Vec<&str> = Vec::new();
    for record in records.iter().filter(|r| r.op != "copy" && r.gb_s.is_some()) {
        if !ops.contains(&record.op.as_str()) {
            ops.push(&record.op);
        }
    }
    for (op, colour) in ops.into_iter().zip(COLOURS) {
        chart
            .draw_series(LineSeries::new(points(op, "candle-dropout"), colour.stroke_width(2)))?
            .label(op)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(DashedLineSeries::new(points(op, "candle"), 4, 4, colour.into()))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    Ok(())
}
