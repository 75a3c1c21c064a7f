//! `kernels/attention_delta.cu`: row sums, whatever lies between the rows.

use candle_dropout::functional::{AttentionArgs, HeadStrides};

use crate::host::*;

static KERNELS: Program = Program::new("kernels/attention_delta.cu");

/// Batches, heads, queries, head size; from one lane a row to a warp.
const SHAPES: &[[usize; 4]] = &[
    [1, 1, 1, 1],
    [2, 3, 5, 8],
    [2, 3, 70, 24],
    [1, 2, 33, 64],
    [3, 1, 7, 130],
    [2, 2, 9, 256],
    [2, 2, 3, 61],
];

fn sums_rows<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for (at, &[batches, heads, queries, head_size]) in SHAPES.iter().enumerate() {
        // Heads before rows and after them, rows that follow one another and that do not, views.
        for (o_gap, dout_gap, offset) in [(0, 0, 0), (0, 8, 0), (8, 3, 0), (0, 0, 1)] {
            let rows = batches * heads * queries;
            let width = [head_size + o_gap, head_size + dout_gap].map(|width| width as u64);
            let o_strides = HeadStrides {
                batch: (heads * queries) as u64 * width[0],
                head: queries as u64 * width[0],
                row: width[0],
            };
            let dout_strides = HeadStrides {
                batch: (heads * queries) as u64 * width[1],
                head: width[1],
                row: heads as u64 * width[1],
            };
            let place = |strides: &HeadStrides, values: &[T]| -> Vec<T> {
                let index = |row: usize| {
                    strides.at(row / queries / heads, row / queries % heads, row % queries)
                };
                let span = (0..rows).map(index).max().unwrap_or(0) + head_size;
                let mut memory = vec![poison(0); span];
                for (row, values) in values.chunks(head_size).enumerate() {
                    memory[index(row)..][..head_size].copy_from_slice(values);
                }
                memory
            };
            let (o, dout) = (random::<T>(1, rows * head_size), random::<T>(2, rows * head_size));
            let sum = |f: fn(f64) -> f64| -> Vec<f64> {
                let product = |(o, dout): (&T, &T)| f(o.to_f64() * dout.to_f64());
                (o.chunks(head_size).zip(dout.chunks(head_size)))
                    .map(|(o, dout)| o.iter().zip(dout).map(product).sum())
                    .collect()
            };
            let args = AttentionArgs {
                scale: 1.,
                softcap: 0.,
                batches: batches as u32,
                heads: heads as u32,
                kv_heads: 1,
                queries: queries as u32,
                keys: 3,
                head_size: head_size as u32,
                left: AttentionArgs::UNBOUNDED,
                right: AttentionArgs::UNBOUNDED,
                drop_key: 0,
                padding: 0,
            };
            let launch = args.launch_delta(MULTIPROCESSORS[at % 2]);
            cases.push(
                case::<T>("attention_bwd_delta", launch)
                    .input(&place(&o_strides, &o))
                    .misaligned_by(offset * size_of::<T>())
                    .input(&place(&dout_strides, &dout))
                    .output::<f32>(rows)
                    .by_value(&args)
                    .by_value(&o_strides)
                    .by_value(&dout_strides),
            );
            let what = format!("{:?}, gaps {o_gap} and {dout_gap}, offset {offset}", SHAPES[at]);
            expected.push((sum(|x| x), sum(f64::abs), what));
        }
    }
    for (outputs, (sums, terms, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_close(&outputs.get::<f32>(0), &sums, &terms, &what);
    }
}

#[test]
fn row_sums_equal_the_formula() {
    skip_without_compiler!();
    for_each_dtype!(sums_rows());
}

// mutant: heads of all samples|s/head = heads_before % args\.heads/head = heads_before/
// mutant: past the last row|s/min\(first \+ threadIdx\.y, rows - 1\)/first + threadIdx.y/
