//! `kernels/norm.cu` against its formula in f64.

use std::cell::Cell;

use candle_core::{D, Tensor, Var};
use candle_dropout::functional::{Norm, NormArgs};
use candle_dropout::sizes::Launch;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::far::{Far, TOLERANCE, Tensors};
use super::formula;
use crate::host::*;

pub static KERNELS: Program = Program::new("kernels/norm.cu");

pub const EPS: f32 = 0.125;

/// Teams of 4, 8 and 32 lanes; a whole block a row; rows longer than the registers hold; more teams than
/// rows, and more rows than teams.
pub const SHAPES: &[[usize; 2]] = &[
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

/// The norm with these parameters in f64.
pub fn wide_norm<T: Element>(weight: &[T], bias: Option<&[T]>, removes_mean: bool) -> Norm {
    let cols = weight.len();
    let (weight, bias) = (wide(weight, &[cols]), bias.map(|bias| wide(bias, &[cols])));
    match (removes_mean, bias) {
        (true, bias) => Norm::layer_norm(weight, bias, EPS.into()),
        (false, None) => Norm::rms_norm(weight, EPS.into()),
        (false, Some(bias)) => Norm::rms_norm(weight, EPS.into()).with_bias(bias),
    }
}

/// What each element of a norm is the sum of: x and its mean, scaled, and the bias.
pub fn norm_terms(x: &Tensor, norm: &Norm) -> Vec<f64> {
    let abs = x.abs().unwrap();
    let size = match norm.remove_mean() {
        true => abs.broadcast_add(&abs.mean_keepdim(D::Minus1).unwrap()).unwrap(),
        false => abs,
    };
    let terms = size.broadcast_mul(&rstd(x, norm)).unwrap();
    let terms = terms.broadcast_mul(&norm.weight().abs().unwrap()).unwrap();
    values(&match norm.bias() {
        Some(bias) => terms.broadcast_add(&bias.abs().unwrap()).unwrap(),
        None => terms,
    })
}

fn rstd(x: &Tensor, norm: &Norm) -> Tensor {
    let centered = match norm.remove_mean() {
        true => x.broadcast_sub(&x.mean_keepdim(D::Minus1).unwrap()).unwrap(),
        false => x.clone(),
    };
    let variance = centered.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
    (variance + norm.eps()).unwrap().sqrt().unwrap().recip().unwrap()
}

/// Norm's bias, removes the mean, misaligned by.
const FORMS: &[(bool, bool, usize)] =
    &[(false, true, 0), (true, true, 0), (false, false, 0), (true, false, 1)];

/// A launch of `norm_fwd`.
pub fn forward_case<T: Element>(
    launch: Launch,
    x: &[T],
    weight: &[T],
    bias: &Option<Vec<T>>,
    (eps, removes_mean): (f32, bool),
    offset: usize,
) -> Case {
    case::<T>("norm_fwd", launch)
        .input(x)
        .misaligned_by(offset * size_of::<T>())
        .input(weight)
        .optional(bias)
        .output::<T>(x.len())
        .value((x.len() / weight.len()) as u64)
        .value(weight.len() as u64)
        .value(eps)
        .value(u32::from(removes_mean))
}

fn forward<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for &[rows, cols] in SHAPES {
        for &(has_bias, removes_mean, offset) in FORMS {
            let (x, weight): (Vec<T>, Vec<T>) = (random(1, rows * cols), random(2, cols));
            let bias: Option<Vec<T>> = has_bias.then(|| random(3, cols));
            let wide_x = wide(&x, &[rows, cols]);
            let wide_norm = wide_norm(&weight, bias.as_deref(), removes_mean);
            let y = formula(&wide_x, &wide_norm).unwrap();
            let launch = NormArgs::launch(rows, cols, MULTIPROCESSORS[cases.len() % 2]);
            cases.push(forward_case(launch, &x, &weight, &bias, (EPS, removes_mean), offset));
            let what = format!("[{rows}, {cols}], {has_bias} {removes_mean} {offset}");
            expected.push((values::<f64>(&y), norm_terms(&wide_x, &wide_norm), what));
        }
    }
    for (outputs, (y, terms, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_close(&outputs.get::<T>(0), &y, &terms, &what);
    }
}

#[test]
fn forward_equals_the_formula() {
    skip_without_compiler!();
    for_each_dtype!(forward());
}

/// What the elements of `dx`, `dweight` and `dbias` are the sums of, for the terms `h` of the norm without
/// parameters.
fn backward_terms<T: Element>(h: &[f64], dy: &[T], weight: &[T], rstd: &[f64]) -> [Vec<f64>; 3] {
    let cols = weight.len();
    let (mut dx, mut dweight, mut dbias) = (Vec::new(), vec![0.; cols], vec![0.; cols]);
    for ((h, dy), rstd) in h.chunks(cols).zip(dy.chunks(cols)).zip(rstd) {
        let size = |col: usize| (dy[col].to_f64() * weight[col].to_f64()).abs();
        let mean_g = (0..cols).map(size).sum::<f64>() / cols as f64;
        let mean_gh = (0..cols).map(|col| size(col) * h[col]).sum::<f64>() / cols as f64;
        for col in 0..cols {
            dx.push(rstd * (size(col) + mean_g + h[col] * mean_gh));
            dweight[col] += dy[col].to_f64().abs() * h[col];
            dbias[col] += dy[col].to_f64().abs();
        }
    }
    [dx, dweight, dbias]
}

/// `dx`, `dweight` and `dbias` from both kernels; dy is misaligned.
fn run_backward<T: Element>(
    launch: Launch,
    [x, weight, dy]: [&[T]; 3],
    eps: f32,
    removes_mean: bool,
    offset: usize,
) -> [Vec<T>; 3] {
    let (cols, blocks) = (weight.len(), launch.grid[0] as usize);
    let rows = x.len() / cols;
    let sums = case::<T>("norm_bwd", launch)
        .input(x)
        .input(weight)
        .input(dy)
        .misaligned_by(offset * size_of::<T>())
        .output::<T>(rows * cols)
        .output::<f32>(2 * blocks * cols)
        .value(rows as u64)
        .value(cols as u64)
        .value(eps)
        .value(u32::from(removes_mean));
    let outputs = KERNELS.run_one(sums).unwrap();
    let totals = case::<T>("norm_bwd_total", NormArgs::launch_bwd_total(cols))
        .input(&outputs.get::<f32>(1))
        .output::<T>(cols)
        .output::<T>(cols)
        .value(blocks as u64)
        .value(cols as u64);
    let totals = KERNELS.run_one(totals).unwrap();
    [outputs.get(0), totals.get(0), totals.get(1)]
}

fn backward<T: Element>() {
    for &[rows, cols] in SHAPES {
        for (at, (removes_mean, offset)) in
            [(true, 0), (false, 0), (true, 1)].into_iter().enumerate()
        {
            let (x, dy): (Vec<T>, Vec<T>) = (random(1, rows * cols), random(2, rows * cols));
            let weight: Vec<T> = random(3, cols);
            let bias = vec![T::from_f64(0.); cols];
            let var =
                |values: &[T], shape: &[usize]| Var::from_tensor(&wide(values, shape)).unwrap();
            let (x_var, weight_var) = (var(&x, &[rows, cols]), var(&weight, &[cols]));
            let bias_var = var(&bias, &[cols]);
            let norm = match removes_mean {
                true => {
                    let (weight, bias) = (weight_var.as_tensor(), bias_var.as_tensor());
                    Norm::layer_norm(weight.clone(), Some(bias.clone()), EPS.into())
                }
                false => Norm::rms_norm(weight_var.as_tensor().clone(), EPS.into())
                    .with_bias(bias_var.as_tensor().clone()),
            };
            let y = formula(&x_var, &norm).unwrap();
            let grads = (y * wide(&dy, &[rows, cols])).unwrap().backward().unwrap();
            let grad = |var: &Var| values::<f64>(grads.get(var).unwrap());

            let launch = NormArgs::launch_bwd(rows, cols, MULTIPROCESSORS[at % 2]);
            let [dx, dweight, dbias] =
                run_backward(launch, [&x, &weight, &dy], EPS, removes_mean, offset);
            let what = format!("[{rows}, {cols}], mean {removes_mean}, offset {offset}");
            let wide_x = wide(&x, &[rows, cols]);
            let plain = wide_norm(&vec![1f32; cols], None, removes_mean);
            let [dx_terms, dweight_terms, dbias_terms] = backward_terms(
                &norm_terms(&wide_x, &plain),
                &dy,
                &weight,
                &values(&rstd(&wide_x, &plain)),
            );
            assert_close(&dx, &grad(&x_var), &dx_terms, &format!("dx {what}"));
            assert_close(&dweight, &grad(&weight_var), &dweight_terms, &format!("dweight {what}"));
            assert_close(&dbias, &grad(&bias_var), &dbias_terms, &format!("dbias {what}"));
        }
    }
}

#[test]
fn backward_gives_the_gradients_of_the_formula() {
    skip_without_compiler!();
    for_each_dtype!(backward());
}

/// Every kind of team, rows in registers and not, vectors and single elements.
fn far() -> impl Strategy<Value = Far> {
    let cols =
        prop_oneof![4 => 1usize..300, 2 => (1usize..260).prop_map(|n| 8 * n), 1 => 8190usize..8210];
    let mean = prop_oneof![Just(0.), (-2f64..6.).prop_map(|power| 10f64.powf(power))];
    let deviation =
        prop_oneof![1 => Just(0.), 3 => (-4f64..0.).prop_map(|power| 10f64.powf(power))];
    let eps = prop_oneof![Just(1e-5f32), Just(1e-12)];
    (cols, 1usize..6, mean, deviation, eps, any::<u64>()).prop_map(
        |(cols, rows, mean, deviation, eps, seed)| Far { rows, cols, mean, deviation, eps, seed },
    )
}

#[test]
fn rows_far_from_0_keep_their_digits() {
    skip_without_compiler!();
    let judged = Cell::new([0; 4]);
    let config = ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() };
    let outcome = TestRunner::new(config).run(&(far(), any::<bool>()), |(far, many)| {
        let Far { rows, cols, eps, .. } = far;
        let all @ Tensors { x, weight, bias, dy } = &far.tensors();
        let [multiprocessors, offset] = [if many { 132 } else { 1 }, usize::from(many)];
        let launch = NormArgs::launch(rows, cols, multiprocessors);
        let bias = Some(bias.clone());
        let y = KERNELS.run_one(forward_case(launch, x, weight, &bias, (eps, true), offset));
        let launch = NormArgs::launch_bwd(rows, cols, multiprocessors);
        let [dx, dweight, dbias] = run_backward(launch, [x, weight, dy], eps, true, offset);
        let got = [y.unwrap().get(0), dx, dweight, dbias];
        for (at, (got, exact)) in got.iter().zip(all.exact(eps)).enumerate() {
            if !exact.is_known() {
                continue;
            }
            let (error, of) = (exact.error(got), ["y", "dx", "dweight", "dbias"][at]);
            prop_assert!(error <= TOLERANCE, "{} is off by {:e}", of, error);
            let mut count = judged.get();
            count[at] += 1;
            judged.set(count);
        }
        Ok(())
    });
    outcome.unwrap();
    // As many left out as half would be no test.
    assert!(judged.get().iter().all(|count| *count > 24), "{:?} of 48", judged.get());
}

