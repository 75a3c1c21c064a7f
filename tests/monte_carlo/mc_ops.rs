//! Passes of ops.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{AttentionMask, softmax_dropout};
use candle_dropout::{DropMask, Dropout, McDropout, compose};
use cases::runner::{arguments, fused, gradient, judged, same_bits};
use cases::{Case, random};

use crate::{SEED, generator, key};

const TIMES: usize = 2;
const BATCH: usize = 7;
const FIRST: usize = 5;

/// The part of pass `t`, of a tensor with the batch in its first dimension.
fn part(x: &Tensor, t: usize) -> Result<Tensor> {
    match x.dims() {
        [len, ..] if *len == TIMES * BATCH => x.narrow(0, t * BATCH, BATCH),
        _ => Ok(x.clone()),
    }
}

/// An op on all passes at once, and pass by pass with an ordinary mask: outputs and all gradients.
fn passes_of_an_op_are_plain_calls(case: &dyn Case, drop_p: f32, dtype: DType) -> Result<()> {
    // No other size is that of the repeated batch.
    let mut size = case.fitting(&[TIMES * BATCH, 3, 5, 6]);
    size[0] = TIMES * BATCH;
    assert!(case.takes(&size), "{case:?}");
    let vars = arguments(case, &size, dtype)?;
    let vars = vars.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let args: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let constants = case.constants(&size, dtype, &Device::Cpu)?;

    let layer = Dropout::with_generator(drop_p, generator())?;
    let x = Tensor::zeros((BATCH, 1), DType::F32, &Device::Cpu)?;
    let mc = McDropout::new(TIMES, SEED)?;
    let prediction = mc.predict(&x, FIRST, |_, train| {
        judged(case.fused(&args, &constants, &layer.next_mask(train)?)?)
    })?;
    let y = prediction.samples().flatten(0, 1)?;

    let mut whole = size.clone();
    whole[0] = FIRST + BATCH;
    let mut start = vec![0; size.len()];
    start[0] = FIRST;
    let plain = (0..TIMES).map(|t| {
        let drop = DropMask::new(drop_p, key(0, t))?;
        // A mask that all samples share has no part of theirs.
        let drop = match case.mask_dims(&whole) == case.mask_dims(&size) {
            true => drop,
            false => case.window(&drop, &whole, &start),
        };
        let of_pass = |xs: &[Tensor]| xs.iter().map(|x| part(x, t)).collect::<Result<Vec<_>>>();
        judged(case.fused(&of_pass(&args)?, &of_pass(&constants)?, &drop)?)
    });
    let plain = Tensor::cat(&plain.collect::<Result<Vec<_>>>()?, 0)?;
    let what = format!("{case:?} at {drop_p} in {dtype:?}");
    same_bits(&y, &plain, &what)?;
    let dy = random(y.dims(), dtype, 9)?;
    for (at, var) in vars.iter().enumerate() {
        let gradients = [gradient(&y, &dy, var)?, gradient(&plain, &dy, var)?];
        same_bits(&gradients[0], &gradients[1], &format!("{what}, gradient {at}"))?;
    }
    Ok(())
}

/// A plain call counts over all samples: what is refused, and blocks whose scale is that of each sample in passes.
fn mixes_samples(case: &str) -> bool {
    case == "column_sums" || case.starts_with("drop_block") && case != "drop_block_unscaled"
}

#[test]
fn pass_t_of_every_op_is_a_plain_call_with_draw_t() -> Result<()> {
    let dropping = |case: &&dyn Case| case.mask_dims(&[4, 3, 5, 6]).is_some();
    let cases: Vec<_> =
        cases::cases().filter(dropping).filter(|case| !mixes_samples(case.name())).collect();
    assert!(cases.len() > 20, "{cases:?}");
    for case in cases {
        for (drop_p, dtype) in
            [(0., DType::F32), (0.4, DType::F32), (0.4, DType::BF16), (1., DType::F64)]
        {
            passes_of_an_op_are_plain_calls(case, drop_p, dtype)?;
        }
        let _composed = compose();
        passes_of_an_op_are_plain_calls(case, 0.4, DType::F32)?;
    }
    Ok(())
}

#[test]
fn an_additive_mask_of_samples_is_cut_and_one_of_heads_is_not() -> Result<()> {
    let scores = random(&[TIMES * BATCH, 3, 5, 6], DType::F32, 1)?;
    let layer = Dropout::with_generator(0.4, generator())?;
    for dims in [&[TIMES * BATCH, 1, 1, 6][..], &[1, 3, 5, 6], &[3, 5, 6]] {
        let additive = random(dims, DType::F32, 2)?;
        let x = Tensor::zeros((BATCH, 1), DType::F32, &Device::Cpu)?;
        let prediction = McDropout::new(TIMES, SEED)?.predict(&x, 0, |_, train| {
            let mask = AttentionMask::Additive(additive.clone());
            softmax_dropout(&scores, 1., &mask, &layer.next_mask(train)?)
        })?;
        for t in 0..TIMES {
            let mask = AttentionMask::Additive(part(&additive, t)?);
            let drop = DropMask::new(0.4f32, key(0, t))?;
            let plain = softmax_dropout(&part(&scores, t)?, 1., &mask, &drop)?;
            same_bits(&prediction.samples().get(t)?, &plain, &format!("{dims:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn the_mask_of_all_passes_is_theirs_one_after_the_other() -> Result<()> {
    let case = cases::cases().find(|case| case.name() == "dropout").expect("a case");
    let (x, layer) = (Tensor::ones((2, 9), DType::F32, &Device::Cpu)?, Dropout::new(0.5));
    McDropout::new(3, SEED)?.predict(&x, 4, |xs, train| {
        let drop = layer.next_mask(train)?;
        let keep = drop.to_tensor(xs.shape(), &Device::Cpu)?;
        let y = fused(case, &[6, 9], std::slice::from_ref(xs), &drop)?;
        same_bits(&keep, &y.ne(0.)?, "mask")?;
        Ok(y)
    })?;
    Ok(())
}
