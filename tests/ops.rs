//! Every op against its naive formula, forward and each gradient, and the promises of its docs.

mod common;
#[path = "common/runner.rs"]
mod runner;

use std::cell::Cell;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::{
    AttentionMask, DropMask, StochasticDepth, drop_path_add, dropout, dropout_add, softmax_dropout,
};
use common::{bits, random};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use runner::{DTYPES, OPS, Op, SCALE, View, disagreements, epsilon, error, largest, mask, run};

/// The CPU, and a GPU if there is one that this build can use.
fn devices() -> Vec<Device> {
    [Ok(Device::Cpu), Device::new_cuda(0)].into_iter().flatten().collect()
}

/// Asserts that an op and each gradient agree with the formula on every device.
fn agrees(op: Op, dims: &[Vec<usize>], view: View, drop_p: f32, dtype: DType) -> Result<()> {
    assert_eq!(disagreements(op, dims, view, drop_p, dtype, &devices())?, [""; 0]);
    Ok(())
}

/// One by one: scalar, single elements, odd and prime sizes, none a multiple of 8; one column, one row;
/// more queries than keys and fewer; more than one parallel chunk; more rows than a CUDA grid's y.
const SHAPES: [&[usize]; 13] = [
    &[],
    &[1],
    &[7],
    &[1, 1],
    &[131, 1],
    &[1, 1031],
    &[5, 3],
    &[2, 3, 17],
    &[2, 7, 4],
    &[2, 3, 4, 5],
    &[37, 1031],
    &[5, 9973],
    &[65537, 3],
];

fn agrees_on_every_shape_rate_and_dtype(op: Op) -> Result<()> {
    for dims in SHAPES.into_iter().filter(|dims| op.takes(dims)) {
        for drop_p in [0., 0.1, 0.5, 1.] {
            for dtype in DTYPES {
                agrees(op, &op.arguments(dims), View::Contiguous, drop_p, dtype)?;
            }
        }
    }
    Ok(())
}

#[test]
fn dropout_agrees_with_its_formula() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::Dropout)
}

#[test]
fn dropout_add_agrees_with_its_formula() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::DropoutAdd)
}

#[test]
fn dropout_add_with_bias_agrees_with_its_formula() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::DropoutAddBias)
}

#[test]
fn softmax_dropout_agrees_with_its_formula() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::Softmax)
}

#[test]
fn causal_softmax_dropout_agrees_with_its_formula() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::SoftmaxCausal)
}

#[test]
fn additive_softmax_dropout_agrees_with_its_formula() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::SoftmaxAdditive)
}

#[test]
fn drop_path_add_agrees_with_its_formula() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::DropPathAddRow)?;
    agrees_on_every_shape_rate_and_dtype(Op::DropPathAddBatch)
}

#[test]
fn drop_path_kept_agrees_with_the_formula_of_drop_path_add() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::DropPathKept)
}

#[test]
fn activation_dropout_agrees_with_its_formula() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::GeluTanhDropout)?;
    agrees_on_every_shape_rate_and_dtype(Op::GeluErfDropoutBias)?;
    agrees_on_every_shape_rate_and_dtype(Op::SiluDropout)?;
    agrees_on_every_shape_rate_and_dtype(Op::ReluDropoutBias)
}

#[test]
fn norms_agree_with_their_formula() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::LayerNorm)?;
    agrees_on_every_shape_rate_and_dtype(Op::RmsNorm)
}

#[test]
fn dropout_add_norm_agrees_with_its_formula() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::DropoutAddNorm)?;
    agrees_on_every_shape_rate_and_dtype(Op::DropoutAddNormBias)
}

#[test]
fn dropout_norm_without_a_residual_agrees_with_its_formula() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::DropoutNorm)?;
    agrees_on_every_shape_rate_and_dtype(Op::DropoutNormBias)
}

#[test]
fn rope_agrees_with_its_formula() -> Result<()> {
    for op in [Op::Rope, Op::RopeInterleaved] {
        for dims in [&[1, 2][..], &[5, 6], &[3, 7, 34], &[2, 3, 5, 16], &[2, 9, 37, 64]] {
            for dtype in DTYPES {
                agrees(op, &op.arguments(dims), View::Contiguous, 0., dtype)?;
            }
        }
        agrees_on_every_shape_rate_and_dtype(op)?;
    }
    Ok(())
}

#[test]
fn cross_entropy_agrees_with_its_formula() -> Result<()> {
    agrees_on_every_shape_rate_and_dtype(Op::CrossEntropy)?;
    agrees_on_every_shape_rate_and_dtype(Op::CrossEntropySmoothed)
}

