//! `kernels/broadcast_dropout.cu`, bit for bit the CPU ops.

use candle_core::{Device, Tensor};
use candle_dropout::functional::{alpha_dropout, broadcast_dropout, embedding_dropout};
use candle_dropout::sizes::elementwise;
use candle_dropout::{DropMask, MaskArgs, MaskKey};

use crate::host::*;

static KERNELS: Program = Program::new("kernels/broadcast_dropout.cu");

/// A tensor as the kernel sees it.
struct Grouped {
    dims: &'static [usize],
    shared: &'static [usize],
    /// Rows, columns, columns of the mask where each row is a group, and rows that have one row of the mask.
    sizes: [usize; 4],
    /// Where the mask begins in a larger one.
    start: &'static [usize],
}

/// Channels, time, both ends, all, none; windows that begin within a call; rows of one column.
const GROUPED: &[Grouped] = &[
    Grouped { dims: &[2, 3, 5, 7], shared: &[2, 3], sizes: [6, 35, 3, 1], start: &[1, 5] },
    Grouped { dims: &[3, 5, 4, 8], shared: &[2, 3], sizes: [15, 32, 5, 1], start: &[0, 0] },
    Grouped { dims: &[4, 33, 1], shared: &[2], sizes: [132, 1, 33, 1], start: &[1 << 33, 3] },
    Grouped { dims: &[2, 7, 24], shared: &[1], sizes: [14, 24, 0, 7], start: &[2, 8] },
    Grouped { dims: &[3, 5, 13], shared: &[1], sizes: [15, 13, 0, 5], start: &[2, 3] },
    Grouped { dims: &[2, 3, 2, 5, 16], shared: &[0, 2, 4], sizes: [60, 16, 5, 1], start: &[2, 1] },
    Grouped { dims: &[2, 3, 2, 5, 9], shared: &[0, 2], sizes: [60, 9, 0, 1], start: &[3, 0, 4] },
    Grouped { dims: &[2, 3, 4, 1032], shared: &[1, 2], sizes: [24, 1032, 0, 12], start: &[1, 0] },
    Grouped { dims: &[9, 8], shared: &[0], sizes: [9, 8, 0, 9], start: &[8] },
    Grouped { dims: &[3, 40], shared: &[0, 1], sizes: [1, 120, 1, 1], start: &[] },
    Grouped { dims: &[3, 1040], shared: &[], sizes: [3, 1040, 0, 1], start: &[0, 0] },
];

fn window(grouped: &Grouped, drop_p: f64) -> DropMask {
    let own = grouped.dims.iter().enumerate().filter(|(d, _)| !grouped.shared.contains(d));
    let full: Vec<usize> = own.zip(grouped.start).map(|((_, dim), start)| dim + start).collect();
    DropMask::new(drop_p, MaskKey::derive(7, 11)).unwrap().window(&full, grouped.start)
}

fn launch<T: Element>(
    x: &[T],
    ids: Option<&[u32]>,
    sizes: [usize; 4],
    values: [f32; 3],
    (mask, offset): (&MaskArgs, usize),
) -> Case {
    let case = case::<T>("broadcast_dropout_fwd", elementwise(sizes[0], sizes[1], 3)).input(x);
    let case = match ids {
        Some(ids) => case.input(ids),
        None => case.null(),
    };
    let case = case.output::<T>(x.len()).misaligned_by(offset * size_of::<T>());
    let case = sizes.iter().fold(case, |case, size| case.value(*size as u64));
    values.iter().fold(case, |case, value| case.value(*value)).by_value(mask)
}

/// The three numbers of alpha dropout, as it gives them for 0, 1 and what is dropped.
fn values_of_alpha(drop_p: f64) -> [f32; 3] {
    let at = |x: f64, key: u64| {
        let x = Tensor::new(&[x], &Device::Cpu).unwrap();
        let drop = DropMask::new(drop_p, MaskKey::new(key)).unwrap();
        (values::<u8>(&drop.to_tensor(1, &Device::Cpu).unwrap())[0] == 1, {
            values::<f64>(&alpha_dropout(&x, (), &drop).unwrap())[0]
        })
    };
    let kept = (0..).find(|key| at(0., *key).0).unwrap();
    let dropped = (0..).find(|key| !at(0., *key).0).unwrap();
    let shift = at(0., kept).1;
    [(at(1., kept).1 - shift) as f32, shift as f32, at(0., dropped).1 as f32]
}

