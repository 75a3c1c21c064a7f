//! `kernels/activation_dropout.cu` against the CPU op in f64.

use candle_core::Var;
use candle_dropout::sizes::elementwise;
use candle_dropout::{Activation, activation_dropout};

use crate::host::*;

static KERNELS: Program = Program::new("kernels/activation_dropout.cu");

const ACTIVATIONS: [Activation; 6] = [
    Activation::GeluTanh,
    Activation::GeluErf,
    Activation::Silu,
    Activation::Relu,
    Activation::SwiGlu,
    Activation::GeGlu,
];

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
    for (at, (mask, dims, has_bias, offset, what)) in forms().into_iter().enumerate() {
        for activation in ACTIVATIONS {
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
                y_terms.push(u * v * scale);
                dx_terms[row * x_cols + col] = da * (1. + u) * v;
                if activation.is_gated() {
                    dx_terms[row * x_cols + cols + col] = da * u;
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
                    .optional(&bias);
                let case = if pass == "bwd" { case.input(&dy) } else { case };
                cases.push(
                    case.output::<T>(result.len())
                        .value(rows as u64)
                        .value(cols as u64)
                        .value(activation as u32)
                        .by_value(&mask.args),
                );
                expected.push((result, terms, format!("{pass} {activation:?} {what}")));
            }
        }
    }
    for (outputs, (expected, terms, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_close(&outputs.get::<T>(0), &expected, &terms, &what);
    }
}

#[test]
fn forward_and_backward_equal_the_cpu() {
    for_each_dtype!(equals_the_cpu());
}

#[test]
fn the_mask_is_that_of_an_independent_implementation() {
    assert_keeps_the_vectors(&KERNELS, |mask, cols| {
        case::<f32>("activation_dropout_fwd", elementwise(1, cols, 1))
            .input(&vec![1f32; cols])
            .null()
            .output::<f32>(cols)
            .value(1u64)
            .value(cols as u64)
            .value(Activation::Relu as u32)
            .by_value(mask)
    });
}

/// Where the cube within GELU overflows, the slope is 0 or 1 and no NaN.
fn slopes_are_flat<T: Element>() {
    let sizes = if size_of::<T>() == 4 || T::DTYPE == candle_core::DType::BF16 {
        [257., 6e4, 1e20, 1e38]
    } else {
        [257., 1e3, 1e4, 6e4]
    };
    let x: Vec<T> = sizes.into_iter().flat_map(|x| [T::from_f64(x), T::from_f64(-x)]).collect();
    let dy = vec![T::from_f64(1.); x.len()];
    let ungated = &ACTIVATIONS[..4];
    let mask = Mask::from_start(0., &[1, x.len()], &[0, 0]);
    let case = |activation: &Activation| {
        case::<T>("activation_dropout_bwd", elementwise(1, x.len(), 1))
            .input(&x)
            .null()
            .input(&dy)
            .output::<T>(x.len())
            .value(1u64)
            .value(x.len() as u64)
            .value(*activation as u32)
            .by_value(&mask.args)
    };
    let cases: Vec<_> = ungated.iter().map(case).collect();
    for (outputs, activation) in KERNELS.run(&cases).unwrap().iter().zip(ungated) {
        let expected = [1., 0., 1., 0., 1., 0., 1., 0.];
        assert_close(&outputs.get::<T>(0), &expected, &[1.; 8], &format!("{activation:?}"));
    }
}

#[test]
fn gradients_of_large_inputs_are_those_of_the_flat_ends() {
    for_each_dtype!(slopes_are_flat());
}

// mutant: drops by product|s/keeps\(mask, draws\[j\]\) \? a \* mask\.scale : 0\.f/a * (keeps(mask, draws[j]) ? mask.scale : 0.f)/
// mutant: slope of what drops|s/da == 0\.f \? 0\.f : da \* slope/da * slope/
// mutant: dy drops by product|s/keeps\(mask, draws\[j\]\) \? da\[j\] \* mask\.scale : 0\.f/da[j] * (keeps(mask, draws[j]) ? mask.scale : 0.f)/
