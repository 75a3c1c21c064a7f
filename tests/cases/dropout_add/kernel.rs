//! `kernels/dropout_add.cu`: bit for bit the CPU op.

use candle_dropout::functional::dropout_add;
use candle_dropout::sizes::elementwise;

use crate::host::*;

static KERNELS: Program = Program::new("kernels/dropout_add.cu");

/// Windows of masks with the rate, whether there is a bias, and the offset of a view in elements: the shapes
/// in one corner of a mask each, then what is a part in several dimensions.
fn forms() -> Vec<(Mask, Vec<usize>, bool, usize, String)> {
    let mut forms = Vec::new();
    for dims in SHAPES {
        for (has_bias, offset, start, drop_p) in [
            (false, 0, [0, 0], 0.25),
            (true, 0, [3, 16], 0.25),
            (true, 1, [0, 0], 0.25),
            (true, 0, [1, 5], 0.25),
            (true, 0, [0, 0], 0.),
            (true, 0, [0, 0], 1.),
        ] {
            let what = format!("{dims:?}, bias {has_bias}, start {start:?}, p {drop_p}");
            let mask = Mask::from_start(drop_p, dims, &start);
            forms.push((mask, dims.to_vec(), has_bias, offset, what));
        }
    }
    for &window in WINDOWS {
        for drop_p in [0.25, 0., 1.] {
            let what = format!("{window:?}, p {drop_p}");
            forms.push((Mask::window(drop_p, window), window[0].to_vec(), true, 0, what));
        }
    }
    forms
}

fn forward<T: Element>() {
    let mut cases = Vec::new();
    let mut expected = Vec::new();
    for (at, (mask, dims, has_bias, offset, what)) in forms().into_iter().enumerate() {
        let (cols, len) = (dims[dims.len() - 1], mask.keep.len());
        let (mut x, residual): (Vec<T>, Vec<T>) = (random(1, len), random(2, len));
        x.iter_mut().enumerate().skip(1).step_by(5).for_each(|(i, x)| *x = poison(i));
        let bias: Option<Vec<T>> = has_bias.then(|| {
            let mut bias = random(3, cols);
            bias[cols / 2] = poison(at);
            bias
        });
        let bias_tensor = bias.as_ref().map(|bias| tensor(bias, &[cols]));
        let (x_tensor, residual_tensor) = (tensor(&x, &dims), tensor(&residual, &dims));
        let y = dropout_add(&x_tensor, &residual_tensor, bias_tensor.as_ref(), &mask.drop).unwrap();
        let launch = elementwise(len / cols, cols, MULTIPROCESSORS[at % 2]);
        cases.push(
            case::<T>("dropout_add_fwd", launch)
                .input(&x)
                .input(&residual)
                .misaligned_by(offset * size_of::<T>())
                .optional(&bias)
                .output::<T>(len)
                .value((len / cols) as u64)
                .value(cols as u64)
                .by_value(&mask.args),
        );
        expected.push((values::<T>(&y), residual, mask.keep, what));
    }
    for (outputs, (expected, residual, keep, what)) in
        KERNELS.run(&cases).unwrap().iter().zip(expected)
    {
        let y = outputs.get::<T>(0);
        assert_same(&y, &expected, &what);
        assert_dropped(&y, &keep, &residual, &what);
    }
}

#[test]
fn forward_equals_the_cpu() {
    skip_without_compiler!();
    for_each_dtype!(forward());
}

#[test]
fn the_mask_is_that_of_an_independent_implementation() {
    skip_without_compiler!();
    assert_keeps_the_vectors(&KERNELS, |mask, cols| {
        case::<f32>("dropout_add_fwd", elementwise(1, cols, 1))
            .input(&vec![1f32; cols])
            .input(&vec![0f32; cols])
            .null()
            .output::<f32>(cols)
            .value(1u64)
            .value(cols as u64)
            .by_value(mask)
    });
}

// mutant: drops by product|s/r\[j\] = keeps\(mask, draws\[j\]\) \? kept : r\[j\];/r[j] = __fadd_rn(r[j], __fmul_rn(branch, keeps(mask, draws[j]) ? mask.scale : 0.f));/
