//! `kernels/dropout.cu`, bit for bit the CPU op.

use candle_dropout::{DropMask, dropout};

use crate::common::*;
use crate::harness::Program;
use crate::launch::elementwise;

static KERNELS: Program = Program::new("kernels/dropout.cu");

/// Shapes x offsets of the views in elements x starts of the window x rates.
fn equals_the_cpu<T: Element>() {
    let mut cases = Vec::new();
    let mut expected = Vec::new();
    for &[rows, cols] in SHAPES {
        for (x_offset, y_offset, start, drop_p) in [
            (0, 0, [0, 0], 0.1),
            (1, 0, [5, 8], 0.5),
            (0, 1, [0, 3], 0.5),
            (8, 8, [2, 13], 0.9),
            (0, 0, [0, 0], 1.),
        ] {
            let drop = mask(drop_p);
            let mut x: Vec<T> = random(1, rows * cols);
            x[rows * cols / 2] = T::from_f64(f64::INFINITY);
            let args = mask_args(&drop, start);
            let drop: DropMask = drop.window(&[start[0] + rows, start[1] + cols], &start);
            let y = dropout(&tensor(&x, &[rows, cols]), &drop).unwrap();
            let size = size_of::<T>();
            cases.push(
                case::<T>("dropout_fwd", elementwise(rows, cols, MULTIPROCESSORS))
                    .input(&x)
                    .misaligned_by(x_offset * size)
                    .output::<T>(rows * cols)
                    .misaligned_by(y_offset * size)
                    .value(rows as u64)
                    .value(cols as u64)
                    .value_bytes(&args),
            );
            expected
                .push((values::<T>(&y), format!("[{rows}, {cols}], start {start:?}, p {drop_p}")));
        }
    }
    for (outputs, (expected, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_same(&outputs.get::<T>(0), &expected, &what);
    }
}

#[test]
fn forward_equals_the_cpu() {
    for_each_dtype!(equals_the_cpu());
}
