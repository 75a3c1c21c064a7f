//! `kernels/activation_dropout.cu` against the CPU op in f64.

use std::collections::BTreeSet;

use candle_core::Var;
use candle_dropout::functional::{Activation, activation_dropout};
use candle_dropout::sizes::elementwise;

use super::{GATED, PLAIN};
use crate::host::*;

static KERNELS: Program = Program::new("kernels/activation_dropout.cu");

/// In the order of their numbers.
fn activations() -> Vec<Activation> {
    let mut all = [PLAIN, GATED].concat();
    all.sort_by_key(|activation| *activation as u32);
    all
}

/// What bounds a function and its slope at `u`, by the size of `u`.
fn bounds(activation: Activation, u: f64) -> [f64; 2] {
    match activation {
        Activation::Relu2 | Activation::Relu2Glu => [u * u, 2. * u],
        Activation::Sigmoid | Activation::Glu => [1., 1.],
        _ => [u, 1. + u],
    }
}

/// Masks with the shape of `y`, whether there is a bias, and the offset of a view in elements.
fn forms() -> Vec<(Mask, Vec<usize>, bool, usize, String)> {
    let mut forms = Vec::new();
    for (at, dims) in SHAPES.iter().enumerate() {
        for step in 0..2 {
            let (has_bias, offset, start, drop_p) = [
                (false, 0, [0, 0], 0.25),
                (true, 0, [3, 16], 0.25),
                (true, 1, [0, 0], 0.25),
                (true, 0, [1, 5], 0.25),
                (true, 0, [0, 0], 0.),
                (true, 0, [0, 0], 1.),
            ][(at + 3 * step) % 6];
            let what = format!("{dims:?}, bias {has_bias}, start {start:?}, p {drop_p}");
            let mask = Mask::from_start(drop_p, dims, &start);
            forms.push((mask, dims.to_vec(), has_bias, offset, what));
        }
    }
    for &window in WINDOWS {
        let what = format!("{window:?}");
        forms.push((Mask::window(0.5, window), window[0].to_vec(), true, 0, what));
    }
    forms
}

/// Rows, columns, distance of rows in the input, and the activation.
fn sized(case: Case, sizes: [usize; 3], activation: Activation) -> Case {
    sizes.into_iter().fold(case, |case, size| case.value(size as u64)).value(activation as u32)
}

/// `values` with poison where the mask, as wide as its rows or half of it, drops.
fn poison_dropped<T: Element>(values: &mut [T], cols: usize, keep: &[bool]) {
    let x_cols = values.len() / (keep.len() / cols);
    for (i, value) in values.iter_mut().enumerate() {
        let (row, col) = (i / x_cols, i % x_cols % cols);
        if !keep[row * cols + col] {
            *value = poison(i);
        }
    }
}

