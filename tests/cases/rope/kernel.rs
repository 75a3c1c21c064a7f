//! `kernels/rope.cu`, bit for bit the CPU op.

use candle_core::Tensor;
use candle_dropout::functional::{RopeArgs, RopeStyle, rope};

use crate::host::*;

static KERNELS: Program = Program::new("kernels/rope.cu");

/// Batches, heads, positions and the size of a head: fewer heads than a thread takes, as many, more;
/// whole vectors, parts of them, more than a team has lanes for; more positions than a grid holds at
/// once.
const SHAPES: &[[usize; 4]] = &[
    [1, 1, 1, 2],
    [2, 3, 5, 6],
    [1, 4, 3, 16],
    [2, 9, 3, 64],
    [3, 5, 2, 22],
    [1, 6, 300, 32],
    [2, 2, 2, 1040],
    [1, 1, 2, 1030],
];

/// How the elements of x lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum View {
    /// `[B, H, T, D]`.
    Contiguous,
    /// `[B, T, H, D]` with two dimensions swapped.
    Transposed,
    /// Rows that are too far apart by one element.
    Odd,
}

fn equals_the_cpu<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for &[b, h, t, d] in SHAPES {
        for (view, per_batch, inverse, offset) in [
            (View::Contiguous, false, false, 0),
            (View::Contiguous, true, true, 1),
            (View::Transposed, true, false, 0),
            (View::Transposed, false, true, 0),
            (View::Odd, false, false, 0),
        ] {
            for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
                let row = d + usize::from(view == View::Odd);
                let base: Vec<T> = random(1, b * h * t * row);
                let x = match view {
                    View::Contiguous => tensor(&base, &[b, h, t, d]),
                    View::Transposed => tensor(&base, &[b, t, h, d]).transpose(1, 2).unwrap(),
                    View::Odd => tensor(&base, &[b, h, t, row]).narrow(3, 0, d).unwrap(),
                };
                let table_dims = if per_batch { vec![b, t, d / 2] } else { vec![t, d / 2] };
                let table = |seed| random::<f32>(seed, table_dims.iter().product());
                let (cos, sin) = (table(2), table(3));
                let as_tensor = |table: &[f32]| tensor(table, &table_dims);
                let turned = if inverse { as_tensor(&sin).neg().unwrap() } else { as_tensor(&sin) };
                let y: Tensor = rope(&x, &as_tensor(&cos), &turned, style).unwrap();

                let (layout, interleaved) =
                    ((x.dims(), x.stride()), style == RopeStyle::Interleaved);
                let args =
                    RopeArgs::new("test", layout, &table_dims, inverse, interleaved).unwrap();
                let launch = args.launch(MULTIPROCESSORS[usize::from(b * h * t < 600)]);
                cases.push(
                    case::<T>("rope_fwd", launch)
                        .input(&base)
                        .misaligned_by(offset * size_of::<T>())
                        .input(&cos)
                        .input(&sin)
                        .output::<T>(b * h * t * d)
                        .by_value(&args),
                );
                let what = format!(
                    "{:?}, {view:?}, per batch {per_batch}, inverse {inverse}, {style:?}",
                    [b, h, t, d]
                );
                expected.push((values::<T>(&y), what));
            }
        }
    }
    for (outputs, (expected, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_same(&outputs.get::<T>(0), &expected, &what);
    }
}

#[test]
fn forward_and_backward_equal_the_cpu() {
    skip_without_compiler!();
    for_each_dtype!(equals_the_cpu());
}

// mutant: rotates forwards|s/s\[j\] \*= args\.sin_sign/s[j] *= 1.f/
// mutant: first element overwritten|s/x2 = __fadd_rn\(__fmul_rn\(x1, sin\)/x2 = __fadd_rn(__fmul_rn(y1, sin)/
// mutant: tables of one batch|s/batch \* args\.table_stride \+ position/position/
// mutant: strides unused|s/position \* args\.x_strides\[2\]/position * head_size/
// mutant: aligned strides|s/args\.half \| strides, x/args.half, x/
// mutant: second half of the angles lost|s/high\[2 \* \(j - HALF\) \+ 1\], cos\[j\]/high[2 * (j - HALF) + 1], cos[j - HALF]/
