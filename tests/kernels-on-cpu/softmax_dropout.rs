//! `kernels/softmax_dropout.cu` against its formula in f64.

use candle_core::{DType, Device};
use candle_dropout::DropMask;

use crate::common::*;
use crate::harness::{Plain, Program};
use crate::launch::softmax;

static KERNELS: Program = Program::new("kernels/softmax_dropout.cu");

const SCALE: f32 = 0.75;

/// Teams of 4, 8 and 32 lanes; a whole block a row; rows longer than the registers hold.
const SHAPES: &[[usize; 2]] = &[
    [1, 1],
    [5, 3],
    [70, 16],
    [9, 61],
    [130, 64],
    [11, 256],
    [10, 1000],
    [3, 1025],
    [3, 2048],
    [2, 8208],
    [2, 8195],
];

/// What is added to the scores: nothing, a tensor of their shape, or one row or one column of it.
#[derive(Clone, Copy, Debug)]
enum Additive {
    None,
    Full,
    Row,
    Column,
}

/// The inputs of a case in f64, and what the kernels have to make of them.
struct Reference {
    y: Vec<f64>,
    dscores: Vec<f64>,
}

/// `scores` holds the softmax inputs, scaled and masked.
fn reference(inputs: &[f64], dy: &[f64], keep: &[u8], cols: usize, drop: &DropMask) -> Reference {
    let mut reference = Reference { y: Vec::new(), dscores: Vec::new() };
    let drop_scale = |keep: &u8| f64::from(*keep) * f64::from(drop.rate().scale());
    for ((row, dy), keep) in inputs.chunks(cols).zip(dy.chunks(cols)).zip(keep.chunks(cols)) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let e: Vec<f64> = row
            .iter()
            .map(|t| if *t == f64::NEG_INFINITY { 0. } else { (t - max).exp() })
            .collect();
        let sum: f64 = e.iter().sum();
        let p: Vec<f64> = e.iter().map(|e| if sum == 0. { 0. } else { e / sum }).collect();
        let dp: Vec<f64> = dy.iter().zip(keep).map(|(dy, keep)| dy * drop_scale(keep)).collect();
        let dot: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
        reference.y.extend(p.iter().zip(keep).map(|(p, keep)| p * drop_scale(keep)));
        reference
            .dscores
            .extend(p.iter().zip(&dp).map(|(p, dp)| f64::from(SCALE) * p * (dp - dot)));
    }
    reference
}

/// `struct ScoreArgs`.
fn score_args(queries: usize, additive: Additive, cols: usize, causal: bool) -> Vec<u8> {
    let (stride, additive_cols) = match additive {
        Additive::None => (1, 0),
        Additive::Full => (1, cols),
        Additive::Row => (0, cols),
        Additive::Column => (1, 1),
    };
    let mut bytes = (queries as u64).to_le_bytes().to_vec();
    bytes.extend(row_map(0, stride));
    (additive_cols as u64).append(&mut bytes);
    [f64::from(SCALE); 2].into_iter().for_each(|scale| scale.append(&mut bytes));
    [u32::from(causal), 0].into_iter().for_each(|word| word.append(&mut bytes));
    bytes
}

fn equals_the_formula<T: Element>() {
    let mut cases = Vec::new();
    let mut expected = Vec::new();
    for &[rows, cols] in SHAPES {
        for (additive, causal, offset, start) in [
            (Additive::None, false, 0, [0, 0]),
            (Additive::Full, false, 0, [0, 3]),
            (Additive::Row, false, 1, [0, 0]),
            (Additive::Column, false, 0, [4, 8]),
            (Additive::None, true, 0, [0, 0]),
        ] {
            let drop = mask(0.2);
            let drop_args = mask_args(&drop, start);
            let drop = drop.window(&[start[0] + rows, start[1] + cols], &start);
            let (scores, dy): (Vec<T>, Vec<T>) = (random(1, rows * cols), random(2, rows * cols));
            let (bias_rows, bias_cols) = match additive {
                Additive::None => (0, 0),
                Additive::Full => (rows, cols),
                Additive::Row => (1, cols),
                Additive::Column => (rows, 1),
            };
            let mut bias: Vec<T> = random(3, bias_rows * bias_cols);
            if let Some(first) = bias.first_mut() {
                *first = T::from_f64(f64::NEG_INFINITY);
            }

            let input_at = |i: usize| {
                let (row, col) = (i / cols, i % cols);
                let bias = match additive {
                    Additive::None => 0.,
                    Additive::Full => bias[i].to_f64(),
                    Additive::Row => bias[col].to_f64(),
                    Additive::Column => bias[row].to_f64(),
                };
                let hidden = causal && col + rows > row + cols;
                if hidden {
                    f64::NEG_INFINITY
                } else {
                    f64::from(SCALE) * scores[i].to_f64() + bias
                }
            };
            let inputs: Vec<f64> = (0..rows * cols).map(input_at).collect();
            let keep: Vec<u8> = values(
                &drop.to_tensor((rows, cols), &Device::Cpu).unwrap().to_dtype(DType::U8).unwrap(),
            );
            let wide_dy: Vec<f64> = dy.iter().map(|dy| dy.to_f64()).collect();
            let reference = reference(&inputs, &wide_dy, &keep, cols, &drop);

            let case = |pass| {
                let case = case::<T>(
                    &format!("softmax_dropout_{pass}"),
                    softmax(rows, cols, MULTIPROCESSORS),
                )
                .input(&scores)
                .misaligned_by(offset * size_of::<T>());
                if bias.is_empty() { case.null() } else { case.input(&bias) }
            };
            let args = score_args(rows, additive, cols, causal);
            let what = format!(
                "[{rows}, {cols}], additive {additive:?}, causal {causal}, start {start:?}"
            );
            for (pass, expected_output) in [("fwd", reference.y), ("bwd", reference.dscores)] {
                let case = if pass == "bwd" { case(pass).input(&dy) } else { case(pass) };
                cases.push(
                    case.output::<T>(rows * cols)
                        .value(rows as u64)
                        .value(cols as u64)
                        .value_bytes(&args)
                        .value_bytes(&drop_args),
                );
                expected.push((expected_output, format!("{pass} {what}")));
            }
        }
    }
    for (outputs, (expected, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_close(&outputs.get::<T>(0), &expected, &what);
    }
}

#[test]
fn forward_and_backward_equal_the_formula() {
    for_each_dtype!(equals_the_formula());
}
