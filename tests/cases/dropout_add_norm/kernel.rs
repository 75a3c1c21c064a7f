//! `kernels/dropout_add_norm.cu`: the stream bit for bit the CPU op, its norm against
//! the formula in f64 and bit for bit that of `kernels/norm.cu`.

use candle_core::DType;
use candle_dropout::functional::{NormArgs, dropout_add};

use crate::host::*;
use crate::norm;
use crate::norm::kernel::{EPS, SHAPES, forward_case, norm_terms, wide_norm};

static KERNELS: Program = Program::new("kernels/dropout_add_norm.cu");

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
    let (mut cases, mut expected, mut norms) = (Vec::new(), Vec::new(), Vec::new());
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
        let n = norm::formula(&wide_z, &wide_norm).unwrap();
        let n_terms = norm_terms(&wide_z, &wide_norm);

        let launch = NormArgs::launch(rows, cols, MULTIPROCESSORS[at % 2]);
        let (z_values, kind) = (values::<T>(&z), (EPS, removes_mean));
        norms.push(forward_case(launch, &z_values, &weight, &norm_bias, kind, 0));
        cases.push(
            case::<T>("dropout_add_norm_fwd", launch)
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
    let norms = norm::kernel::KERNELS.run(&norms).unwrap();
    let outputs = KERNELS.run(&cases).unwrap();
    for ((outputs, norm_alone), (expected_z, (n, n_terms), stream, keep, what)) in
        outputs.iter().zip(norms).zip(expected)
    {
        let (z, norm_of_z) = (outputs.get::<T>(0), outputs.get::<T>(1));
        assert_same(&z, &expected_z, &what);
        assert_dropped(&z, &keep, &stream, &what);
        assert_close(&norm_of_z, &n, &n_terms, &what);
        assert_same(&norm_of_z, &norm_alone.get::<T>(0), &what);
    }
}

#[test]
fn forward_is_the_stream_of_the_cpu_and_its_norm() {
    skip_without_compiler!();
    for_each_dtype!(forward());
}

#[test]
fn the_mask_is_that_of_an_independent_implementation() {
    skip_without_compiler!();
    assert_keeps_the_vectors(&KERNELS, |mask, cols| {
        let ones = vec![1f32; cols];
        case::<f32>("dropout_add_norm_fwd", NormArgs::launch(1, cols, 1))
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
            .by_value(mask)
    });
}

// mutant: drops by product|s/rounded<T>\(keeps\(mask, draws\[j\]\) \? kept : s\[j\]\)/rounded<T>(s[j] + v[j] * (keeps(mask, draws[j]) ? mask.scale : 0.f))/
// mutant: statistics unrounded|s/v\[j\] = rounded<T>\(/v[j] = (/
