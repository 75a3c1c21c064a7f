//! `kernels/dropout_add.cu`: forward bit for bit the CPU op, the bias gradient a sum in f64.

use candle_core::{DType, Device};
use candle_dropout::dropout_add;

use crate::common::*;
use crate::harness::Program;
use crate::launch::{column_sums, column_totals, elementwise};

static KERNELS: Program = Program::new("kernels/dropout_add.cu");

fn forward<T: Element>() {
    let mut cases = Vec::new();
    let mut expected = Vec::new();
    for &[rows, cols] in SHAPES {
        for (has_bias, offset, start) in
            [(false, 0, [0, 0]), (true, 0, [3, 16]), (true, 1, [0, 0]), (true, 0, [1, 5])]
        {
            let drop = mask(0.25);
            let (x, residual): (Vec<T>, Vec<T>) = (random(1, rows * cols), random(2, rows * cols));
            let bias: Option<Vec<T>> = has_bias.then(|| random(3, cols));
            let args = mask_args(&drop, start);
            let drop = drop.window(&[start[0] + rows, start[1] + cols], &start);
            let bias_tensor = bias.as_ref().map(|bias| tensor(bias, &[cols]));
            let shape = [rows, cols];
            let y = dropout_add(
                &tensor(&x, &shape),
                &tensor(&residual, &shape),
                bias_tensor.as_ref(),
                &drop,
            )
            .unwrap();
            let case = case::<T>("dropout_add_fwd", elementwise(rows, cols, MULTIPROCESSORS))
                .input(&x)
                .input(&residual)
                .misaligned_by(offset * size_of::<T>());
            let case = match &bias {
                Some(bias) => case.input(bias),
                None => case.null(),
            };
            cases.push(
                case.output::<T>(rows * cols)
                    .value(rows as u64)
                    .value(cols as u64)
                    .value_bytes(&args),
            );
            expected.push((
                values::<T>(&y),
                format!("[{rows}, {cols}], bias {has_bias}, start {start:?}"),
            ));
        }
    }
    for (outputs, (expected, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_same(&outputs.get::<T>(0), &expected, &what);
    }
}

#[test]
fn forward_equals_the_cpu() {
    for_each_dtype!(forward());
}

fn bias_gradient<T: Element>() {
    let drop = mask(0.25);
    for &[rows, cols] in SHAPES {
        for offset in [0, 1] {
            let dy: Vec<T> = random(4, rows * cols);
            let keep: Vec<u8> = values(
                &drop.to_tensor((rows, cols), &Device::Cpu).unwrap().to_dtype(DType::U8).unwrap(),
            );
            let mut expected = vec![0f64; cols];
            for (i, (dy, keep)) in dy.iter().zip(&keep).enumerate() {
                expected[i % cols] +=
                    dy.to_f64() * f64::from(*keep) * f64::from(drop.rate().scale());
            }

            let launch = column_sums(rows, cols, MULTIPROCESSORS);
            let chunks = launch.grid[1] as usize;
            let sums = case::<T>("dropout_add_bwd_bias", launch)
                .input(&dy)
                .misaligned_by(offset * size_of::<T>())
                .output::<f32>(chunks * cols)
                .value(rows as u64)
                .value(cols as u64)
                .value_bytes(&mask_args(&drop, [0, 0]));
            let sums = KERNELS.run_one(sums).unwrap().get::<f32>(0);
            let totals =
                case::<T>("dropout_add_bwd_bias_total", column_totals(cols, MULTIPROCESSORS))
                    .input(&sums)
                    .output::<T>(cols)
                    .value(chunks as u64)
                    .value(cols as u64);
            let dbias = KERNELS.run_one(totals).unwrap().get::<T>(0);
            assert_close(&dbias, &expected, &format!("[{rows}, {cols}], offset {offset}"));
        }
    }
}

#[test]
fn the_bias_gradient_is_the_sum_of_its_columns() {
    for_each_dtype!(bias_gradient());
}