#[test]
fn strided_offset_and_broadcast_arguments_agree_with_the_formula() -> Result<()> {
    for op in OPS {
        for dims in
            [&[5][..], &[5, 3], &[2, 3, 17], &[2, 3, 4, 5], &[37, 1031], &[2, 6, 5, 32], &[3, 14]]
        {
            for view in [View::Transposed, View::Offset, View::Broadcast] {
                for dtype in DTYPES {
                    if op.takes(dims) {
                        agrees(op, &op.arguments(dims), view, 0.3, dtype)?;
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn an_additive_mask_and_its_gradient_agree_however_it_is_broadcast() -> Result<()> {
    let scores = [2usize, 3, 4, 5];
    let mut forms: Vec<Vec<usize>> = vec![vec![], vec![1], vec![5], vec![4, 1], vec![4, 5]];
    forms.extend([vec![3, 1, 1], vec![3, 1, 5], vec![1, 4, 5], vec![3, 4, 5]]);
    // Every dimension of its full size or 1.
    for full in 0..16 {
        forms.push((0..4).map(|d| if full >> d & 1 == 1 { scores[d] } else { 1 }).collect());
    }
    for form in forms {
        for dtype in DTYPES {
            let dims = [scores.to_vec(), form.clone()];
            agrees(Op::SoftmaxAdditive, &dims, View::Contiguous, 0.3, dtype)?;
        }
    }
    Ok(())
}

#[test]
fn empty_tensors_give_empty_outputs_and_gradients() -> Result<()> {
    for op in OPS {
        for dims in [&[0][..], &[3, 0], &[0, 4], &[2, 0, 3]] {
            for (dtype, drop_p) in [(DType::F32, 0.3), (DType::BF16, 1.), (DType::F64, 0.)] {
                if !op.takes(dims) {
                    continue;
                }
                let vars = op
                    .arguments(dims)
                    .into_iter()
                    .map(|dims| Var::zeros(dims, dtype, &Device::Cpu));
                let vars = vars.collect::<Result<Vec<_>>>()?;
                let args: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
                let y = op.fused(&args, &mask(drop_p))?;
                assert_eq!(y.dims(), op.output(dims), "{op:?}");
                let grads = y.backward()?;
                for var in &vars {
                    let grad = grads.get(var).unwrap_or_else(|| panic!("{op:?} {dims:?} {drop_p}"));
                    assert_eq!(grad.dims(), var.dims(), "{op:?}");
                    assert!(largest(&grad.to_dtype(DType::F64)?)? == 0., "{op:?} {dims:?}");
                }
            }
        }
    }
    Ok(())
}

// ---- gradients ----

/// The derivative of `Σ w * op(args)` by each element of argument `i`, from differences of the op
/// itself, equals the gradient that backward gives.
#[test]
fn gradients_equal_finite_differences() -> Result<()> {
    const STEP: f64 = 1e-5;
    for op in OPS {
        let shape = op.fitting(&[3, 7]);
        let (dims, drop) = (op.arguments(&shape), mask(0.3));
        let args = dims.iter().enumerate().map(|(i, dims)| random(dims, DType::F64, i as u64));
        let args = args.collect::<Result<Vec<_>>>()?;
        let w = op.output_gradient(&shape, DType::F64)?;
        let loss = |args: &[Tensor]| (op.fused(args, &drop)? * &w)?.sum_all()?.to_scalar::<f64>();
        let vars = args.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let tracked: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let grads = (op.fused(&tracked, &drop)? * &w)?.backward()?;
        for (i, arg) in args.iter().enumerate() {
            let grad = grads.get(&vars[i]).unwrap().flatten_all()?.to_vec1::<f64>()?;
            let values = arg.flatten_all()?.to_vec1::<f64>()?;
            for (j, grad) in grad.iter().enumerate() {
                let loss_at = |step: f64| {
                    let (mut args, mut values) = (args.clone(), values.clone());
                    values[j] += step;
                    args[i] = Tensor::from_vec(values, arg.dims(), &Device::Cpu)?;
                    loss(&args)
                };
                let difference = (loss_at(STEP)? - loss_at(-STEP)?) / (2. * STEP);
                assert!((difference - grad).abs() < 1e-8, "{op:?} argument {i} element {j}");
            }
        }
    }
    Ok(())
}

#[test]
fn only_tracked_arguments_need_a_gradient() -> Result<()> {
    for op in OPS {
        let (dims, drop) = (op.arguments(&op.fitting(&[4, 9])), mask(0.3));
        let args = dims.iter().enumerate().map(|(i, dims)| random(dims, DType::F32, i as u64));
        let args = args.collect::<Result<Vec<_>>>()?;
        let vars = args.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let all: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let expected = op.fused(&all, &drop)?.backward()?;
        for tracked in 0..args.len() {
            let mut some = args.clone();
            some[tracked] = all[tracked].clone();
            let grads = op.fused(&some, &drop)?.backward()?;
            let grad = grads.get(&vars[tracked]).unwrap().to_dtype(DType::F64)?;
            let expected = expected.get(&vars[tracked]).unwrap().to_dtype(DType::F64)?;
            let bound = epsilon(DType::F32) * largest(&expected)?;
            assert!(error(&grad, &expected)? <= bound, "{op:?} argument {tracked}");
            for (i, arg) in args.iter().enumerate().filter(|(i, _)| *i != tracked) {
                assert!(grads.get(arg).is_none(), "{op:?}: argument {i} asked for no gradient");
            }
        }
    }
    Ok(())
}

#[test]
fn a_second_backward_gives_the_same_gradients() -> Result<()> {
    for op in OPS {
        let vars = op
            .arguments(&op.fitting(&[4, 9]))
            .into_iter()
            .map(|dims| Var::from_tensor(&random(&dims, DType::F32, 3)?));
        let vars = vars.collect::<Result<Vec<_>>>()?;
        let args: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let y = op.fused(&args, &mask(0.3))?.sqr()?;
        let (first, second) = (y.backward()?, y.backward()?);
        for var in &vars {
            assert_eq!(bits(first.get(var).unwrap())?, bits(second.get(var).unwrap())?, "{op:?}");
        }
    }
    Ok(())
}

// ---- what is dropped vanishes ----

/// NaN, both infinities and -0 where `keep` is 0, and the elements of `x` elsewhere.
fn poisoned(x: &Tensor, keep: &Tensor) -> Result<Tensor> {
    let poison = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.];
    let poison: Vec<_> = (0..x.elem_count()).map(|i| poison[i % 4]).collect();
    let poison = Tensor::from_vec(poison, x.dims(), x.device())?.to_dtype(x.dtype())?;
    keep.where_cond(x, &poison)
}

fn gradient(y: &Tensor, dy: &Tensor, var: &Var) -> Result<Tensor> {
    Ok((y * dy)?.backward()?.get(var).unwrap().clone())
}

/// Asserts that `poisoned` has the bits of `clean`.
fn same_bits(poisoned: &Tensor, clean: &Tensor, what: &str) -> Result<()> {
    assert_eq!(bits(poisoned)?, bits(clean)?, "{what} in {:?}", clean.dtype());
    Ok(())
}

#[test]
fn dropped_infinities_and_nans_vanish_from_dropout() -> Result<()> {
    for (dtype, drop_p) in DTYPES.into_iter().flat_map(|dtype| [(dtype, 0.4), (dtype, 1.)]) {
        let (drop, dims) = (mask(drop_p), [13, 41]);
        let keep = drop.to_tensor(&dims, &Device::Cpu)?;
        let (x, dy) = (random(&dims, dtype, 1)?, random(&dims, dtype, 2)?);
        let bad = Var::from_tensor(&poisoned(&x, &keep)?)?;
        let (y, clean) = (dropout(&bad, &drop)?, dropout(&x, &drop)?);
        same_bits(&y, &clean, "output")?;
        let dropped = bits(&y)?.into_iter().zip(bits(&keep)?).filter(|(_, keep)| *keep == 0);
        assert!(dropped.map(|(y, _)| y).all(|y| y == 0), "a dropped element is +0");
        let zeros = keep.where_cond(&dy, &dy.zeros_like()?)?;
        let dx = gradient(&y, &poisoned(&dy, &keep)?, &bad)?;
        same_bits(&dx, &gradient(&y, &zeros, &bad)?, "gradient")?;
    }
    Ok(())
}

#[test]
fn dropped_infinities_and_nans_leave_the_bare_residual() -> Result<()> {
    for (dtype, drop_p) in DTYPES.into_iter().flat_map(|dtype| [(dtype, 0.4), (dtype, 1.)]) {
        let (drop, dims) = (mask(drop_p), [13, 41]);
        let keep = drop.to_tensor(&dims, &Device::Cpu)?;
        let (x, dy) = (random(&dims, dtype, 1)?, random(&dims, dtype, 2)?);
        // A residual with every kind of value, of which the dropped elements keep each bit.
        let residual = poisoned(&random(&dims, dtype, 3)?, &random(&dims, dtype, 4)?.gt(0.)?)?;
        let bias = Var::from_tensor(&random(&[41], dtype, 5)?)?;
        let bad = Var::from_tensor(&poisoned(&x, &keep)?)?;
        let zeros = keep.where_cond(&dy, &dy.zeros_like()?)?;
        for bias in [None, Some(&bias)] {
            let biased = bias.map(|bias| bias.as_tensor());
            let y = dropout_add(&bad, &residual, biased, &drop)?;
            same_bits(&y, &dropout_add(&x, &residual, biased, &drop)?, "output")?;
            let dropped = bits(&y)?.into_iter().zip(bits(&residual)?).zip(bits(&keep)?);
            assert!(dropped.filter(|(_, keep)| *keep == 0).all(|((y, residual), _)| y == residual));
            for var in [Some(&bad), bias].into_iter().flatten() {
                let grad = gradient(&y, &poisoned(&dy, &keep)?, var)?;
                same_bits(&grad, &gradient(&y, &zeros, var)?, "gradient")?;
            }
        }
    }
    Ok(())
}

#[test]
fn dropped_probabilities_are_zero_even_in_a_row_of_nan() -> Result<()> {
    for dtype in DTYPES {
        let (drop, dims) = (mask(0.4), [13, 41]);
        let keep = drop.to_tensor(&dims, &Device::Cpu)?;
        let scores = Var::from_tensor(&random(&dims, dtype, 1)?)?;
        let y =
            softmax_dropout(&(scores.as_tensor() * f64::NAN)?, 1., &AttentionMask::None, &drop)?;
        let y = y.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        for (y, keep) in y.iter().zip(bits(&keep)?) {
            assert!(if keep == 1 { y.is_nan() } else { y.to_bits() == 0 });
        }
        let (y, dy) =
            (softmax_dropout(&scores, 1., &AttentionMask::None, &drop)?, random(&dims, dtype, 2)?);
        let zeros = keep.where_cond(&dy, &dy.zeros_like()?)?;
        let dscores = gradient(&y, &poisoned(&dy, &keep)?, &scores)?;
        same_bits(&dscores, &gradient(&y, &zeros, &scores)?, "gradient")?;
    }
    Ok(())
}

#[test]
fn a_dropped_branch_leaves_the_bare_residual() -> Result<()> {
    for dtype in DTYPES {
        let (drop, dims) = (mask(0.4), [13, 41]);
        let keep = drop.to_tensor((1, 13), &Device::Cpu)?.t()?.broadcast_as(&dims)?.contiguous()?;
        let (x, dy) = (random(&dims, dtype, 1)?, random(&dims, dtype, 2)?);
        let residual = poisoned(&random(&dims, dtype, 3)?, &random(&dims, dtype, 4)?.gt(0.)?)?;
        let bad = Var::from_tensor(&poisoned(&x, &keep)?)?;
        let y = drop_path_add(&bad, &residual, StochasticDepth::Row, &drop)?;
        same_bits(&y, &drop_path_add(&x, &residual, StochasticDepth::Row, &drop)?, "output")?;
        let dropped = bits(&y)?.into_iter().zip(bits(&residual)?).zip(bits(&keep)?);
        assert!(dropped.filter(|(_, keep)| *keep == 0).all(|((y, residual), _)| y == residual));
        let zeros = keep.where_cond(&dy, &dy.zeros_like()?)?;
        let dx = gradient(&y, &poisoned(&dy, &keep)?, &bad)?;
        same_bits(&dx, &gradient(&y, &zeros, &bad)?, "gradient")?;
    }
    Ok(())
}

#[test]
fn rows_of_which_every_key_is_masked_give_zeros_and_zero_gradients() -> Result<()> {
    for (dtype, drop_p) in DTYPES.into_iter().flat_map(|dtype| [(dtype, 0.), (dtype, 0.4)]) {
        let scores = Var::from_tensor(&random(&[2, 5, 3], dtype, 1)?)?;
        // Queries 1 and 2 see nothing.
        let visible =
            Tensor::new(&[0f32, f32::NEG_INFINITY, f32::NEG_INFINITY, 0., 0.], &Device::Cpu)?;
        let additive = Var::from_tensor(&visible.reshape((5, 1))?.to_dtype(dtype)?)?;
        let blind_queries = [
            (AttentionMask::Additive(additive.as_tensor().clone()), [1, 2]),
            // Five queries and three keys: the first two come before every key.
            (AttentionMask::Causal, [0, 1]),
        ];
        for (mask_kind, blind) in blind_queries {
            let y = softmax_dropout(&scores, SCALE, &mask_kind, &mask(drop_p))?;
            let grads = (&y * random(&[2, 5, 3], dtype, 2)?)?.backward()?;
            let dscores = grads.get(&scores).unwrap();
            for query in blind {
                for x in [&y, dscores] {
                    let row = x.narrow(1, query, 1)?.to_dtype(DType::F64)?;
                    assert_eq!(largest(&row)?, 0., "{mask_kind:?}");
                }
            }
            assert!(largest(&dscores.to_dtype(DType::F64)?)?.is_finite());
            assert!(largest(&y.narrow(1, 3, 2)?.to_dtype(DType::F64)?)? > 0.);
            if let Some(dadditive) = grads.get(&additive) {
                assert!(largest(&dadditive.to_dtype(DType::F64)?)?.is_finite());
            }
        }
    }
    Ok(())
}

// ---- fused and unfused ----

#[test]
fn dropout_add_is_residual_plus_dropout_bit_for_bit() -> Result<()> {
    let (x, residual) = (random(&[37, 1031], DType::F32, 1)?, random(&[37, 1031], DType::F32, 2)?);
    let bias = random(&[1031], DType::F32, 3)?;
    for drop_p in [0., 0.1, 0.5, 1.] {
        let drop = mask(drop_p);
        let fused = dropout_add(&x, &residual, None, &drop)?;
        same_bits(&fused, &(&residual + dropout(&x, &drop)?)?, "output")?;
        let fused = dropout_add(&x, &residual, Some(&bias), &drop)?;
        let unfused = (&residual + dropout(&x.broadcast_add(&bias)?, &drop)?)?;
        same_bits(&fused, &unfused, "biased output")?;
    }
    Ok(())
}

#[test]
fn softmax_dropout_draws_the_mask_of_dropout() -> Result<()> {
    for dtype in DTYPES {
        let scores = random(&[2, 3, 37, 41], dtype, 1)?;
        let drop = mask(0.4);
        let dropped = dropout(&scores.ones_like()?, &drop)?.eq(0.)?;
        let y = softmax_dropout(&scores, SCALE, &AttentionMask::None, &drop)?;
        same_bits(&y.eq(0.)?, &dropped, "mask")?;
    }
    Ok(())
}

#[test]
fn nothing_to_drop_means_x_itself() -> Result<()> {
    let x = random(&[3, 5], DType::F32, 1)?;
    assert_eq!(dropout(&x, &DropMask::none())?.id(), x.id());
    assert_eq!(dropout(&x, &mask(0.))?.id(), x.id());
    Ok(())
}

// ---- windows ----

/// Asserts that an op on the parts along `dim`, each with its window, gives the whole and its gradient,
/// bit for bit.
fn parts_equal_the_whole(op: Op, dims: &[usize], dim: usize, cuts: &[usize]) -> Result<()> {
    let (shapes, drop) = (op.arguments(dims), mask(0.4));
    let vars = shapes
        .iter()
        .enumerate()
        .map(|(i, dims)| Var::from_tensor(&random(dims, DType::F32, i as u64)?));
    let vars = vars.collect::<Result<Vec<_>>>()?;
    let dy = random(dims, DType::F32, 9)?;
    let args: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let whole = op.fused(&args, &drop)?;
    let ends = cuts.iter().copied().chain([dims[dim]]);
    let parts = [0].iter().chain(cuts).zip(ends).map(|(&from, to)| {
        let part = |x: &Tensor| match (x.rank() == dims.len(), dim + 1 == dims.len()) {
            (true, _) => x.narrow(dim, from, to - from),
            (false, true) => x.narrow(0, from, to - from),
            (false, false) => Ok(x.clone()),
        };
        let (mut full, mut start) = (op.mask_dims(dims), vec![0; dims.len()]);
        start[dim] = from;
        if matches!(op, Op::DropPathAddRow) {
            (full, start) = (vec![1, dims[0]], vec![0, from]);
        }
        let args = args.iter().map(part).collect::<Result<Vec<_>>>()?;
        op.fused(&args, &drop.window(&full, &start))
    });
    let parts = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, dim)?;
    let what = format!("{op:?} {dims:?} split in dimension {dim}");
    same_bits(&parts, &whole, &what)?;
    same_bits(&gradient(&parts, &dy, &vars[0])?, &gradient(&whole, &dy, &vars[0])?, &what)
}

#[test]
fn a_split_op_equals_the_unsplit_op() -> Result<()> {
    for op in [Op::Dropout, Op::DropoutAdd, Op::DropoutAddBias] {
        parts_equal_the_whole(op, &[4, 6, 33], 0, &[1, 3])?;
        parts_equal_the_whole(op, &[3, 10, 33], 1, &[1, 4])?;
        parts_equal_the_whole(op, &[3, 10, 33], 2, &[3])?;
        parts_equal_the_whole(op, &[2, 6, 5, 19], 1, &[2, 4])?;
        parts_equal_the_whole(op, &[2, 3, 1200], 2, &[3, 600])?;
        parts_equal_the_whole(op, &[8, 50, 129], 1, &[7])?;
    }
    for op in [Op::Softmax, Op::SoftmaxAdditive] {
        parts_equal_the_whole(op, &[4, 6, 5, 19], 0, &[1, 3])?;
        parts_equal_the_whole(op, &[2, 6, 5, 19], 1, &[2, 4])?;
        parts_equal_the_whole(op, &[2, 6, 5, 19], 2, &[3])?;
    }
    parts_equal_the_whole(Op::SoftmaxCausal, &[4, 6, 5, 19], 0, &[1, 3])?;
    parts_equal_the_whole(Op::SoftmaxCausal, &[2, 6, 5, 19], 1, &[2, 4])?;
    parts_equal_the_whole(Op::DropPathAddRow, &[13, 3, 5], 0, &[3, 8])
}

#[test]
fn attention_to_keys_from_the_third_on_draws_their_columns() -> Result<()> {
    let drop = mask(0.4).window(&[2, 3, 5, 22], &[0, 0, 0, 3]);
    let scores = random(&[2, 3, 5, 19], DType::F32, 1)?;
    let y = softmax_dropout(&scores, SCALE, &AttentionMask::None, &drop)?;
    let whole = mask(0.4).to_tensor((2, 3, 5, 22), &Device::Cpu)?;
    same_bits(&y.ne(0.)?, &whole.narrow(3, 3, 19)?, "mask")
}

// ---- threads ----

#[test]
fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
    for op in OPS {
        for dtype in DTYPES {
            let on = |threads: usize| -> Result<Vec<Vec<u64>>> {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let dims = op.arguments(&op.fitting(&[700, 257]));
                    let bases =
                        dims.iter().enumerate().map(|(i, dims)| random(dims, dtype, i as u64));
                    let bases = bases.collect::<Result<Vec<_>>>()?;
                    let dy = op.output_gradient(&dims[0], dtype)?;
                    let op = |args: &[Tensor]| op.fused(args, &mask(0.4));
                    run(op, &bases, &dims, View::Contiguous, &dy)?.iter().map(bits).collect()
                })
            };
            assert_eq!(on(1)?, on(2)?, "{op:?} {dtype:?}");
        }
    }
    Ok(())
}

// ---- errors ----

/// Asserts that a call fails and that its message holds every fragment.
fn fails(result: Result<Tensor>, fragments: &[&str]) {
    let error = result.unwrap_err().to_string();
    for fragment in fragments {
        assert!(error.contains(fragment), "{fragment:?} is missing from: {error}");
    }
}

#[test]
fn errors_name_op_argument_expected_got_and_remedy() -> Result<()> {
    let cpu = &Device::Cpu;
    let drop = mask(0.5);
    let x = random(&[2, 3, 4], DType::F32, 1)?;
    let narrower = random(&[2, 3, 3], DType::F32, 1)?;
    let wide = x.to_dtype(DType::F64)?;
    let whole = Tensor::zeros((2, 3, 4), DType::U32, cpu)?;
    let scalar = Tensor::new(1f32, cpu)?;
    let bias = random(&[4], DType::F32, 2)?;
    let (row, none) = (StochasticDepth::Row, AttentionMask::None);
    let additive = |mask: &Tensor| AttentionMask::Additive(mask.clone());

    // A dtype that is no float.
    let got = ["x: expected dtype f32, f64, f16 or bf16, got U32", "to_dtype"];
    fails(dropout(&whole, &drop), &["dropout: ", got[0], got[1]]);
    fails(dropout(&whole, &mask(0.)), &["dropout: ", got[0], got[1]]);
    fails(dropout_add(&whole, &whole, None, &drop), &["dropout_add: ", got[0], got[1]]);
    fails(drop_path_add(&whole, &whole, row, &drop), &["drop_path_add: ", got[0], got[1]]);
    let got = ["softmax_dropout: scores: expected dtype", "got U32", "to_dtype"];
    fails(softmax_dropout(&whole, 1., &none, &drop), &got);

    // Arguments that do not go together.
    let got = ["residual: expected shape [2, 3, 4] like x, got [2, 3, 3]", "broadcast_as"];
    fails(dropout_add(&x, &narrower, None, &drop), &["dropout_add: ", got[0], got[1]]);
    fails(drop_path_add(&x, &narrower, row, &drop), &["drop_path_add: ", got[0], got[1]]);
    let got = ["residual: expected dtype F32 like x, got F64", "to_dtype"];
    fails(dropout_add(&x, &wide, None, &drop), &["dropout_add: ", got[0], got[1]]);
    fails(drop_path_add(&x, &wide, row, &drop), &["drop_path_add: ", got[0], got[1]]);
    let got =
        ["dropout_add: bias: expected shape [4] like the last dimension of x [2, 3, 4], got [3]"];
    fails(dropout_add(&x, &x, Some(&bias.narrow(0, 0, 3)?), &drop), &got);
    fails(dropout_add(&x, &x, Some(&bias.unsqueeze(0)?), &drop), &["got [1, 4]; reshape it"]);
    let got = ["dropout_add: bias: expected dtype F32 like x, got F64", "to_dtype"];
    fails(dropout_add(&x, &x, Some(&bias.to_dtype(DType::F64)?), &drop), &got);

    // Scores, their scale and their mask.
    for scale in [f64::NAN, f64::INFINITY, 1e300] {
        let got = ["softmax_dropout: scale: expected a finite f32, got", "1/sqrt(D)"];
        fails(softmax_dropout(&x, scale, &none, &drop), &got);
    }
    let got =
        ["softmax_dropout: scores: expected [.., Sq, Sk] for a causal mask, got [4]", "unsqueeze"];
    fails(softmax_dropout(&bias, 1., &AttentionMask::Causal, &drop), &got);
    let got =
        ["softmax_dropout: mask: expected a shape that broadcasts over the scores [2, 3, 4], got"];
    fails(softmax_dropout(&x, 1., &additive(&narrower), &drop), &[got[0], "[2, 3, 3]; give"]);
    fails(softmax_dropout(&x, 1., &additive(&x.unsqueeze(0)?), &drop), &[got[0], "[1, 2, 3, 4]"]);
    let got = ["softmax_dropout: mask: expected dtype F32 like", "got F64", "to_dtype"];
    fails(softmax_dropout(&x, 1., &additive(&wide), &drop), &got);

    // No samples.
    let got =
        ["drop_path_add: x: expected a batch dimension, got a scalar", "StochasticDepth::Batch"];
    fails(drop_path_add(&scalar, &scalar, row, &drop), &got);

    // Windows: of the wrong rank, and too small.
    let rank = drop.window(&[6, 4], &[0, 0]);
    let got =
        ["drop.window: expected full_shape and start of rank 3", "[6, 4]", "one entry for each"];
    fails(dropout(&x, &rank), &["dropout: ", got[0], got[1], got[2]]);
    fails(dropout_add(&x, &x, None, &rank), &["dropout_add: ", got[0]]);
    fails(softmax_dropout(&x, 1., &none, &rank), &["softmax_dropout: ", got[0]]);
    fails(rank.to_tensor((2, 3, 4), cpu), &["to_tensor: ", got[0]]);
    let rank = drop.window(&[6], &[0]);
    fails(
        drop_path_add(&x, &x, row, &rank),
        &["drop_path_add: ", "of rank 2 like the mask [1, 2]"],
    );
    for start in [[0, 1, 0], [0, usize::MAX, 0]] {
        let got =
            ["dropout: drop.window: expected start + shape <= full_shape", "in dimension 1; pass"];
        fails(dropout(&x, &drop.window(&[2, 3, 4], &start)), &got);
    }
    let far = drop.window(&[2, 3, 1 << 36], &[0, 0, (1 << 35) - 3]);
    let got = ["dropout: x: expected at most 2^35 columns", "got 34359738369; reshape"];
    fails(dropout(&x, &far), &got);
    let deep = Tensor::zeros((2, 2, 2, 2, 2, 2), DType::F32, cpu)?;
    let got = ["dropout: drop.window: expected a part that splits at most", "split fewer"];
    fails(dropout(&deep, &drop.window(&[2, 3, 3, 3, 3, 3], &[0; 6])), &got);
    Ok(())
}

/// A call on small tensors whose shapes, dtypes and window are anything, and mostly do not go together.
#[derive(Clone, Debug)]
struct Call {
    op: Op,
    dims: Vec<usize>,
    /// The shape of the last argument, if not the one that fits.
    last_dims: Option<Vec<usize>>,
    dtype: DType,
    last_dtype: DType,
    drop: DropMask,
}

fn call() -> impl Strategy<Value = Call> {
    let dims = prop::collection::vec(0usize..4, 0..6);
    let dtype = || prop::sample::select(vec![DType::F32, DType::F64, DType::BF16, DType::I64]);
    let full = prop::collection::vec(0usize..6, 0..6);
    let window = prop::option::of((full, prop::collection::vec(0usize..3, 0..6)));
    let drop = (0u8..5, window).prop_map(|(quarters, window)| {
        let drop = mask(f32::from(quarters) / 4.);
        window.map_or(drop.clone(), |(full, start)| drop.window(&full, &start))
    });
    let last_dtype = prop::option::of(dtype());
    (prop::sample::select(&OPS), dims.clone(), prop::option::of(dims), dtype(), last_dtype, drop)
        .prop_map(|(op, dims, last_dims, dtype, last_dtype, drop)| Call {
            op,
            dims,
            last_dims,
            dtype,
            last_dtype: last_dtype.unwrap_or(dtype),
            drop,
        })
}

#[test]
fn a_call_succeeds_or_fails_but_never_panics() {
    let config = ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() };
    let successes = Cell::new(0);
    let outcome = TestRunner::new(config).run(&call(), |call| {
        let Call { op, dims, last_dims, dtype, last_dtype, drop } = call;
        let mut shapes = op.arguments(&dims);
        let last = shapes.len() - 1;
        if let (Some(last_dims), 1..) = (last_dims, last) {
            shapes[last] = last_dims;
        }
        let dtype = |i: usize| if i > 0 && i == last { last_dtype } else { dtype };
        let ones = |(i, dims): (usize, &Vec<usize>)| {
            Var::ones(dims.as_slice(), dtype(i), &Device::Cpu).unwrap()
        };
        let vars: Vec<_> = shapes.iter().enumerate().map(ones).collect();
        let args: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        if let Ok(y) = op.fused(&args, &drop) {
            // If no sample is kept, x need not go with the residual, which alone shapes the output.
            let shaping = if op == Op::DropPathKept { &shapes[last] } else { &dims };
            prop_assert_eq!(y.dims(), op.output(shaping));
            let grads = y.backward().unwrap();
            for var in &vars {
                prop_assert_eq!(grads.get(var).unwrap().dims(), var.dims());
            }
            successes.set(successes.get() + 1);
        }
        Ok(())
    });
    outcome.unwrap();
    assert!(successes.get() > 100, "only {} calls succeeded", successes.get());
}

