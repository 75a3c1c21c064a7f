//! `kernels/drop_path_kept.cu`, bit for bit the CPU op.

use candle_core::{DType, Device, Tensor};
use candle_dropout::functional::{StochasticDepth, drop_path_kept};
use candle_dropout::sizes::elementwise;

use crate::host::*;

static KERNELS: Program = Program::new("kernels/drop_path_kept.cu");

const NOWHERE: u32 = u32::MAX;

fn scatter_equals_the_cpu<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for &[samples, size] in SHAPES {
        for (offset, drop_p) in [(0, 0.4), (1, 0.4), (0, 1.)] {
            let mask = Mask::from_start(drop_p, &[1, samples], &[0, 0]);
            let of_kept: Vec<usize> = (0..samples).filter(|n| mask.keep[*n]).collect();
            let mut places = vec![NOWHERE; samples];
            of_kept.iter().enumerate().for_each(|(place, n)| places[*n] = place as u32);

            let x: Vec<T> = random(1, samples * size);
            let mut residual: Vec<T> = random(2, samples * size);
            // A bare residual of -0 stays -0; adding a branch of 0 would make it 0.
            residual.iter_mut().step_by(3).for_each(|r| *r = T::from_f64(-0.));
            let shape = [samples, size];
            let (x, stream) = (tensor(&x, &shape), tensor(&residual, &shape));
            let identity = |kept: &Tensor| Ok(kept.clone());
            let y = drop_path_kept(&x, &stream, StochasticDepth::Row, &mask.drop, identity);

            let kept: Vec<T> =
                of_kept.iter().flat_map(|n| values::<T>(&x.narrow(0, *n, 1).unwrap())).collect();
            // An empty input would be no buffer: nothing of this one is read.
            let kept = if kept.is_empty() { vec![poison(0)] } else { kept };
            cases.push(
                case::<T>(
                    "drop_path_kept_fwd",
                    elementwise(samples, size, MULTIPROCESSORS[cases.len() % 2]),
                )
                .input(&kept)
                .input(&places)
                .input(&residual)
                .output::<T>(samples * size)
                .misaligned_by(offset * size_of::<T>())
                .value(samples as u64)
                .value(size as u64)
                .value(mask.scale as f32),
            );
            let what = format!("{shape:?}, offset {offset}, p {drop_p}");
            expected.push((values::<T>(&y.unwrap()), what));
        }
    }
    for (outputs, (expected, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_same(&outputs.get::<T>(0), &expected, &what);
    }
}

/// Without a residual: the gather, with and without a scale, and the zeros of its backward pass.
fn gather_equals_a_selection<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for &[samples, size] in SHAPES {
        for (offset, scale) in [(0, 1f32), (1, 1.7), (0, 1.7)] {
            // Every third from nowhere, the others from the end on.
            let from = samples / 2 + 1;
            let x: Vec<T> = random(1, from * size);
            let places: Vec<u32> = (0..samples)
                .map(|n| if n % 3 == 2 { NOWHERE } else { ((samples - n) % from) as u32 })
                .collect();
            let selected: Vec<T> = places
                .iter()
                .flat_map(|place| match *place {
                    NOWHERE => vec![T::from_f64(0.); size],
                    place => x[place as usize * size..][..size].to_vec(),
                })
                .collect();
            let selected = Tensor::from_vec(selected, (samples, size), &Device::Cpu).unwrap();
            let scaled = (selected.to_dtype(DType::F32).unwrap() * f64::from(scale)).unwrap();
            let y = scaled.to_dtype(T::DTYPE).unwrap();
            cases.push(
                case::<T>(
                    "drop_path_kept_fwd",
                    elementwise(samples, size, MULTIPROCESSORS[cases.len() % 2]),
                )
                .input(&x)
                .misaligned_by(offset * size_of::<T>())
                .input(&places)
                .null()
                .output::<T>(samples * size)
                .value(samples as u64)
                .value(size as u64)
                .value(scale),
            );
            let what = format!("[{samples}, {size}], offset {offset}, scale {scale}");
            expected.push((values::<T>(&y), what));
        }
    }
    for (outputs, (expected, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_same(&outputs.get::<T>(0), &expected, &what);
    }
}

#[test]
fn kept_samples_are_added_to_the_residual_at_their_places() {
    skip_without_compiler!();
    for_each_dtype!(scatter_equals_the_cpu());
}

#[test]
fn samples_are_gathered_from_their_places() {
    skip_without_compiler!();
    for_each_dtype!(gather_equals_a_selection());
}

// mutant: adds what is dropped|s/\} else if \(keep\) \{/} else {/
// mutant: place unused|s/keep \? place \* size : 0/keep ? sample * size : 0/
// mutant: scale lost|s/__fmul_rn\(v\[j\], scale\)/v[j]/
