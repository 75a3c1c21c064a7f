//! GB/s over the size of x: each op forward, fused and as candle's chain, under the roof of a plain copy.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::pretrain_vs_finetune::report::marks::{
    AXIS, Area, Drawn, GRID, LABEL_ROOM, Label, TEXT, colour, marker, write_labels,
};
use crate::results::Record;

/// One panel a dtype, at drop p = 0.1.
pub fn roofline(path: &Path, title: &str, records: &[Record]) -> Result<()> {
    let rated = records.iter().filter(|r| r.gb_s.is_some());
    let mut dtypes: Vec<&str> = rated.map(|r| r.dtype.as_str()).collect();
    dtypes.sort_unstable();
    dtypes.dedup();
    let (width, height, head) = (640, 560, 56);
    let root = SVGBackend::new(path, (width * dtypes.len() as u32, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let lines =
        [title, "forward, drop p = 0.1 where there is one; solid: fused, dashed: candle's chain"];
    for (line, (y, size)) in lines.into_iter().zip([(10, 17), (34, 14)]) {
        root.draw_text(line, &("sans-serif", size).into_font().color(&TEXT), (14, y))?;
    }
    let (_, panels) = root.split_vertically(head);
    for (area, dtype) in panels.split_evenly((1, dtypes.len())).iter().zip(dtypes) {
        panel(area, &root, dtype, records).map_err(|e| anyhow!("{e}"))?;
    }
    root.present()?;
    Ok(())
}

fn panel(area: &Area, root: &Area, dtype: &str, records: &[Record]) -> Drawn {
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
    let bytes_of = |r: &Record| r.shape.iter().product::<usize>() as f64 * element_bytes;
    let sizes: Vec<f64> = records
        .iter()
        .filter(|r| r.dtype == dtype && r.pass == "forward" && r.gb_s.is_some())
        .map(bytes_of)
        .collect();
    let [first, last] = [f64::min as fn(f64, f64) -> f64, f64::max]
        .map(|end| sizes.iter().copied().reduce(end).unwrap_or(1.));
    let label_font = ("sans-serif", 13).into_font().color(&TEXT);
    let mut chart = ChartBuilder::on(area)
        .caption(dtype, ("sans-serif", 15).into_font().color(&TEXT))
        .margin(10)
        .margin_right(LABEL_ROOM)
        .x_label_area_size(42)
        .y_label_area_size(60)
        .build_cartesian_2d((first / 1.5..last * 1.5).log_scale(), (least..most).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .axis_style(AXIS)
        .label_style(label_font)
        .x_desc("bytes of x")
        .y_desc("GB/s")
        .x_label_formatter(&|bytes| decimal(*bytes))
        .y_label_formatter(&|rate| rate.to_string())
        .draw()?;
    let right = chart.backend_coord(&(last * 1.5, most)).0;
    let roof: Vec<(i32, i32)> =
        points("copy", "candle").iter().map(|point| chart.backend_coord(point)).collect();
    let mut labels = Vec::new();
    if let Some(&end) = roof.last() {
        root.draw(&PathElement::new(roof, BLACK.stroke_width(3)))?;
        labels.push(Label { text: "plain copy", line: None, end });
    }
    let mut ops: Vec<&str> = Vec::new();
    for record in records.iter().filter(|r| r.op != "copy" && r.gb_s.is_some()) {
        if !ops.contains(&record.op.as_str()) {
            ops.push(&record.op);
        }
    }
    for (line, op) in ops.into_iter().enumerate() {
        let style = colour(line).stroke_width(2);
        chart.draw_series(DashedLineSeries::new(points(op, "candle"), 4, 4, style))?;
        let fused: Vec<(i32, i32)> =
            points(op, "candle-dropout").iter().map(|point| chart.backend_coord(point)).collect();
        for &at in &fused {
            marker(at, line, root)?;
        }
        if let Some(&end) = fused.last() {
            root.draw(&PathElement::new(fused, style))?;
            labels.push(Label { text: op, line: Some(line), end });
        }
    }
    write_labels(&labels, right, root)
}

/// A power of ten of bytes.
fn decimal(bytes: f64) -> String {
    match bytes {
        b if b < 1e6 => format!("{} kB", b / 1e3),
        b if b < 1e9 => format!("{} MB", b / 1e6),
        b => format!("{} GB", b / 1e9),
    }
}
