//! `kernels/gaussian.cu`, bit for bit the CPU op.

use candle_core::{Tensor, Var};
use candle_dropout::NoiseKey;
use candle_dropout::functional::{gaussian_dropout, gaussian_noise, reparameterize};
use candle_dropout::sizes::elementwise;

use crate::host::*;

static KERNELS: Program = Program::new("kernels/gaussian.cu");

/// What the CPU gives for the arguments that are there: noise, a sample, or the gradient of a deviation.
fn on_the_cpu<T: Element>(a: Option<&Tensor>, b: Option<&Tensor>, noise: &NoiseKey) -> Vec<T> {
    let y = match (a, b) {
        (Some(a), Some(b)) => reparameterize(a, b, Some(noise)).unwrap(),
        (Some(a), None) => gaussian_noise(a, 1., Some(noise)).unwrap(),
        (None, dy) => {
            let dy = dy.unwrap();
            let std = Var::from_tensor(&dy.ones_like().unwrap()).unwrap();
            let y = reparameterize(&dy.zeros_like().unwrap(), &std, Some(noise)).unwrap();
            (y * dy).unwrap().backward().unwrap().get(&std).unwrap().clone()
        }
    };
    values(&y)
}

/// Shapes x offsets of a view in elements x starts of the window x which arguments there are.
fn equals_the_cpu<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    let mut add = |mask: Mask, dims: &[usize], [has_a, has_b]: [bool; 2], offset: usize, what| {
        let (cols, len) = (dims[dims.len() - 1], dims.iter().product::<usize>());
        let [a, b] = [(1, has_a), (2, has_b)].map(|(seed, is)| is.then(|| random::<T>(seed, len)));
        let [ta, tb] = [&a, &b].map(|x| x.as_ref().map(|x| tensor(x, dims)));
        let noise = NoiseKey::from(&mask.drop);
        expected.push((on_the_cpu::<T>(ta.as_ref(), tb.as_ref(), &noise), what));
        let launch = elementwise(len / cols, cols, MULTIPROCESSORS[cases.len() % 2]);
        cases.push(
            case::<T>("gaussian_fwd", launch)
                .optional(&a)
                .optional(&b)
                .output::<T>(len)
                .misaligned_by(offset * size_of::<T>())
                .value((len / cols) as u64)
                .value(cols as u64)
                .value(1f32)
                .by_value(&noise.args("test", dims).unwrap()),
        );
    };
    for dims in SHAPES {
        for (has, offset, start) in [
            ([true, true], 0, [0, 0]),
            ([true, false], 0, [3, 4]),
            ([false, true], 1, [0, 0]),
            ([true, false], 0, [1, 5]),
            ([true, true], 0, [2, 6]),
            ([false, true], 0, [0, 7]),
        ] {
            let what = format!("{dims:?}, a and b {has:?}, offset {offset}, start {start:?}");
            add(Mask::from_start(0.5, dims, &start), dims, has, offset, what);
        }
    }
    for &window in WINDOWS {
        // The last columns of the widest have no wide draw.
        if window[1][window[1].len() - 1] <= 1 << 34 {
            add(Mask::window(0.5, window), window[0], [true, true], 0, format!("{window:?}"));
        }
    }
    for (outputs, (expected, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_same(&outputs.get::<T>(0), &expected, &what);
    }
}

#[test]
fn forward_equals_the_cpu() {
    skip_without_compiler!();
    for_each_dtype!(equals_the_cpu());
}

#[test]
fn the_scale_is_that_of_the_cpu() {
    skip_without_compiler!();
    let (dims, mask) = ([5, 24], Mask::from_start(0.5, &[5, 24], &[1, 3]));
    let (x, noise) = (random::<f32>(1, 120), NoiseKey::from(&mask.drop));
    let y = gaussian_dropout(&tensor(&x, &dims), 0.3, Some(&noise)).unwrap();
    let of = case::<f32>("gaussian_fwd", elementwise(5, 24, 1)).input(&x).input(&x);
    let of = of.output::<f32>(120).value(5u64).value(24u64).value(0.3f32).by_value(&mask.args);
    assert_same(&KERNELS.run(&[of]).unwrap()[0].get::<f32>(0), &values(&y), "gaussian_dropout");
}

/// The lines of `normal_vectors.txt`, each in one launch.
#[test]
fn the_noise_is_that_of_an_independent_implementation() {
    skip_without_compiler!();
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for line in include_str!("../../normal_vectors.txt").lines() {
        let field: Vec<_> = line.split(' ').collect();
        let key = candle_dropout::MaskKey::new(u64::from_str_radix(field[2], 16).unwrap());
        let [row, col] = [3, 4].map(|i| field[i].parse::<usize>().unwrap());
        let normals: Vec<f64> = field[6].split(',').map(|z| z.parse().unwrap()).collect();
        let n = normals.len();
        let noise = NoiseKey::new(key).window(&[row + 1, col + n], &[row, col]);
        cases.push(
            case::<f32>("gaussian_fwd", elementwise(1, n, 1))
                .null()
                .input(&vec![1f32; n])
                .output::<f32>(n)
                .value(1u64)
                .value(n as u64)
                .value(1f32)
                .by_value(&noise.args("test", &[1, n]).unwrap()),
        );
        expected.push(normals);
    }
    assert_eq!(cases.len(), 16);
    for (outputs, expected) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        for (z, exact) in outputs.get::<f32>(0).iter().zip(expected) {
            let bound = 5. * f64::from(f32::EPSILON) * exact.abs();
            assert!((f64::from(*z) - exact).abs() <= bound, "{z} {exact}");
        }
    }
}

// mutant of kernels/normal.cuh: six columns of a shifter|s/skip & 2 \? all\[i \+ 2\] : all\[i\]/all[i]/
// mutant of kernels/normal.cuh: odd columns not shifted|s/skip & 1 \? all\[i \+ 1\] : all\[i\]/all[i]/
// mutant of kernels/normal.cuh: quarter of the cosine|s/quarter \+ 1\)\), __fmul_rn/quarter)), __fmul_rn/
// mutant of kernels/normal.cuh: far radius alone|s/near_1 = word >= 0xb504f334u/near_1 = false/
// mutant of kernels/philox.cuh: wide draws of other calls|s/\(mask\.col_0 \+ col\) \/ 4\), 1\)/(mask.col_0 + col) \/ 4), 0)/
// mutant: aligned noise|s/normals<VECTOR>/normals<true>/
