//! `kernels/dropout_add_norm.cu`: the stream bit for bit the CPU op, the rest against its formula in f64.

use candle_core::{DType, Var};
use candle_dropout::{Norm, dropout_add, reference};

use crate::common::*;
use crate::harness::Program;
use crate::launch::{norm, norm_bwd, norm_totals};

static KERNELS: Program = Program::new("kernels/dropout_add_norm.cu");

const EPS: f32 = 0.125;

/// Teams of 4, 8 and 32 lanes; a whole block a row; rows longer than the registers hold; more teams than
/// rows, and more rows than teams.
const SHAPES: &[[usize; 2]] = &[
    [1, 1],
    [5, 3],
    [130, 16],
    [9, 61],
    [67, 136],
    [10, 1000],
    [3, 1027],
    [3, 2048],
    [2, 8208],
    [3, 8195],
];

/// Residual, bias, norm's bias, removes the mean, misaligned by, start of the mask.
type Form = (bool, bool, bool, bool, usize, [usize; 2]);

const FORMS: &[Form] = &[
    (true, true, true, true, 0, [0, 0]),
    (true, false, false, false, 0, [3, 16]),
    (false, true, true, false, 0, [1, 5]),
    (false, false, false, true, 1, [0, 0]),
];

fn wide<T: Element>(values: &[T], shape: &[usize]) -> candle_core::Tensor {
    tensor(values, shape).to_dtype(DType::F64).unwrap()
}

/// The norm with these parameters in f64.
fn wide_norm<T: Element>(weight: &[T], bias: Option<&[T]>, removes_mean: bool) -> Norm {
    let cols = weight.len();
    let (weight, bias) = (wide(weight, &[cols]), bias.map(|bias| wide(bias, &[cols])));
    match (removes_mean, bias) {
        (true, bias) => Norm::layer_norm(weight, bias, EPS.into()),
        (false, None) => Norm::rms_norm(weight, EPS.into()),
        (false, Some(bias)) => Norm::rms_norm(weight, EPS.into()).with_bias(bias),
    }
}

fn forward<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for &[rows, cols] in SHAPES {
        for &form in FORMS {
            let (has_residual, has_bias, has_norm_bias, removes_mean, offset, start) = form;
            let (len, drop) = (rows * cols, mask(0.25));
            let x: Vec<T> = random(1, len);
            let residual: Vec<T> =
                if has_residual { random(2, len) } else { vec![T::from_f64(0.); len] };
            let bias: Option<Vec<T>> = has_bias.then(|| random(3, cols));
            let weight: Vec<T> = random(4, cols);
            let norm_bias: Option<Vec<T>> = has_norm_bias.then(|| random(5, cols));

            let mask_args = mask_args(&drop, start);
            let drop = drop.window(&[start[0] + rows, start[1] + cols], &start);
            let shape = [rows, cols];
            let bias_tensor = bias.as_ref().map(|bias| tensor(bias, &[cols]));
            let (x_tensor, residual_tensor) = (tensor(&x, &shape), tensor(&residual, &shape));
            let z = dropout_add(&x_tensor, &residual_tensor, bias_tensor.as_ref(), &drop).unwrap();
            let wide_norm = wide_norm(&weight, norm_bias.as_deref(), removes_mean);
            let n = reference::norm(&z.to_dtype(DType::F64).unwrap(), &wide_norm).unwrap();

            let case = case::<T>("dropout_add_norm_fwd", norm(rows, cols, MULTIPROCESSORS))
                .input(&x)
                .misaligned_by(offset * size_of::<T>());
            let case = if has_residual { case.input(&residual) } else { case.null() };
            let case = match &bias {
                Some(bias) => case.input(bias),
                None => case.null(),
            };
            let case = case.input(&weight);
            let case = match &norm_bias {
                Some(bias) => case.input(bias),
                None => case.null(),
            };
            cases.push(
                case.output::<T>(len)
                    .output::<T>(len)
                    .value(rows as u64)
                    .value(cols as u64)
                    .value(EPS)
                    .value(u32::from(removes_mean))
                    .value_bytes(&mask_args),
            );
            expected.push((values::<T>(&z), values::<f64>(&n), format!("{shape:?} {form:?}")));
        }
    }
    for (outputs, (z, n, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_same(&outputs.get::<T>(0), &z, &what);
        assert_close(&outputs.get::<T>(1), &n, &what);
    }
}

