//! What does not fit is refused, in words that help, and nothing panics.

use std::cell::Cell;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{
    AttentionMask, RopeStyle, StochasticDepth, drop_path_add, dropout, dropout_add, expect_dims,
    rope, softmax_dropout,
};
use candle_dropout::{DropMask, compose};
use cases::runner::fused;
use cases::{Case, mask, random};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

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
    case: &'static dyn Case,
    size: Vec<usize>,
    /// The shape of the last argument, if not the one that fits.
    last_dims: Option<Vec<usize>>,
    dtype: DType,
    last_dtype: DType,
    drop: DropMask,
    /// As on a device without kernels.
    composed: bool,
}

#[test]
fn tables_and_layouts_that_others_use_are_told_what_to_take() -> Result<()> {
    let x = random(&[2, 4, 6, 8], DType::F32, 1)?;
    let table = |dims: &[usize]| random(dims, DType::F32, 2);
    let rotated = |dims: &[usize], style| rope(&x, &table(dims)?, &table(dims)?, style);
    fails(
        rotated(&[6, 8], RopeStyle::HalfSplit),
        &[
            "rope: cos: expected shape [T, D/2] = [6, 4]",
            "got [6, 8]",
            "take the first half, narrow(D::Minus1, 0, D/2)",
        ],
    );
    fails(rotated(&[2, 6, 8], RopeStyle::HalfSplit), &["got [2, 6, 8]", "take the first half"]);
    fails(rotated(&[6, 8], RopeStyle::Interleaved), &["got [6, 8]", "take every second column"]);
    fails(
        rotated(&[9, 4], RopeStyle::HalfSplit),
        &["got [9, 4]", "narrow(D::Minus2, first_position, T)"],
    );
    // The remedies work.
    let full = Tensor::cat(&[&table(&[6, 4])?, &table(&[6, 4])?], 1)?;
    let half = full.narrow(D::Minus1, 0, 4)?;
    rope(&x, &half, &half, RopeStyle::HalfSplit)?;

    let named = [("B", 2), ("H", 6), ("S", 4), ("D", 8)];
    let error = expect_dims("q", &x, &named).unwrap_err().to_string();
    let expected = "q: expected [B 2, H 6, S 4, D 8], got [2, 4, 6, 8]; transpose(1, 2) it";
    assert!(error.starts_with(expected), "{error}");
    expect_dims("q", &x.transpose(1, 2)?, &named)?;
    for dims in [&[2, 4, 48][..], &[2, 5, 6, 8], &[]] {
        let error = expect_dims("q", &table(dims)?, &named).unwrap_err().to_string();
        assert!(error.contains("reshape it, or look where it comes from"), "{error}");
    }
    for dims in [[4, 2], [1, 4], [2, 3]] {
        let mask = AttentionMask::per_key(&table(&dims)?, 2, 4).map(|_| x.clone());
        fails(mask, &["AttentionMask::per_key: mask: expected [B 2, Sk 4], got"]);
    }
    Ok(())
}

#[test]
fn a_mask_of_keys_is_none_of_queries_where_the_sizes_are_equal() -> Result<()> {
    // Two sequences of two tokens: [B, Sk] as it is would be [Sq, Sk].
    let scores = random(&[2, 3, 2, 2], DType::F64, 1)?;
    let mask = Tensor::new(&[[0f64, 0.], [0., f64::NEG_INFINITY]], &Device::Cpu)?;
    let per_key = AttentionMask::per_key(&mask, 2, 2)?;
    let y = softmax_dropout(&scores, 1., &per_key, &DropMask::none())?;
    let y = y.flatten_to(2)?.to_vec2::<f64>()?;
    assert!(
        y[..6].iter().all(|row| row.iter().all(|p| *p > 0.)),
        "the first sequence sees both keys"
    );
    assert!(y[6..].iter().all(|row| row == &[1., 0.]), "the second sees one");
    Ok(())
}

fn call() -> impl Strategy<Value = Call> {
    let dims = prop::collection::vec(0usize..4, 0..6);
    let cases: Vec<_> = cases::cases().collect();
    let dtype = || prop::sample::select(vec![DType::F32, DType::F64, DType::BF16, DType::I64]);
    let full = prop::collection::vec(0usize..6, 0..6);
    let window = prop::option::of((full, prop::collection::vec(0usize..3, 0..6)));
    let drop = (0u8..5, window).prop_map(|(quarters, window)| {
        let drop = mask(f32::from(quarters) / 4.);
        window.map_or(drop.clone(), |(full, start)| drop.window(&full, &start))
    });
    let last_dtype = prop::option::of(dtype());
    let last_dims = prop::option::of(dims.clone());
    let composed = prop::bool::ANY;
    (prop::sample::select(cases), dims, last_dims, dtype(), last_dtype, drop, composed).prop_map(
        |(case, size, last_dims, dtype, last_dtype, drop, composed)| Call {
            case,
            size,
            last_dims,
            dtype,
            last_dtype: last_dtype.unwrap_or(dtype),
            drop,
            composed,
        },
    )
}

#[test]
fn a_call_succeeds_or_fails_but_never_panics() {
    let config = ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() };
    let successes = Cell::new(0);
    let outcome = TestRunner::new(config).run(&call(), |call| {
        let Call { case, size, last_dims, dtype, last_dtype, drop, composed } = call;
        let _composed = composed.then(compose);
        let mut shapes = case.arguments(&size);
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
        if let Ok(y) = fused(case, &size, &args, &drop) {
            prop_assert_eq!(y.dims(), case.output(&shapes));
            let grads = y.backward().unwrap();
            for var in vars.iter().filter(|_| case.takes(&size)) {
                prop_assert_eq!(grads.get(var).unwrap().dims(), var.dims());
            }
            successes.set(successes.get() + 1);
        }
        Ok(())
    });
    outcome.unwrap();
    assert!(successes.get() > 100, "only {} calls succeeded", successes.get());
}