fn equals_the_cpu<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for grouped in GROUPED {
        for (drop_p, offset, alpha) in [(0.4, 0, false), (0.4, 1, true), (1., 0, false)] {
            let drop = window(grouped, drop_p);
            let mask = drop.args_shared("test", grouped.dims, grouped.shared).unwrap();
            let len = grouped.dims.iter().product();
            let x: Vec<T> = random(1, len);
            let of = tensor(&x, grouped.dims);
            let (y, values_of) = if alpha {
                (alpha_dropout(&of, grouped.shared, &drop), values_of_alpha(drop_p))
            } else {
                (broadcast_dropout(&of, grouped.shared, &drop), [drop.rate().scale(), -0., 0.])
            };
            cases.push(launch(&x, None, grouped.sizes, values_of, (&mask, offset)));
            let what = format!("{:?} over {:?}, p {drop_p}", grouped.dims, grouped.shared);
            expected.push((values::<T>(&y.unwrap()), what));
        }
    }
    for (outputs, (expected, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_same(&outputs.get::<T>(0), &expected, &what);
    }
}

#[test]
fn forward_equals_the_cpu() {
    skip_without_compiler!();
    for_each_dtype!(equals_the_cpu());
}

/// Ids up to the largest, each with its own decision wherever it occurs; what is dropped is not read.
fn words_equal_the_cpu<T: Element>() {
    let ids = [5u32, 0, 5, u32::MAX, 70_000, 8, 7, u32::MAX, 13];
    let drop = DropMask::new(0.5, MaskKey::derive(7, 11)).unwrap();
    let mask = drop.args("test", &[1]).unwrap();
    let mut cases = Vec::new();
    let mut expected = Vec::new();
    for cols in [1, 7, 24, 1032] {
        let mut x: Vec<T> = random(1, ids.len() * cols);
        x.iter_mut().enumerate().step_by(3).for_each(|(i, x)| *x = poison(i));
        let of_ids = Tensor::new(&ids, &Device::Cpu).unwrap();
        let y = embedding_dropout(&tensor(&x, &[ids.len(), cols]), &of_ids, &drop).unwrap();
        let sizes = [ids.len(), cols, usize::MAX, 1];
        let values_of = [drop.rate().scale(), -0., 0.];
        cases.push(launch(&x, Some(&ids), sizes, values_of, (&mask, 0)));
        expected.push(values::<T>(&y));
    }
    for (outputs, expected) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_same(&outputs.get::<T>(0), &expected, "words");
    }
}

#[test]
fn whole_words_equal_the_cpu() {
    skip_without_compiler!();
    for_each_dtype!(words_equal_the_cpu());
}

#[test]
fn the_mask_is_that_of_an_independent_implementation() {
    skip_without_compiler!();
    for by_row in [false, true] {
        assert_keeps_the_vectors(&KERNELS, |mask, cols| {
            let sizes = if by_row { [cols, 1, cols, 1] } else { [1, cols, 0, 1] };
            launch(&vec![1f32; cols], None, sizes, [2., -0., 0.], (mask, 0))
        });
    }
}

// mutant: row of the mask lost|s/mask\.rows\.map\(group \/ mask_cols\)/mask.rows.map(0)/
// mutant: column of the mask lost|s/group % mask_cols\)/0)/
// mutant: words by their place|s/ids \? ids\[row\] : row/row/
// mutant: rows by columns alone|s/mask_row = mask\.rows\.map\(row\)/mask_row = 0/
// mutant: shift lost|s/__fadd_rn\(__fmul_rn\(v\[j\], scale\), shift\)/__fmul_rn(v[j], scale)/
// mutant: fills with 0|s/shift\) : fill/shift) : 0.f/
// mutant: rows that repeat from the wrong one|s/shared \* repeat \+/shared +/
// mutant: draws of the first columns for all|s/draw_unaligned\(mask, mask_row, first\)/draw_unaligned(mask, mask_row, 0)/
// mutant: repeats run into the next|s/row \+ i < end/row + i < rows/
