//! `kernels/drop_path_add.cu`, bit for bit the CPU op.

use candle_core::{Device, Tensor};
use candle_dropout::{StochasticDepth, drop_path_add};

use crate::common::*;
use crate::harness::Program;
use crate::launch::elementwise;

static KERNELS: Program = Program::new("kernels/drop_path_add.cu");

/// With a residual the forward pass, without one the backward pass, which is that of a zero residual.
fn equals_the_cpu<T: Element>() {
    let drop = mask(0.4);
    let mut cases = Vec::new();
    let mut expected = Vec::new();
    for &[samples, size] in SHAPES {
        for (has_residual, offset) in [(true, 0), (false, 0), (true, 1)] {
            let (x, residual): (Vec<T>, Vec<T>) =
                (random(1, samples * size), random(2, samples * size));
            let shape = [samples, size];
            let stream = match has_residual {
                true => tensor(&residual, &shape),
                false => Tensor::zeros(&shape, T::DTYPE, &Device::Cpu).unwrap(),
            };
            let y =
                drop_path_add(&tensor(&x, &shape), &stream, StochasticDepth::Row, &drop).unwrap();
            let case = case::<T>("drop_path_add_fwd", elementwise(samples, size, MULTIPROCESSORS))
                .input(&x);
            let case = if has_residual { case.input(&residual) } else { case.null() };
            cases.push(
                case.output::<T>(samples * size)
                    .misaligned_by(offset * size_of::<T>())
                    .value(samples as u64)
                    .value(size as u64)
                    .value_bytes(&mask_args(&drop, [0, 0])),
            );
            expected
                .push((values::<T>(&y), format!("[{samples}, {size}], residual {has_residual}")));
        }
    }
    for (outputs, (expected, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_same(&outputs.get::<T>(0), &expected, &what);
    }
}

#[test]
fn forward_and_backward_equal_the_cpu() {
    for_each_dtype!(equals_the_cpu());
}