fn equals_the_cpu<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    let mut seen = BTreeSet::new();
    let activations = activations();
    for (at, (mask, dims, has_bias, offset, what)) in forms().into_iter().enumerate() {
        for (nth, activation) in activations.iter().copied().enumerate() {
            // The later ones share all but their formula with the first: a third of the cases is enough. Each
            // six cases in a row have every form, the same one wherever `at / 2` has the same rest.
            if nth >= 6 && !(at / 6 + at / 2 + nth).is_multiple_of(3) {
                continue;
            }
            if let Some((_, form)) = what.split_once("], bias ") {
                seen.insert((nth, form.to_string()));
            }
            let (cols, len) = (dims[dims.len() - 1], mask.keep.len());
            let rows = len / cols;
            let x_cols = if activation.is_gated() { 2 * cols } else { cols };
            let x_dims = [&dims[..dims.len() - 1], &[x_cols]].concat();
            let (mut x, mut dy): (Vec<T>, Vec<T>) = (random(1, rows * x_cols), random(2, len));
            let bias: Option<Vec<T>> = has_bias.then(|| random(3, x_cols));

            let x_var = Var::from_tensor(&wide(&x, &x_dims)).unwrap();
            let wide_bias = bias.as_ref().map(|bias| wide(bias, &[x_cols]));
            let y = activation_dropout(&x_var, wide_bias.as_ref(), activation, &mask.drop).unwrap();
            let grads = (&y * wide(&dy, &dims)).unwrap().backward().unwrap();
            let dx = values::<f64>(grads.get(&x_var).unwrap());

            // The functions and their slopes are bounded by what they are multiplied with.
            let input = |row: usize, col: usize| {
                let bias = bias.as_ref().map_or(0., |bias| bias[col].to_f64());
                x[row * x_cols + col].to_f64() + bias
            };
            let (mut y_terms, mut dx_terms) = (Vec::new(), vec![0.; rows * x_cols]);
            for (i, (dy, keep)) in dy.iter().zip(&mask.keep).enumerate() {
                let (row, col, scale) = (i / cols, i % cols, if *keep { mask.scale } else { 0. });
                let u = input(row, col).abs();
                let v = if activation.is_gated() { input(row, cols + col).abs() } else { 1. };
                let da = dy.to_f64().abs() * scale;
                let [value, slope] = bounds(activation, u);
                y_terms.push(value * v * scale);
                dx_terms[row * x_cols + col] = da * slope * v;
                if activation.is_gated() {
                    dx_terms[row * x_cols + cols + col] = da * value;
                }
            }
            // The formula was spared what has to vanish in the kernel.
            poison_dropped(&mut x, cols, &mask.keep);
            poison_dropped(&mut dy, cols, &mask.keep);

            for (pass, result, terms) in [("fwd", values(&y), y_terms), ("bwd", dx, dx_terms)] {
                let name = format!("activation_dropout_{pass}");
                let case = case::<T>(&name, elementwise(rows, cols, MULTIPROCESSORS[at % 2]))
                    .input(&x)
                    .misaligned_by(offset * size_of::<T>())
                    .null()
                    .optional(&bias);
                let case = if pass == "bwd" { case.input(&dy) } else { case };
                let case = case.output::<T>(result.len());
                let case = if pass == "bwd" { case.null() } else { case };
                cases.push(sized(case, [rows, cols, x_cols], activation).by_value(&mask.args));
                expected.push((result, terms, format!("{pass} {activation:?} {what}")));
            }
        }
    }
    assert_eq!(seen.len(), 6 * activations.len(), "an activation lacks a form");
    for (outputs, (expected, terms, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_close(&outputs.get::<T>(0), &expected, &terms, &what);
    }
}

#[test]
fn forward_and_backward_equal_the_cpu() {
    skip_without_compiler!();
    for_each_dtype!(equals_the_cpu());
}

/// Rows of `cols` elements that begin `stride` elements apart, with poison between them.
fn spread<T: Element>(values: &[T], cols: usize, stride: usize) -> Vec<T> {
    let mut spread: Vec<T> = (0..(values.len() / cols - 1) * stride + cols).map(poison).collect();
    for (row, values) in values.chunks_exact(cols).enumerate() {
        spread[row * stride..][..cols].copy_from_slice(values);
    }
    spread
}

/// Where two tensors of a gated form lie: elements between their rows, and by how many the gate, the values and the
/// gradient of the values are off a boundary.
const APART: [(usize, [usize; 3]); 6] =
    [(0, [0; 3]), (8, [0; 3]), (3, [0; 3]), (0, [1, 0, 0]), (0, [0, 1, 0]), (0, [0, 0, 1])];