// ---- size ----

/// About 9 GB of memory.
#[test]
#[ignore = "needs 9 GB of memory"]
fn tensors_of_more_than_2_to_the_31_elements_draw_the_mask_of_their_rows() -> Result<()> {
    let (rows, cols) = ((1 << 21) + 3, 1024);
    let x = Tensor::ones((rows, cols), DType::F16, &Device::Cpu)?;
    let drop = mask(0.1);
    let end = drop.window(&[rows, cols], &[rows - 7, 0]).to_tensor((7, cols), &Device::Cpu)?;
    let y = dropout(&x, &drop)?;
    same_bits(&y.narrow(0, rows - 7, 7)?.ne(0.)?, &end, "dropout")?;
    std::mem::drop(y);
    let y = dropout_add(&x, &x, None, &drop)?;
    same_bits(&y.narrow(0, rows - 7, 7)?.gt(1.)?, &end, "dropout_add")?;
    std::mem::drop(y);
    let y = softmax_dropout(&x, 1., &AttentionMask::None, &drop)?;
    same_bits(&y.narrow(0, rows - 7, 7)?.ne(0.)?, &end, "softmax_dropout")
}

#[test]
fn a_key_of_probability_0_passes_nothing_on_whatever_arrives_there() -> Result<()> {
    let scores = Var::new(&[[1f32, 2., 3.], [4., 5., 6.], [7., 8., 9.]], &Device::Cpu)?;
    let poison = [[0.5f32, f32::INFINITY, f32::NAN], [1., -2., f32::NEG_INFINITY], [1., 2., 3.]];
    let clean = [[0.5f32, 0., 0.], [1., -2., 0.], [1., 2., 3.]];
    let blind = Tensor::full(f32::NEG_INFINITY, (3, 3), &Device::Cpu)?;
    let gradient = |attention: &AttentionMask, dy: [[f32; 3]; 3]| -> Result<Vec<Vec<f32>>> {
        let y = softmax_dropout(&scores, 0.7, attention, &mask(0.))?;
        let loss = (y * Tensor::new(&dy, &Device::Cpu)?)?;
        let grads = loss.backward()?;
        grads.get(&scores).expect("a gradient").to_vec2()
    };
    let causal = gradient(&AttentionMask::Causal, clean)?;
    assert_eq!(gradient(&AttentionMask::Causal, poison)?, causal);
    let zeros = vec![vec![0.; 3]; 3];
    assert_eq!(gradient(&AttentionMask::Additive(blind), poison)?, zeros);
    Ok(())
}

