//! `kernels/dropout_add_norm.cu`: the stream bit for bit the CPU op, the rest against its formula in f64.

use candle_core::{D, DType, Tensor, Var};
use candle_dropout::{Norm, dropout_add};

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

/// Residual, bias, norm's bias, removes the mean, misaligned by, start of the mask, rate.
type Form = (bool, bool, bool, bool, usize, [usize; 2], f32);

const FORMS: &[Form] = &[
    (true, true, true, true, 0, [0, 0], 0.25),
    (true, false, false, false, 0, [3, 16], 0.25),
    (false, true, true, false, 0, [1, 5], 0.25),
    (false, false, false, true, 1, [0, 0], 0.25),
    (true, true, true, false, 0, [0, 0], 1.),
    (true, true, true, true, 0, [0, 0], 0.),
];

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

/// What each element of a norm is the sum of: z and its mean, scaled, and the bias.
fn norm_terms(z: &Tensor, norm: &Norm) -> Vec<f64> {
    let abs = z.abs().unwrap();
    let size = match norm.remove_mean() {
        true => abs.broadcast_add(&abs.mean_keepdim(D::Minus1).unwrap()).unwrap(),
        false => abs,
    };
    let terms = size.broadcast_mul(&rstd(z, norm)).unwrap();
    let terms = terms.broadcast_mul(&norm.weight().abs().unwrap()).unwrap();
    values(&match norm.bias() {
        Some(bias) => terms.broadcast_add(&bias.abs().unwrap()).unwrap(),
        None => terms,
    })
}

fn rstd(z: &Tensor, norm: &Norm) -> Tensor {
    let centered = match norm.remove_mean() {
        true => z.broadcast_sub(&z.mean_keepdim(D::Minus1).unwrap()).unwrap(),
        false => z.clone(),
    };
    let variance = centered.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
    (variance + norm.eps()).unwrap().sqrt().unwrap().recip().unwrap()
}

/// Shapes in one corner of a mask, and parts in several dimensions.
fn places() -> Vec<(Mask, Vec<usize>, Form)> {
    let mut places = Vec::new();
    for (at, dims) in SHAPES.iter().enumerate() {
        // Long rows take their time.
        let every = if dims[0] * dims[1] > 5000 { 2 } else { 1 };
        for &form in FORMS.iter().skip(at % every).step_by(every) {
            places.push((Mask::from_start(form.6, dims, &form.5), dims.to_vec(), form));
        }
    }
    for &window in WINDOWS {
        places.push((Mask::window(FORMS[0].6, window), window[0].to_vec(), FORMS[0]));
    }
    places
}

fn forward<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for (at, (mask, shape, form)) in places().into_iter().enumerate() {
        let (has_residual, has_bias, has_norm_bias, removes_mean, offset, ..) = form;
        let (cols, len) = (shape[shape.len() - 1], mask.keep.len());
        let rows = len / cols;
        let mut x: Vec<T> = random(1, len);
        (0..len).filter(|&i| !mask.keep[i]).for_each(|i| x[i] = poison(i));
        let residual: Option<Vec<T>> = has_residual.then(|| random(2, len));
        let bias: Option<Vec<T>> = has_bias.then(|| random(3, cols));
        let weight: Vec<T> = random(4, cols);
        let norm_bias: Option<Vec<T>> = has_norm_bias.then(|| random(5, cols));

        let stream = residual.clone().unwrap_or_else(|| vec![T::from_f64(0.); len]);
        let bias_tensor = bias.as_ref().map(|bias| tensor(bias, &[cols]));
        let (x_tensor, stream_tensor) = (tensor(&x, &shape), tensor(&stream, &shape));
        let z = dropout_add(&x_tensor, &stream_tensor, bias_tensor.as_ref(), &mask.drop).unwrap();
        let wide_norm = wide_norm(&weight, norm_bias.as_deref(), removes_mean);
        let wide_z = z.to_dtype(DType::F64).unwrap();
        let n = cases::norm::formula(&wide_z, &wide_norm).unwrap();
        let n_terms = norm_terms(&wide_z, &wide_norm);

        cases.push(
            case::<T>("dropout_add_norm_fwd", norm(rows, cols, MULTIPROCESSORS[at % 2]))
                .input(&x)
                .misaligned_by(offset * size_of::<T>())
                .optional(&residual)
                .optional(&bias)
                .input(&weight)
                .optional(&norm_bias)
                .output::<T>(len)
                .output::<T>(len)
                .value(rows as u64)
                .value(cols as u64)
                .value(EPS)
                .value(u32::from(removes_mean))
                .by_value(&mask.args),
        );
        let n = (values::<f64>(&n), n_terms);
        expected.push((values::<T>(&z), n, stream, mask.keep, format!("{shape:?} {form:?}")));
    }
    for (outputs, (expected_z, (n, n_terms), stream, keep, what)) in
        KERNELS.run(&cases).unwrap().iter().zip(expected)
    {
        let z = outputs.get::<T>(0);
        assert_same(&z, &expected_z, &what);
        assert_dropped(&z, &keep, &stream, &what);
        assert_close(&outputs.get::<T>(1), &n, &n_terms, &what);
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
        let (wide_z, wide_norm) = (wide(&z, &[rows, cols]), wide_norm(&weight, None, true));
        let n = cases::norm::formula(&wide_z, &wide_norm).unwrap();
        let launch = norm(rows, cols, MULTIPROCESSORS[cases.len() % 2]);
        let case = case::<T>("dropout_add_norm_fwd", launch);
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
                .by_value(&Mask::from_start(0., &[rows, cols], &[0, 0]).args),
        );
        let terms = norm_terms(&wide_z, &wide_norm);
        expected.push((values::<f64>(&n), terms, format!("[{rows}, {cols}]")));
    }
    for (outputs, (n, terms, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_close(&outputs.get::<T>(0), &n, &terms, &what);
    }
}