/// Gate and values in one tensor, and then in two: the same bits.
fn apart_equals_side_by_side<T: Element>() {
    let (mut cases, mut forms) = (Vec::new(), Vec::new());
    for (at, dims) in SHAPES.iter().enumerate() {
        let ([rows, cols], activation) = (*dims, GATED[at % GATED.len()]);
        let launch = elementwise(rows, cols, MULTIPROCESSORS[at % 2]);
        let mask = Mask::from_start(0.25, dims, [&[0, 0], &[3, 16], &[1, 5]][at % 3]);
        let [gate, up, dy]: [Vec<T>; 3] = [1, 2, 3].map(|seed| random(seed, rows * cols));
        let halves = gate.chunks_exact(cols).zip(up.chunks_exact(cols));
        let both: Vec<T> = halves.flat_map(|(gate, up)| [gate, up].concat()).collect();
        let fwd = || case::<T>("activation_dropout_fwd", launch);
        let bwd = || case::<T>("activation_dropout_bwd", launch);
        let sized =
            |case, stride| sized(case, [rows, cols, stride], activation).by_value(&mask.args);
        let y = fwd().input(&both).null().null().output::<T>(dy.len());
        let dx = bwd().input(&both).null().null().input(&dy).output::<T>(both.len()).null();
        cases.extend([sized(y, 2 * cols), sized(dx, 2 * cols)]);
        for (gap, offsets) in APART {
            let stride = cols + gap;
            let [gate, up] = [&gate, &up].map(|x| spread(x, cols, stride));
            let [of_gate, of_up, of_dup] = offsets.map(|offset| offset * size_of::<T>());
            let inputs = |case: Case| {
                case.input(&gate).misaligned_by(of_gate).input(&up).misaligned_by(of_up).null()
            };
            let y = inputs(fwd()).output::<T>(dy.len());
            let dx = inputs(bwd()).input(&dy).output::<T>(dy.len()).output::<T>(dy.len());
            cases.extend([sized(y, stride), sized(dx.misaligned_by(of_dup), stride)]);
        }
        forms.push((cols, format!("{activation:?} {dims:?}")));
    }
    let outputs = KERNELS.run(&cases).unwrap();
    for (outputs, (cols, form)) in outputs.chunks_exact(2 + 2 * APART.len()).zip(forms) {
        let (y, dx) = (outputs[0].bytes(0), outputs[1].get::<T>(0));
        let half = |at: usize| -> Vec<T> {
            dx.chunks_exact(2 * cols).flat_map(|dx| dx[at * cols..][..cols].to_vec()).collect()
        };
        for (apart, lie) in outputs[2..].chunks_exact(2).zip(APART) {
            let what = format!("{form} {lie:?}");
            assert_eq!(apart[0].bytes(0), y, "{what}");
            for at in 0..2 {
                assert_same(&apart[1].get::<T>(at), &half(at), &what);
            }
        }
    }
}

#[test]
fn gate_and_values_apart_equal_those_of_one_tensor() {
    skip_without_compiler!();
    for_each_dtype!(apart_equals_side_by_side());
}

/// Without a gate, rows of the input that lie apart give what rows that follow one another do.
fn rows_apart_equal_rows_in_line<T: Element>() {
    let mut cases = Vec::new();
    for (at, &[rows, cols]) in SHAPES.iter().enumerate() {
        let launch = elementwise(rows, cols, MULTIPROCESSORS[at % 2]);
        let mask = Mask::from_start(0.25, &[rows, cols], &[0, 0]);
        let [x, dy]: [Vec<T>; 2] = [1, 2].map(|seed| random(seed, rows * cols));
        for gap in [0, 8, 3] {
            let (stride, x) = (cols + gap, spread(&x, cols, cols + gap));
            let y = case::<T>("activation_dropout_fwd", launch).input(&x).null().null();
            let dx = case::<T>("activation_dropout_bwd", launch).input(&x).null().null().input(&dy);
            let results = [y.output::<T>(dy.len()), dx.output::<T>(dy.len()).null()];
            cases.extend(results.map(|case| {
                sized(case, [rows, cols, stride], Activation::Silu).by_value(&mask.args)
            }));
        }
    }
    for (outputs, dims) in KERNELS.run(&cases).unwrap().chunks_exact(6).zip(SHAPES) {
        for (at, apart) in outputs.iter().enumerate().skip(2) {
            assert_eq!(apart.bytes(0), outputs[at % 2].bytes(0), "{dims:?}, case {at}");
        }
    }
}

#[test]
fn rows_that_lie_apart_equal_rows_in_line() {
    skip_without_compiler!();
    for_each_dtype!(rows_apart_equal_rows_in_line());
}

#[test]
fn the_mask_is_that_of_an_independent_implementation() {
    skip_without_compiler!();
    assert_keeps_the_vectors(&KERNELS, |mask, cols| {
        let case = case::<f32>("activation_dropout_fwd", elementwise(1, cols, 1))
            .input(&vec![1f32; cols])
            .null()
            .null()
            .output::<f32>(cols);
        sized(case, [1, cols, cols], Activation::Relu).by_value(mask)
    });
}

