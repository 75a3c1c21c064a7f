//! `kernels/activation_dropout.cu` against the CPU op in f64.

use candle_core::{DType, Var};
use candle_dropout::{Activation, activation_dropout};

use crate::common::*;
use crate::harness::Program;
use crate::launch::elementwise;

static KERNELS: Program = Program::new("kernels/activation_dropout.cu");

const ACTIVATIONS: [Activation; 6] = [
    Activation::GeluTanh,
    Activation::GeluErf,
    Activation::Silu,
    Activation::Relu,
    Activation::SwiGlu,
    Activation::GeGlu,
];

fn equals_the_cpu<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for (at, &[rows, cols]) in SHAPES.iter().enumerate() {
        for activation in ACTIVATIONS {
            let (has_bias, offset, start) =
                [(false, 0, [0, 0]), (true, 0, [3, 16]), (true, 1, [0, 0]), (true, 0, [1, 5])]
                    [(at + activation as usize) % 4];
            let x_cols = if activation.is_gated() { 2 * cols } else { cols };
            let drop = mask(0.25);
            let args = mask_args(&drop, start);
            let drop = drop.window(&[start[0] + rows, start[1] + cols], &start);
            let (x, dy): (Vec<T>, Vec<T>) = (random(1, rows * x_cols), random(2, rows * cols));
            let bias: Option<Vec<T>> = has_bias.then(|| random(3, x_cols));

            let wide =
                |values: &[T], shape: &[usize]| tensor(values, shape).to_dtype(DType::F64).unwrap();
            let x_var = Var::from_tensor(&wide(&x, &[rows, x_cols])).unwrap();
            let wide_bias = bias.as_ref().map(|bias| wide(bias, &[x_cols]));
            let y = activation_dropout(&x_var, wide_bias.as_ref(), activation, &drop).unwrap();
            let grads = (&y * wide(&dy, &[rows, cols])).unwrap().backward().unwrap();
            let dx = grads.get(&x_var).unwrap();

            let what = format!("[{rows}, {cols}] {activation:?}, start {start:?}");
            for (pass, result) in [("fwd", &y), ("bwd", dx)] {
                let name = format!("activation_dropout_{pass}");
                let case = case::<T>(&name, elementwise(rows, cols, MULTIPROCESSORS))
                    .input(&x)
                    .misaligned_by(offset * size_of::<T>());
                let case = match &bias {
                    Some(bias) => case.input(bias),
                    None => case.null(),
                };
                let case = if pass == "bwd" { case.input(&dy) } else { case };
                cases.push(
                    case.output::<T>(result.elem_count())
                        .value(rows as u64)
                        .value(cols as u64)
                        .value(activation as u32)
                        .value_bytes(&args),
                );
                expected.push((values::<f64>(result), format!("{pass} {what}")));
            }
        }
    }
    for (outputs, (expected, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_close(&outputs.get::<T>(0), &expected, &what);
    }
}

#[test]
fn forward_and_backward_equal_the_cpu() {
    for_each_dtype!(equals_the_cpu());
}

/// Where the cube within GELU overflows, the slope is 0 or 1 and no NaN.
fn slopes_are_flat<T: Element>() {
    let sizes = if size_of::<T>() == 4 || T::DTYPE == DType::BF16 {
        [257., 6e4, 1e20, 1e38]
    } else {
        [257., 1e3, 1e4, 6e4]
    };
    let x: Vec<T> = sizes.into_iter().flat_map(|x| [T::from_f64(x), T::from_f64(-x)]).collect();
    let dy = vec![T::from_f64(1.); x.len()];
    let ungated = &ACTIVATIONS[..4];
    let case = |activation: &Activation| {
        case::<T>("activation_dropout_bwd", elementwise(1, x.len(), MULTIPROCESSORS))
            .input(&x)
            .null()
            .input(&dy)
            .output::<T>(x.len())
            .value(1u64)
            .value(x.len() as u64)
            .value(*activation as u32)
            .value_bytes(&mask_args(&mask(0.), [0, 0]))
    };
    let cases: Vec<_> = ungated.iter().map(case).collect();
    for (outputs, activation) in KERNELS.run(&cases).unwrap().iter().zip(ungated) {
        let expected = [1., 0., 1., 0., 1., 0., 1., 0.];
        assert_close(&outputs.get::<T>(0), &expected, &format!("{activation:?}"));
    }
}

#[test]
fn gradients_of_large_inputs_are_those_of_the_flat_ends() {
    for_each_dtype!(slopes_are_flat());
}
