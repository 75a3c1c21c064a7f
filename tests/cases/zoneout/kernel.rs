//! `kernels/zoneout.cu`, bit for bit the CPU op.

use candle_core::{Tensor, Var};
use candle_dropout::functional::zoneout;
use candle_dropout::sizes::elementwise;

use crate::host::*;

static KERNELS: Program = Program::new("kernels/zoneout.cu");

/// Masks with shapes, and the offsets of a view of `old` and of the first output in elements.
fn forms() -> Vec<(Mask, Vec<usize>, [usize; 2], String)> {
    let mut forms = Vec::new();
    for dims in SHAPES {
        for (offsets, start, drop_p) in [
            ([0, 0], [0, 0], 0.25),
            ([1, 0], [3, 16], 0.25),
            ([0, 1], [0, 0], 0.5),
            ([0, 0], [1, 5], 0.25),
            ([0, 0], [0, 0], 0.),
            ([0, 0], [0, 0], 1.),
        ] {
            let what = format!("{dims:?}, offsets {offsets:?}, start {start:?}, p {drop_p}");
            forms.push((Mask::from_start(drop_p, dims, &start), dims.to_vec(), offsets, what));
        }
    }
    for &window in WINDOWS {
        for drop_p in RATES {
            let what = format!("{window:?}, p {drop_p}");
            forms.push((Mask::window(drop_p, window), window[0].to_vec(), [0, 0], what));
        }
    }
    forms
}

/// Random numbers of which every fifth is none.
fn poisoned<T: Element>(seed: u64, len: usize) -> Vec<T> {
    let mut x: Vec<T> = random(seed, len);
    x.iter_mut().enumerate().skip(1).step_by(5).for_each(|(i, x)| *x = poison(i));
    x
}

fn forward<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for (at, (mask, dims, [offset, y_offset], what)) in forms().into_iter().enumerate() {
        let (cols, len) = (dims[dims.len() - 1], mask.keep.len());
        let (new, old): (Vec<T>, Vec<T>) = (poisoned(1, len), poisoned(2, len));
        let y = zoneout(&tensor(&new, &dims), &tensor(&old, &dims), &mask.drop).unwrap();
        cases.push(
            case::<T>("zoneout_fwd", elementwise(len / cols, cols, MULTIPROCESSORS[at % 2]))
                .input(&new)
                .input(&old)
                .misaligned_by(offset * size_of::<T>())
                .output::<T>(len)
                .misaligned_by(y_offset * size_of::<T>())
                .value((len / cols) as u64)
                .value(cols as u64)
                .by_value(&mask.args),
        );
        expected.push((values::<T>(&y), old, mask.keep, what));
    }
    for (outputs, (expected, old, keep, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected)
    {
        let y = outputs.get::<T>(0);
        assert_same(&y, &expected, &what);
        assert_dropped(&y, &keep, &old, &what);
    }
}

/// `dnew` and `dold` of the op.
fn gradients(dims: &[usize], dy: &Tensor, mask: &Mask) -> [Tensor; 2] {
    let zeros = || Var::zeros(dims, dy.dtype(), dy.device()).unwrap();
    let (new, old) = (zeros(), zeros());
    let y = zoneout(&new, &old, &mask.drop).unwrap();
    // A gradient that is infinite must not be multiplied on its way.
    let weighted = y.mul(dy).unwrap();
    let grads = weighted.backward().unwrap();
    [new, old].map(|var| grads.get(&var).unwrap().clone())
}

fn backward<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for (at, (mask, dims, [offset, dnew_offset], what)) in forms().into_iter().enumerate() {
        let (cols, len) = (dims[dims.len() - 1], mask.keep.len());
        let dy: Vec<T> = poisoned(3, len);
        let [dnew, dold] = gradients(&dims, &tensor(&dy, &dims), &mask);
        cases.push(
            case::<T>("zoneout_bwd", elementwise(len / cols, cols, MULTIPROCESSORS[at % 2]))
                .input(&dy)
                .misaligned_by(offset * size_of::<T>())
                .output::<T>(len)
                .misaligned_by(dnew_offset * size_of::<T>())
                .output::<T>(len)
                .value((len / cols) as u64)
                .value(cols as u64)
                .by_value(&mask.args),
        );
        expected.push((values::<T>(&dnew), values::<T>(&dold), what));
    }
    for (outputs, (dnew, dold, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_same(&outputs.get::<T>(0), &dnew, &what);
        assert_same(&outputs.get::<T>(1), &dold, &what);
    }
}

#[test]
fn forward_equals_the_cpu() {
    skip_without_compiler!();
    for_each_dtype!(forward());
}

#[test]
fn backward_equals_the_cpu() {
    skip_without_compiler!();
    for_each_dtype!(backward());
}

#[test]
fn the_mask_is_that_of_an_independent_implementation() {
    skip_without_compiler!();
    assert_keeps_the_vectors(&KERNELS, |mask, cols| {
        case::<f32>("zoneout_fwd", elementwise(1, cols, 1))
            .input(&vec![1f32; cols])
            .input(&vec![0f32; cols])
            .output::<f32>(cols)
            .value(1u64)
            .value(cols as u64)
            .by_value(mask)
    });
}

// mutant: takes the other|s/v\[j\] = keeps\(mask, draws\[j\]\) \? v\[j\] : o\[j\]/v[j] = keeps(mask, draws[j]) ? o[j] : v[j]/
// mutant: drops by product|s/o\[j\] = keep \? 0\.f : v\[j\]/o[j] = v[j] * (keep ? 0.f : 1.f)/
// mutant: aligned draws|s/VECTOR \? draw\(mask/true ? draw(mask/
