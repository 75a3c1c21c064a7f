//! `kernels/drop_block.cu`, bit for bit the CPU op.

use candle_core::{DType, Device};
use candle_dropout::functional::{DropBlockArgs, DropBlockConfig, drop_block};
use candle_dropout::sizes::Launch;
use candle_dropout::{DropMask, MaskArgs, MaskKey};

use super::dropped;
use crate::host::*;

static KERNELS: Program = Program::new("kernels/drop_block.cu");

/// `[N, C, H, W]`, the side of a block, the rate of seeds.
///
/// Planes of one element, lower and narrower than a block, with channels of whole vectors and of none, of more channels
/// than a chunk, several planes and rows in a tile, several tiles in a plane and in a row.
const CASES: &[([usize; 4], usize, f32)] = &[
    ([1, 1, 1, 1], 1, 0.5),
    ([5, 3, 1, 1], 7, 0.3),
    ([3, 8, 5, 7], 3, 0.05),
    ([3, 8, 5, 7], 2, 0.05),
    ([2, 5, 7, 7], 4, 0.03),
    ([2, 3, 4, 9], 5, 1.),
    ([2, 3, 3, 8], 2, 0.),
    ([1, 350, 7, 7], 7, 0.05),
    ([2, 2, 24, 40], 7, 0.004),
    ([1, 3, 100, 99], 6, 0.002),
    ([1, 2, 3, 9000], 3, 0.01),
    ([2, 11, 96, 128], 7, 0.0005),
];

/// Where a tensor lies in its whole: of coupled channels `[N, H, W]`.
fn mask(rate: f32, dims: &[usize], is_part: bool) -> DropMask {
    let drop = DropMask::new(rate, MaskKey::derive(7, 11)).unwrap();
    let (mut full, mut start) = (dims.to_vec(), vec![0; dims.len()]);
    if is_part {
        (full[0], start[0]) = (dims[0] + 2, 1);
        if dims.len() == 4 {
            (full[1], start[1]) = (dims[1] + 3, 2);
        }
    }
    drop.window(&full, &start)
}

/// Every third launch as one block, which takes all tiles in turn: the bits of one may not meet those of the next.
fn in_turn(launch: Launch, case: usize) -> Launch {
    if case.is_multiple_of(3) { Launch { grid: [1; 3], ..launch } } else { launch }
}

/// How many elements of a mask are dropped, by the naive formula.
fn count(config: &DropBlockConfig, drop: &DropMask, dims: &[usize]) -> u64 {
    let keep = drop.to_tensor(dims, &Device::Cpu).unwrap();
    let dropped = dropped(config, &keep).unwrap().to_dtype(DType::F64).unwrap();
    dropped.sum_all().unwrap().to_scalar::<f64>().unwrap() as u64
}

fn equals_the_cpu<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for &(dims, block_size, rate) in CASES {
        let [n, c, h, w] = dims;
        for (couple_channels, scale_by_keep, fast, is_part, offset) in [
            (true, true, true, false, 0),
            (false, true, true, false, 0),
            (true, false, false, true, 1),
            (false, true, false, true, 0),
        ] {
            let config = DropBlockConfig {
                block_size,
                couple_channels,
                scale_by_keep,
                fast,
                ..Default::default()
            };
            let (mask_dims, planes, channels) =
                if couple_channels { (vec![n, h, w], n, c) } else { (dims.to_vec(), n * c, 1) };
            let drop = mask(rate, &mask_dims, is_part);
            let mut full = mask_dims.clone();
            if is_part {
                full[0] += 2;
                if !couple_channels {
                    full[1] += 3;
                }
            }
            let elements = full.iter().product::<usize>() as u64;
            let counted = count(&config, &mask(rate, &full, false), &full);
            let mut x: Vec<T> = random(1, n * c * h * w);
            x.iter_mut().enumerate().skip(1).step_by(5).for_each(|(i, x)| *x = poison(i));
            let keep = drop.to_tensor(mask_dims.as_slice(), &Device::Cpu).unwrap();
            let is_dropped = dropped(&config, &keep).unwrap();
            let is_dropped =
                if couple_channels { is_dropped.unsqueeze(1).unwrap() } else { is_dropped };
            let is_dropped: Vec<f32> = values(&is_dropped.broadcast_as(&dims[..]).unwrap());
            let y = drop_block(&tensor(&x, &dims), &config, &drop).unwrap();
            let what = format!("{dims:?}, {config:?}, rate {rate}, part {is_part}");
            let args =
                DropBlockArgs::new("test", &config, (planes, channels), [h, w], elements).unwrap();
            let launch = in_turn(args.fwd_launch(MULTIPROCESSORS[cases.len() % 2]), cases.len());
            let case = case::<T>("drop_block_fwd", launch)
                .input(&x)
                .misaligned_by(offset * size_of::<T>())
                .output::<T>(x.len());
            let case = if scale_by_keep { case.input(&[counted]) } else { case.null() };
            cases.push(case.by_value(&args).by_value(&drop.args("test", &mask_dims).unwrap()));
            let keep: Vec<bool> = is_dropped.iter().map(|dropped| *dropped == 0.).collect();
            expected.push((values::<T>(&y), keep, what));
        }
    }
    for (outputs, (expected, keep, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        let y = outputs.get::<T>(0);
        assert_same(&y, &expected, &what);
        assert_dropped(&y, &keep, &vec![T::from_f64(0.); y.len()], &what);
    }
}

