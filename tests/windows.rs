//! A part of a tensor with its window draws its part of the mask, however large the whole is.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{AttentionMask, dropout, dropout_add, softmax_dropout};
use cases::runner::{arguments, fused, gradient, same_bits};
use cases::softmax_dropout::SCALE;
use cases::{Case, mask, random};

fn case(name: &str) -> &'static dyn Case {
    cases::cases().find(|case| case.name() == name).expect("a case")
}

/// Asserts that a call on the parts along `dim`, each with its window, gives the whole and its gradient,
/// bit for bit.
fn parts_equal_the_whole(
    case: &dyn Case,
    size: &[usize],
    dim: usize,
    cuts: &[usize],
) -> Result<()> {
    let drop = mask(0.4);
    let vars = arguments(case, size, DType::F32)?
        .iter()
        .map(Var::from_tensor)
        .collect::<Result<Vec<_>>>()?;
    let dy = random(size, DType::F32, 9)?;
    let args: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let whole = fused(case, size, &args, &drop)?;
    let ends = cuts.iter().copied().chain([size[dim]]);
    let parts = [0].iter().chain(cuts).zip(ends).map(|(&from, to)| {
        let part = |x: &Tensor| match (x.rank() == size.len(), dim + 1 == size.len()) {
            (true, _) => x.narrow(dim, from, to - from),
            (false, true) => x.narrow(0, from, to - from),
            (false, false) => Ok(x.clone()),
        };
        let (mut part_size, mut start) = (size.to_vec(), vec![0; size.len()]);
        (part_size[dim], start[dim]) = (to - from, from);
        let args = args.iter().map(part).collect::<Result<Vec<_>>>()?;
        fused(case, &part_size, &args, &case.window(&drop, size, &start))
    });
    let parts = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, dim)?;
    let what = format!("{case:?} {size:?} split in dimension {dim}");
    same_bits(&parts, &whole, &what)?;
    same_bits(&gradient(&parts, &dy, &vars[0])?, &gradient(&whole, &dy, &vars[0])?, &what)
}

#[test]
fn a_split_op_equals_the_unsplit_op() -> Result<()> {
    for case in ["dropout", "dropout_add", "dropout_add_bias"].map(case) {
        parts_equal_the_whole(case, &[4, 6, 33], 0, &[1, 3])?;
        parts_equal_the_whole(case, &[3, 10, 33], 1, &[1, 4])?;
        parts_equal_the_whole(case, &[3, 10, 33], 2, &[3])?;
        parts_equal_the_whole(case, &[2, 6, 5, 19], 1, &[2, 4])?;
        parts_equal_the_whole(case, &[2, 3, 1200], 2, &[3, 600])?;
        parts_equal_the_whole(case, &[8, 50, 129], 1, &[7])?;
    }
    for case in ["softmax_dropout", "softmax_dropout_additive"].map(case) {
        parts_equal_the_whole(case, &[4, 6, 5, 19], 0, &[1, 3])?;
        parts_equal_the_whole(case, &[2, 6, 5, 19], 1, &[2, 4])?;
        parts_equal_the_whole(case, &[2, 6, 5, 19], 2, &[3])?;
    }
    let causal = case("softmax_dropout_causal");
    parts_equal_the_whole(causal, &[4, 6, 5, 19], 0, &[1, 3])?;
    parts_equal_the_whole(causal, &[2, 6, 5, 19], 1, &[2, 4])?;
    parts_equal_the_whole(case("drop_path_add"), &[13, 3, 5], 0, &[3, 8])
}

#[test]
fn attention_to_keys_from_the_third_on_draws_their_columns() -> Result<()> {
    let drop = mask(0.4).window(&[2, 3, 5, 22], &[0, 0, 0, 3]);
    let scores = random(&[2, 3, 5, 19], DType::F32, 1)?;
    let y = softmax_dropout(&scores, SCALE, &AttentionMask::None, &drop)?;
    let whole = mask(0.4).to_tensor((2, 3, 5, 22), &Device::Cpu)?;
    same_bits(&y.ne(0.)?, &whole.narrow(3, 3, 19)?, "mask")
}

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
fn a_window_of_a_whole_with_too_many_rows_is_refused() {
    let x = Tensor::zeros((1, 1, 1, 8), DType::F32, &Device::Cpu).unwrap();
    let drop = mask(0.5).window(&[1 << 20, 1 << 40, 1 << 30, 8], &[0; 4]);
    let error = dropout(&x, &drop).unwrap_err().to_string();
    assert!(error.contains("dropout: drop.window: expected at most 2^64 rows"), "{error}");
}