#[test]
fn the_norm_alone_needs_no_stream() {
    for_each_dtype!(norm_alone());
}

/// What the elements of `dz`, `dweight` and `dbias` are the sums of, for the terms `h` of the norm without
/// parameters.
fn backward_terms<T: Element>(h: &[f64], dn: &[T], weight: &[T], rstd: &[f64]) -> [Vec<f64>; 3] {
    let cols = weight.len();
    let (mut dz, mut dweight, mut dbias) = (Vec::new(), vec![0.; cols], vec![0.; cols]);
    for ((h, dn), rstd) in h.chunks(cols).zip(dn.chunks(cols)).zip(rstd) {
        let size = |col: usize| (dn[col].to_f64() * weight[col].to_f64()).abs();
        let mean_g = (0..cols).map(size).sum::<f64>() / cols as f64;
        let mean_gh = (0..cols).map(|col| size(col) * h[col]).sum::<f64>() / cols as f64;
        for col in 0..cols {
            dz.push(rstd * (size(col) + mean_g + h[col] * mean_gh));
            dweight[col] += dn[col].to_f64().abs() * h[col];
            dbias[col] += dn[col].to_f64().abs();
        }
    }
    [dz, dweight, dbias]
}

fn backward<T: Element>() {
    for &[rows, cols] in SHAPES {
        for (at, (removes_mean, offset)) in
            [(true, 0), (false, 0), (true, 1)].into_iter().enumerate()
        {
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
            let n = cases::norm::formula(&z_var, &norm).unwrap();
            let grads = (n * wide(&dn, &[rows, cols])).unwrap().backward().unwrap();
            let grad = |var: &Var| values::<f64>(grads.get(var).unwrap());

            let launch = norm_bwd(rows, cols, MULTIPROCESSORS[at % 2]);
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
            let wide_z = wide(&z, &[rows, cols]);
            let plain = wide_norm(&vec![1f32; cols], None, removes_mean);
            let [dz_terms, dweight_terms, dbias_terms] = backward_terms(
                &norm_terms(&wide_z, &plain),
                &dn,
                &weight,
                &values(&rstd(&wide_z, &plain)),
            );
            assert_close(&outputs.get::<T>(0), &grad(&z_var), &dz_terms, &format!("dz {what}"));
            let (dweight, dbias) = (totals.get::<T>(0), totals.get::<T>(1));
            assert_close(&dweight, &grad(&weight_var), &dweight_terms, &format!("dweight {what}"));
            assert_close(&dbias, &grad(&bias_var), &dbias_terms, &format!("dbias {what}"));
        }
    }
}

#[test]
fn backward_gives_the_gradients_of_the_formula() {
    for_each_dtype!(backward());
}

#[test]
fn the_mask_is_that_of_an_independent_implementation() {
    let vectors = vectors();
    let case = |Vector { mask, keep, .. }: &Vector| {
        let cols = keep.len();
        let ones = vec![1f32; cols];
        case::<f32>("dropout_add_norm_fwd", norm(1, cols, 1))
            .input(&ones)
            .null()
            .null()
            .input(&ones)
            .null()
            .output::<f32>(cols)
            .output::<f32>(cols)
            .value(1u64)
            .value(cols as u64)
            .value(EPS)
            .value(0u32)
            .by_value(&mask.args)
    };
    let outputs = KERNELS.run(&vectors.iter().map(case).collect::<Vec<_>>()).unwrap();
    for (outputs, vector) in outputs.iter().zip(&vectors) {
        let kept: Vec<bool> = outputs.get::<f32>(0).iter().map(|z| *z != 0.).collect();
        assert_eq!(kept, vector.keep, "{}", vector.what);
    }
}
