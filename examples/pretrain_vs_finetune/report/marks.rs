//! Lines that are told apart without a legend: colours, markers, and labels where lines end. The plots
//! of `gpu_bundle` have the same.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Of Okabe and Ito's palette, which colour-blind readers tell apart, all but yellow, which is faint
/// on white, and black, which is for what lines are compared with.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
pub const GRID: RGBColor = RGBColor(230, 230, 230);
pub const AXIS: RGBColor = RGBColor(110, 110, 110);
pub const TEXT: RGBColor = RGBColor(40, 40, 40);

/// Pixels that labels beside a panel need, and between the lines of two of them.
pub const LABEL_ROOM: u32 = 160;
const LABEL_HEIGHT: i32 = 16;

pub fn colour(line: usize) -> RGBColor {
    COLOURS[line % COLOURS.len()]
}

/// A disc, a triangle, a square or a diamond: another one where colours begin anew.
pub fn marker((x, y): (i32, i32), line: usize, root: &Area) -> Drawn {
    let style = colour(line).filled();
    match (line + line / COLOURS.len()) % 4 {
        0 => root.draw(&Circle::new((x, y), 4, style))?,
        1 => root.draw(&TriangleMarker::new((x, y), 6, style))?,
        2 => root.draw(&Rectangle::new([(x - 4, y - 4), (x + 4, y + 4)], style))?,
        _ => root.draw(&Polygon::new([(x - 6, y), (x, y - 6), (x + 6, y), (x, y + 6)], style))?,
    }
    Ok(())
}

/// A label of the line that ends at `end`; of something to compare with where `line` is `None`.
pub struct Label<'a> {
    pub text: &'a str,
    pub line: Option<usize>,
    pub end: (i32, i32),
}

/// Writes labels to the right of a panel that ends at `right`, all in pixels of `root`.
pub fn write_labels(labels: &[Label], right: i32, root: &Area) -> Drawn {
    let heights = apart(&labels.iter().map(|label| label.end.1).collect::<Vec<_>>());
    for (&Label { text, line, end }, y) in labels.iter().zip(heights) {
        let x = right + 30;
        let leader = [end, (right + 4, y), (x - 12, y)];
        let style = line.map_or(TEXT, colour).stroke_width(1);
        root.draw(&PathElement::new(leader, style))?;
        if let Some(line) = line {
            marker((x - 10, y), line, root)?;
        }
        let style = ("sans-serif", 14).into_font().color(&TEXT);
        root.draw_text(text, &style.pos(Pos::new(HPos::Left, VPos::Center)), (x, y))?;
    }
    Ok(())
}

/// Heights near those that are wanted, in their order, of labels that do not overlap.
fn apart(wanted: &[i32]) -> Vec<i32> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by_key(|&i| wanted[i]);
    let mut heights: Vec<f64> = wanted.iter().copied().map(f64::from).collect();
    // Neighbours push one another away until all have room.
    for _ in 0..1000 {
        for pair in order.windows(2) {
            let missing = f64::from(LABEL_HEIGHT) - (heights[pair[1]] - heights[pair[0]]);
            if missing > 0.0 {
                heights[pair[0]] -= missing / 2.0;
                heights[pair[1]] += missing / 2.0;
            }
        }
    }
    heights.into_iter().map(|y| y.round() as i32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_keep_their_order_and_do_not_overlap() {
        for wanted in [vec![100; 9], vec![100, 20, 101, 115, 300], vec![50]] {
            let got = apart(&wanted);
            let mut order: Vec<usize> = (0..wanted.len()).collect();
            order.sort_by_key(|&i| (wanted[i], got[i]));
            for pair in order.windows(2) {
                // Both ends are rounded.
                assert!(got[pair[1]] - got[pair[0]] >= LABEL_HEIGHT - 1, "{wanted:?}: {got:?}");
            }
        }
        assert_eq!(apart(&[20, 300]), [20, 300]);
    }
}