/// A function and its slope far from 0, where all but ReLU and its square are flat or a straight line.
fn flat_end(activation: Activation, u: f64) -> [f64; 2] {
    let (positive, step) = (u.max(0.), if u > 0. { 1. } else { 0. });
    match activation {
        Activation::Tanh | Activation::TanhGlu => [u.signum(), 0.],
        Activation::Sigmoid | Activation::Glu => [step, 0.],
        Activation::Relu2 | Activation::Relu2Glu => [positive * positive, 2. * positive],
        _ => [positive, step],
    }
}

/// Where the cube within GELU overflows, slopes are those of the flat ends and no NaN.
fn slopes_are_flat<T: Element>() {
    let sizes = if size_of::<T>() == 4 || T::DTYPE == candle_core::DType::BF16 {
        [257., 6e4, 1e20, 1e38]
    } else {
        [257., 1e3, 1e4, 6e4]
    };
    let u: Vec<T> = sizes.into_iter().flat_map(|x| [T::from_f64(x), T::from_f64(-x)]).collect();
    let ones = vec![T::from_f64(1.); u.len()];
    let mask = Mask::from_start(0., &[1, u.len()], &[0, 0]);
    let case = |activation: &Activation| {
        // A gate's values are 1.
        let x = if activation.is_gated() { [&u[..], &ones].concat() } else { u.clone() };
        let case = case::<T>("activation_dropout_bwd", elementwise(1, u.len(), 1))
            .input(&x)
            .null()
            .null()
            .input(&ones)
            .output::<T>(x.len())
            .null();
        sized(case, [1, u.len(), x.len()], *activation).by_value(&mask.args)
    };
    let activations = activations();
    let cases: Vec<_> = activations.iter().map(case).collect();
    for (outputs, activation) in KERNELS.run(&cases).unwrap().iter().zip(activations) {
        let ends = u.iter().map(|u| flat_end(activation, u.to_f64()));
        let (values, slopes): (Vec<f64>, Vec<f64>) =
            ends.map(|[value, slope]| (value, slope)).unzip();
        let exact = if activation.is_gated() { [slopes, values].concat() } else { slopes };
        let got = outputs.get::<T>(0);
        assert_eq!(got.len(), exact.len());
        for (at, (got, exact)) in got.into_iter().zip(exact).enumerate() {
            let what = format!("{activation:?}, element {at}");
            // What f32 or the dtype does not hold is infinite.
            if T::from_f64(f64::from(exact as f32)).to_f64().is_infinite() {
                assert_eq!(got.to_f64(), f64::INFINITY, "{what}");
            } else {
                assert_close(&[got], &[exact], &[1. + exact.abs()], &what);
            }
        }
    }
}

#[test]
fn gradients_of_large_inputs_are_those_of_the_flat_ends() {
    skip_without_compiler!();
    for_each_dtype!(slopes_are_flat());
}

// mutant: drops by product|s/keeps\(mask, draws\[j\]\) \? a \* mask\.scale : 0\.f/a * (keeps(mask, draws[j]) ? mask.scale : 0.f)/
// mutant: slope of what drops|s/da == 0\.f \? 0\.f : da \* slope/da * slope/
// mutant: dy drops by product|s/keeps\(mask, draws\[j\]\) \? da\[j\] \* mask\.scale : 0\.f/da[j] * (keeps(mask, draws[j]) ? mask.scale : 0.f)/
// mutant: distance of rows, fwd|s/const uint64_t x_start = row \* x_stride;/const uint64_t x_start = row * cols;/
// mutant: distance of rows, bwd|s/x_start = row \* x_stride, dx_start/x_start = row * dx_stride, dx_start/
// mutant: distance of rows of dx|s/GATED && !dup \? 2 \* cols : cols/GATED ? 2 * cols : cols/
// mutant: vectors at any distance, fwd|s/\(cols, x, up, bias, y\) && x_stride % WIDTH == 0/(cols, x, up, bias, y)/
// mutant: vectors at any distance, bwd|s/dx, dup\) && x_stride % WIDTH == 0/dx, dup)/
// mutant: values anywhere, fwd|s/rows_are_vectors\(cols, x, up, bias, y\)/rows_are_vectors(cols, x, bias, y)/
// mutant: values anywhere, bwd|s/rows_are_vectors\(cols, x, up, bias, dy/rows_are_vectors(cols, x, bias, dy/
// mutant: gradient of the values anywhere|s/dy, dx, dup\) && x_stride/dy, dx) \&\& x_stride/