#[test]
fn of_a_constant_row_the_bias_is_left_and_of_a_constant_gradient_nothing() {
    skip_without_compiler!();
    for value in [1972.7168f32, 1.59e5, -3.3e6, 1e38] {
        for cols in [1, 3, 61, 136, 768, 1027, 2048, 8208] {
            let (x, weight, bias) =
                (vec![value; 3 * cols], vec![0.3f32; cols], random::<f32>(1, cols));
            let launch = NormArgs::launch(3, cols, 1);
            let y = forward_case(launch, &x, &weight, &Some(bias.clone()), (1e-5, true), 0);
            let y: Vec<f32> = KERNELS.run_one(y).unwrap().get(0);
            assert!(y.chunks(cols).all(|y| y == bias), "{cols} times {value}");
            let launch = NormArgs::launch_bwd(3, cols, 1);
            let [dx, ..] = run_backward(launch, [&random(2, 3 * cols), &weight, &x], 1e-5, true, 0);
            assert!(dx.iter().all(|dx| *dx == 0.), "{cols} gradients of {value}");
        }
    }
}

// mutant: no second team of a row|s/for \(int team = 1; team < TEAMS/for (int team = TEAMS; team < TEAMS/
// mutant: mean of g lost|s/= removes_mean \? extent_of_g.*/= 0.f;/
// mutant: mean of g for RMSNorm|s/removes_mean \? extent_of_g/true ? extent_of_g/
// mutant: second mean of g lost|s/= removes_mean \? sums_of_g\[0\].*/= 0.f;/
// mutant: second mean of g for RMSNorm|s/removes_mean \? sums_of_g/true ? sums_of_g/
// mutant: dweight of dy alone|s/\+= d\[j\] \* h\[j\]/+= d[j]/
// mutant: teams without a row count|s/^( +)if \(is_mine\) \{/\1{/
// mutant of kernels/norm.cuh: eps lost|s/float\(cols\) \+ eps/float(cols)/
// mutant of kernels/norm.cuh: mean always removed|s/if \(removes_mean\)/if (true)/
// mutant of kernels/norm.cuh: second mean lost|s/rest = team_reduce\(thread_rest.*/;/
// mutant of kernels/norm.cuh: second mean is not removed|s/\(v\[i\]\[j\] - mean\) - rest/v[i][j] - mean/
// mutant of kernels/norm.cuh: mean out of range|s/fminf\(fmaxf\(of\[0\] \/ float\(cols\), of\[1\]\), of\[2\]\)/of[0] \/ float(cols)/
// mutant of kernels/norm.cuh: smallest lost|s/a\[1\] = fminf.*/;/
// mutant of kernels/norm.cuh: largest lost|s/a\[2\] = fmaxf.*/;/
// mutant of kernels/norm.cuh: bias lost|s/if \(bias\) load<VECTOR>/if (false) load<VECTOR>/