#[test]
fn forward_is_the_stream_of_the_cpu_and_its_norm() {
    for_each_dtype!(forward());
}

fn norm_alone<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for &[rows, cols] in SHAPES {
        let (z, weight): (Vec<T>, Vec<T>) = (random(1, rows * cols), random(2, cols));
        let n = reference::norm(&wide(&z, &[rows, cols]), &wide_norm(&weight, None, true));
        let case = case::<T>("dropout_add_norm_fwd", norm(rows, cols, MULTIPROCESSORS));
        cases.push(
            case.input(&z)
                .null()
                .null()
                .input(&weight)
                .null()
                .null()
                .output::<T>(rows * cols)
                .value(rows as u64)
                .value(cols as u64)
                .value(EPS)
                .value(1u32)
                .value_bytes(&mask_args(&candle_dropout::DropMask::none(), [0, 0])),
        );
        expected.push((values::<f64>(&n.unwrap()), format!("[{rows}, {cols}]")));
    }
    for (outputs, (n, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_close(&outputs.get::<T>(0), &n, &what);
    }
}

#[test]
fn the_norm_alone_needs_no_stream() {
    for_each_dtype!(norm_alone());
}

fn backward<T: Element>() {
    for &[rows, cols] in SHAPES {
        for (removes_mean, offset) in [(true, 0), (false, 0), (true, 1)] {
            let (z, dn): (Vec<T>, Vec<T>) = (random(1, rows * cols), random(2, rows * cols));
            let weight: Vec<T> = random(3, cols);
            let bias = vec![T::from_f64(0.); cols];
            let var =
                |values: &[T], shape: &[usize]| Var::from_tensor(&wide(values, shape)).unwrap();
            let (z_var, weight_var) = (var(&z, &[rows, cols]), var(&weight, &[cols]));
            let bias_var = var(&bias, &[cols]);
            let norm = match removes_mean {
                true => {
                    let (weight, bias) = (weight_var.as_tensor(), bias_var.as_tensor());
                    Norm::layer_norm(weight.clone(), Some(bias.clone()), EPS.into())
                }
                false => Norm::rms_norm(weight_var.as_tensor().clone(), EPS.into())
                    .with_bias(bias_var.as_tensor().clone()),
            };
            let n = reference::norm(&z_var, &norm).unwrap();
            let grads = (n * wide(&dn, &[rows, cols])).unwrap().backward().unwrap();
            let grad = |var: &Var| values::<f64>(grads.get(var).unwrap());

            let launch = norm_bwd(rows, cols, MULTIPROCESSORS);
            let blocks = launch.grid[0] as usize;
            let case = case::<T>("dropout_add_norm_bwd", launch)
                .input(&z)
                .input(&weight)
                .input(&dn)
                .misaligned_by(offset * size_of::<T>())
                .output::<T>(rows * cols)
                .output::<f32>(2 * blocks * cols)
                .value(rows as u64)
                .value(cols as u64)
                .value(EPS)
                .value(u32::from(removes_mean));
            let outputs = KERNELS.run_one(case).unwrap();
            let totals = crate::common::case::<T>("dropout_add_norm_bwd_total", norm_totals(cols))
                .input(&outputs.get::<f32>(1))
                .output::<T>(cols)
                .output::<T>(cols)
                .value(blocks as u64)
                .value(cols as u64);
            let totals = KERNELS.run_one(totals).unwrap();
            let what = format!("[{rows}, {cols}], mean {removes_mean}, offset {offset}");
            // With a single column dz cancels to 0: the size of its terms is what rounds.
            let mut dz = (outputs.get::<T>(0), grad(&z_var));
            dz.0.push(T::from_f64(4.));
            dz.1.push(4.);
            assert_close(&dz.0, &dz.1, &format!("dz {what}"));
            let (dweight, dbias) = (totals.get::<T>(0), totals.get::<T>(1));
            assert_close(&dweight, &grad(&weight_var), &format!("dweight {what}"));
            assert_close(&dbias, &grad(&bias_var), &format!("dbias {what}"));
        }
    }
}

#[test]
fn backward_gives_the_gradients_of_the_formula() {
    for_each_dtype!(backward());
}
