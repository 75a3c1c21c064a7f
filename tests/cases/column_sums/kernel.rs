//! `kernels/column_sums.cu`: sums in f64.

use candle_dropout::functional::ColumnSumsGrids;

use crate::host::*;

static KERNELS: Program = Program::new("kernels/column_sums.cu");

/// Windows of masks with the offset of a view in elements: the shapes in one corner of a mask each, then what is
/// a part in several dimensions.
fn forms() -> Vec<(Mask, Vec<usize>, usize, String)> {
    let mut forms = Vec::new();
    for dims in SHAPES {
        for (offset, start, drop_p) in [
            (0, [0, 0], 0.25),
            (0, [3, 16], 0.25),
            (1, [0, 0], 0.25),
            (0, [1, 5], 0.25),
            (0, [0, 0], 0.),
            (0, [0, 0], 1.),
        ] {
            let what = format!("{dims:?}, offset {offset}, start {start:?}, p {drop_p}");
            forms.push((Mask::from_start(drop_p, dims, &start), dims.to_vec(), offset, what));
        }
    }
    for &window in WINDOWS {
        for drop_p in [0.25, 0., 1.] {
            let what = format!("{window:?}, p {drop_p}");
            forms.push((Mask::window(drop_p, window), window[0].to_vec(), 0, what));
        }
    }
    forms
}

fn forward<T: Element>() {
    let (mut sums, mut expected) = (Vec::new(), Vec::new());
    for (at, (mask, dims, offset, what)) in forms().into_iter().enumerate() {
        let (cols, len) = (dims[dims.len() - 1], mask.keep.len());
        let rows = len / cols;
        let mut x: Vec<T> = random(4, len);
        let (mut y, mut terms) = (vec![0f64; cols], vec![0f64; cols]);
        for (i, (x, keep)) in x.iter_mut().zip(&mask.keep).enumerate() {
            if *keep {
                y[i % cols] += x.to_f64() * mask.scale;
                terms[i % cols] += x.to_f64().abs() * mask.scale;
            } else {
                *x = poison(i);
            }
        }
        let grids = ColumnSumsGrids::new(rows, cols, MULTIPROCESSORS[at % 2]);
        let chunks = grids.sums.grid[1] as usize;
        sums.push(
            case::<T>("column_sums_fwd", grids.sums)
                .input(&x)
                .misaligned_by(offset * size_of::<T>())
                .output::<f32>(chunks * cols)
                .value(rows as u64)
                .value(cols as u64)
                .by_value(&mask.args),
        );
        expected.push((grids.totals, chunks, cols, y, terms, what));
    }
    let sums = KERNELS.run(&sums).unwrap();
    let total = |(at, sums): (usize, &Outputs)| -> Case {
        let (launch, chunks, cols, ..) = expected[at];
        case::<T>("column_sums_fwd_total", launch)
            .input(&sums.get::<f32>(0))
            .output::<T>(cols)
            .value(chunks as u64)
            .value(cols as u64)
    };
    let totals = KERNELS.run(&sums.iter().enumerate().map(total).collect::<Vec<_>>()).unwrap();
    for (outputs, (_, _, _, y, terms, what)) in totals.iter().zip(&expected) {
        assert_close(&outputs.get::<T>(0), y, terms, what);
    }
}

#[test]
fn forward_is_the_sum_of_what_is_kept() {
    skip_without_compiler!();
    for_each_dtype!(forward());
}

#[test]
fn the_mask_is_that_of_an_independent_implementation() {
    skip_without_compiler!();
    assert_keeps_the_vectors(&KERNELS, |mask, cols| {
        case::<f32>("column_sums_fwd", ColumnSumsGrids::new(1, cols, 1).sums)
            .input(&vec![1f32; cols])
            .output::<f32>(cols)
            .value(1u64)
            .value(cols as u64)
            .by_value(mask)
    });
}

// mutant: drops by product|s/keeps\(mask, draws\[j\]\) \? v\[j\] \* mask\.scale : 0\.f/v[j] * (keeps(mask, draws[j]) ? mask.scale : 0.f)/
// mutant: aligned draws|s/VECTOR \? draw\(mask/true ? draw(mask/
// mutant: one chunk only|s/chunk < chunks/chunk < 1/