#[test]
fn forward_equals_the_cpu() {
    skip_without_compiler!();
    for_each_dtype!(equals_the_cpu());
}

#[test]
fn a_count_is_that_of_the_formula() {
    skip_without_compiler!();
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for &([n, c, h, w], block_size, rate) in CASES {
        for fast in [true, false] {
            let config = DropBlockConfig { block_size, fast, ..Default::default() };
            let (planes, dims) = (n * c, [n, c, h, w]);
            let elements = (planes * h * w) as u64;
            let args = DropBlockArgs::new("test", &config, (planes, 1), [h, w], elements).unwrap();
            let drop = mask(rate, &dims, false);
            let launch = in_turn(args.count_launch(MULTIPROCESSORS[cases.len() % 2]), cases.len());
            cases.push(
                case_named("drop_block_count", launch)
                    .in_out(&[0u64])
                    .by_value(&args)
                    .by_value(&drop.args("test", &dims).unwrap()),
            );
            expected.push((count(&config, &drop, &dims), format!("{dims:?}, {config:?}, {rate}")));
        }
    }
    for (outputs, (expected, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_eq!(outputs.get::<u64>(0), [expected], "{what}");
    }
}

/// Blocks of one element are the seeds themselves.
#[test]
fn the_mask_is_that_of_an_independent_implementation() {
    skip_without_compiler!();
    assert_keeps_the_vectors(&KERNELS, |mask: &MaskArgs, cols| {
        let config = DropBlockConfig { block_size: 1, ..Default::default() };
        let args = DropBlockArgs::new("test", &config, (1, 1), [1, cols], cols as u64).unwrap();
        case::<f32>("drop_block_fwd", args.fwd_launch(1))
            .input(&vec![1f32; cols])
            .output::<f32>(cols)
            .null()
            .by_value(&args)
            .by_value(mask)
    });
}

// mutant: a seed below reaches too few rows up|s/args\.block_height \/ 2\);/args.block_height \/ 2 - 1);/
// mutant: a seed above reaches too few rows down|s/first % args\.height, \(args\.block_height - 1\) \/ 2/first % args.height, (args.block_height - 2) \/ 2/
// mutant: blocks cross planes upwards|s/row - min\(h, above\)/row - min(row, above)/
// mutant: blocks cross planes downwards|s/row \+ min\(args\.height - 1 - h, below\)/row + below/
// mutant: blocks cross rows|s/col - min\(col, left\)/col - left/
// mutant: blocks cross rows to the right|s/min\(col \+ right \+ 1, args\.width\)/col + right + 1/
// mutant: even blocks lie elsewhere|s/left = args\.block_width \/ 2, right = \(args\.block_width - 1\) \/ 2/left = (args.block_width - 1) \/ 2, right = args.block_width \/ 2/
// mutant: seeds outside count|s/if \(args\.inside && !is_inside\) return;//
// mutant: a seed a call|s/for \(; seeds; seeds &= seeds - 1\)/for (; seeds; seeds = 0)/
// mutant: drops by product|s/dropped >> j & 1 \? 0\.f : __fmul_rn\(v\[j\], scale\)/__fmul_rn(v[j], dropped >> j \& 1 ? 0.f : scale)/
// mutant: bits do not begin again|s/at \+ 1 < len \? at \+ 1 : 0/at + 1/
// mutant: whole of the part|s/args\.elements - \*dropped : args\.elements/args.spans * args.span - *dropped : args.elements/