#[test]
fn at_p_1_even_nan_scores_get_zero_gradients() -> Result<()> {
    let scores = Var::new(&[[f32::NAN, 1., 2.], [f32::INFINITY, 0., 1.]], &Device::Cpu)?;
    let additive = Var::new(&[[f32::NAN, 0., f32::NEG_INFINITY]], &Device::Cpu)?;
    for attention in [AttentionMask::None, AttentionMask::Additive(additive.as_tensor().clone())] {
        let y = softmax_dropout(&scores, 1., &attention, &mask(1.))?;
        assert_eq!(y.to_vec2::<f32>()?, [[0.; 3]; 2]);
        let grads = y.backward()?;
        assert_eq!(grads.get(&scores).expect("a gradient").to_vec2::<f32>()?, [[0.; 3]; 2]);
        if let AttentionMask::Additive(_) = attention {
            assert_eq!(grads.get(&additive).expect("a gradient").to_vec2::<f32>()?, [[0.; 3]]);
        }
    }
    Ok(())
}

#[test]
fn a_window_of_a_whole_with_too_many_rows_is_refused() {
    let x = Tensor::zeros((1, 1, 1, 8), DType::F32, &Device::Cpu).unwrap();
    let drop = mask(0.5).window(&[1 << 20, 1 << 40, 1 << 30, 8], &[0; 4]);
    let error = dropout(&x, &drop).unwrap_err().to_string();
    assert!(error.contains("dropout: drop.window: expected at most 2^64 rows"), "{error}");
}
