//! `kernels/drop_path_add.cu`, bit for bit the CPU op.

use candle_core::{Device, Tensor};
use candle_dropout::functional::{StochasticDepth, drop_path_add};
use candle_dropout::sizes::elementwise;

use crate::host::*;

static KERNELS: Program = Program::new("kernels/drop_path_add.cu");

/// With a residual the forward pass, without one the backward pass, which is that of a zero residual.
fn equals_the_cpu<T: Element>() {
    let mut cases = Vec::new();
    let mut expected = Vec::new();
    for &[samples, size] in SHAPES {
        for (has_residual, offset, start, drop_p) in [
            (true, 0, [0, 0], 0.4),
            (false, 0, [0, 8], 0.4),
            (true, 1, [1, 3], 0.4),
            (false, 0, [1 << 32, (1 << 34) + 5], 0.4),
            (true, 0, [0, 0], 0.),
            (false, 0, [0, 0], 1.),
            (true, 0, [2, 7], 1.),
        ] {
            let mask = Mask::from_start(drop_p, &[1, samples], &start);
            let len = samples * size;
            let mut x: Vec<T> = random(1, len);
            x.iter_mut().enumerate().step_by(3).for_each(|(i, x)| *x = poison(i));
            let mut residual: Option<Vec<T>> = has_residual.then(|| random(2, len));
            // A bare residual of -0 stays -0; adding a branch of 0 would make it 0.
            residual.iter_mut().flat_map(|r| r.iter_mut().step_by(3)).for_each(|r| {
                *r = T::from_f64(-0.);
            });
            let shape = [samples, size];
            let stream = match &residual {
                Some(residual) => tensor(residual, &shape),
                None => Tensor::zeros(&shape, T::DTYPE, &Device::Cpu).unwrap(),
            };
            let y = drop_path_add(&tensor(&x, &shape), &stream, StochasticDepth::Row, &mask.drop);
            let launch = elementwise(samples, size, MULTIPROCESSORS[cases.len() % 2]);
            cases.push(
                case::<T>("drop_path_add_fwd", launch)
                    .input(&x)
                    .optional(&residual)
                    .output::<T>(len)
                    .misaligned_by(offset * size_of::<T>())
                    .value(samples as u64)
                    .value(size as u64)
                    .by_value(&mask.args),
            );
            let what = format!("{shape:?}, residual {has_residual}, start {start:?}, p {drop_p}");
            let keep: Vec<bool> = (0..len).map(|i| mask.keep[i / size]).collect();
            expected.push((values::<T>(&y.unwrap()), values::<T>(&stream), keep, what));
        }
    }
    for (outputs, (expected, stream, keep, what)) in
        KERNELS.run(&cases).unwrap().iter().zip(expected)
    {
        let y = outputs.get::<T>(0);
        assert_same(&y, &expected, &what);
        assert_dropped(&y, &keep, &stream, &what);
    }
}

#[test]
fn forward_and_backward_equal_the_cpu() {
    skip_without_compiler!();
    for_each_dtype!(equals_the_cpu());
}

#[test]
fn the_mask_is_that_of_an_independent_implementation() {
    skip_without_compiler!();
    assert_keeps_the_vectors(&KERNELS, |mask, samples| {
        case::<f32>("drop_path_add_fwd", elementwise(samples, 1, 1))
            .input(&vec![1f32; samples])
            .null()
            .output::<f32>(samples)
            .value(samples as u64)
            .value(1u64)
            .by_value(mask)
    });
}

// mutant: window row lost|s/mask\.rows\.map\(0\)/0/
// mutant: adds what is dropped|s/\} else if \(keep\) \{/} else {/
