//! `kernels/dropout.cu`, bit for bit the CPU op.

use candle_dropout::functional::dropout;
use candle_dropout::sizes::elementwise;

use crate::host::*;

static KERNELS: Program = Program::new("kernels/dropout.cu");

/// Cases and what they have to give.
struct Suite<T> {
    cases: Vec<Case>,
    expected: Vec<(Vec<T>, Vec<bool>, String)>,
}

impl<T: Element> Suite<T> {
    /// `dims` at a place of a mask, with views that are off by elements.
    fn add(&mut self, dims: &[usize], mask: Mask, [x_offset, y_offset]: [usize; 2], what: String) {
        let (cols, len) = (dims[dims.len() - 1], dims.iter().product::<usize>());
        let rows = len / cols;
        let mut x: Vec<T> = random(1, len);
        x.iter_mut().enumerate().skip(1).step_by(5).for_each(|(i, x)| *x = poison(i));
        let y = dropout(&tensor(&x, dims), &mask.drop).unwrap();
        let multiprocessors = MULTIPROCESSORS[self.cases.len() % 2];
        self.cases.push(
            case::<T>("dropout_fwd", elementwise(rows, cols, multiprocessors))
                .input(&x)
                .misaligned_by(x_offset * size_of::<T>())
                .output::<T>(len)
                .misaligned_by(y_offset * size_of::<T>())
                .value(rows as u64)
                .value(cols as u64)
                .by_value(&mask.args),
        );
        self.expected.push((values(&y), mask.keep, what));
    }

    fn check(self) {
        let Self { cases, expected } = self;
        for (outputs, (expected, keep, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
            let y = outputs.get::<T>(0);
            assert_same(&y, &expected, &what);
            assert_dropped(&y, &keep, &vec![T::from_f64(0.); y.len()], &what);
        }
    }
}

/// Shapes x offsets of the views in elements x starts of the window x rates.
fn equals_the_cpu<T: Element>() {
    let mut suite = Suite::<T> { cases: Vec::new(), expected: Vec::new() };
    for dims in SHAPES {
        for (offsets, start, drop_p) in [
            ([0, 0], [0, 0], 0.1),
            ([1, 0], [5, 8], 0.5),
            ([0, 1], [0, 3], 0.5),
            ([8, 8], [2, 13], 0.9),
            ([0, 0], [0, 0], 1.),
            ([0, 0], [0, 0], 0.),
        ] {
            let mask = Mask::from_start(drop_p, dims, &start);
            suite.add(dims, mask, offsets, format!("{dims:?}, start {start:?}, p {drop_p}"));
        }
    }
    for &window in WINDOWS {
        for drop_p in RATES {
            let what = format!("{window:?}, p {drop_p}");
            suite.add(window[0], Mask::window(drop_p, window), [0, 0], what);
        }
    }
    suite.check();
}

#[test]
fn forward_equals_the_cpu() {
    skip_without_compiler!();
    for_each_dtype!(equals_the_cpu());
}

#[test]
fn the_mask_is_that_of_an_independent_implementation() {
    skip_without_compiler!();
    assert_keeps_the_vectors(&KERNELS, |mask, cols| {
        case::<f32>("dropout_fwd", elementwise(1, cols, 1))
            .input(&vec![1f32; cols])
            .output::<f32>(cols)
            .value(1u64)
            .value(cols as u64)
            .by_value(mask)
    });
}

// mutant of kernels/rows.cuh: first digit alone|s/mapped \+= row % size\[group\] \* stride\[group\];/return mapped + row * stride[group];/
// mutant of kernels/rows.cuh: last digit lost|s/return mapped \+ row \* stride\[3\];/return mapped;/
// mutant of kernels/rows.cuh: base lost|s/mapped = base;/mapped = 0;/
// mutant of kernels/philox.cuh: row of 32 bits|s/c1 = uint32_t\(row >> 32\)/c1 = 0/
// mutant of kernels/philox.cuh: column of 32 bits|s/uint32_t\(\(mask\.col_0 \+ col\) \/ 8\)/uint32_t(mask.col_0 + col) \/ 8/
// mutant of kernels/philox.cuh: window column lost|s/int\(\(mask\.col_0 \+ col\) % 8\)/int(col % 8)/
// mutant of kernels/philox.cuh: threshold kept|s/return draw < mask/return draw <= mask/
// mutant of kernels/philox.cuh: six rounds|s/round < 7/round < 6/
// mutant: drops by product|s/keeps\(mask, draws\[j\]\) \? __fmul_rn\(v\[j\], mask\.scale\) : 0\.f/__fmul_rn(v[j], keeps(mask, draws[j]) ? mask.scale : 0.f)/
// mutant: aligned draws|s/VECTOR \? draw\(mask/true ? draw(mask/
