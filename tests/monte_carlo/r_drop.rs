use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{CrossEntropyConfig, Reduction, cross_entropy, dropout};
use candle_dropout::training::{r_drop_forward, r_drop_loss};
use candle_dropout::{DropMask, Dropout, MaskGenerator, MaskKey};
use cases::random;
use cases::runner::same_bits;

use crate::message;

const ALPHA: f64 = 3.;

fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<_> = logits.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|x| x / sum).collect()
}

fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum()
}

/// The loss as the authors' code has it, row by row, and its gradient with respect to the first logits.
fn naive(logits: [&[Vec<f64>]; 2], targets: &[i64], alpha: f64, mean: bool) -> (f64, Vec<f64>) {
    let count = targets.iter().filter(|target| **target != -100).count().max(1);
    let weight = if mean { 1. / count as f64 } else { 1. };
    let (mut loss, mut grads) = (0., Vec::new());
    for (row, &target) in targets.iter().enumerate() {
        let [p, q] = logits.map(|logits| softmax(&logits[row]));
        if target == -100 {
            grads.extend(p.iter().map(|_| 0.));
            continue;
        }
        let at = target as usize;
        let ce = -(p[at].ln() + q[at].ln()) / 2.;
        loss += weight * (ce + alpha * (kl(&p, &q) + kl(&q, &p)) / 2.);
        let divergence = kl(&p, &q);
        grads.extend((0..p.len()).map(|c| {
            let of_ce = (p[c] - f64::from(u8::from(c == at))) / 2.;
            let of_kl = p[c] * ((p[c] / q[c]).ln() - divergence) + p[c] - q[c];
            weight * (of_ce + alpha * of_kl / 2.)
        }));
    }
    (loss, grads)
}

#[test]
fn loss_and_gradients_are_those_of_the_formula() -> Result<()> {
    let targets = [1i64, -100, 0, 3, 3];
    let targets_tensor = Tensor::new(&targets, &Device::Cpu)?;
    for (dtype, bound) in
        [(DType::F64, 1e-12), (DType::F32, 2e-6), (DType::F16, 5e-3), (DType::BF16, 4e-2)]
    {
        for reduction in [Reduction::Mean, Reduction::Sum] {
            let config = CrossEntropyConfig { reduction, ..Default::default() };
            let vars = [1, 2].map(|seed| Var::from_tensor(&random(&[5, 4], dtype, seed)?));
            let [a, b] = vars;
            let (a, b) = (a?, b?);
            let loss = r_drop_loss(&a, &b, &targets_tensor, ALPHA, &config)?;
            let rows = |x: &Tensor| x.to_dtype(DType::F64)?.to_vec2::<f64>();
            let (rows_a, rows_b) = (rows(&a)?, rows(&b)?);
            let mean = reduction == Reduction::Mean;
            let grads = loss.backward()?;
            for (var, logits) in [(&a, [&rows_a[..], &rows_b]), (&b, [&rows_b, &rows_a])] {
                let (expected, slopes) = naive(logits, &targets, ALPHA, mean);
                let got = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                assert!(
                    (got - expected).abs() < bound * expected.abs(),
                    "{dtype:?}: {got}, {expected}"
                );
                let grad = grads.get(var).expect("a gradient").to_dtype(DType::F64)?;
                for (got, slope) in grad.flatten_all()?.to_vec1::<f64>()?.iter().zip(slopes) {
                    assert!(
                        (got - slope).abs() < bound * slope.abs().max(1.),
                        "{dtype:?}: {got}, {slope}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn passes_that_agree_have_the_cross_entropy_alone_and_far_logits_are_finite() -> Result<()> {
    let config = CrossEntropyConfig::default();
    let targets = Tensor::new(&[1u32, 0], &Device::Cpu)?;
    let logits = random(&[2, 3], DType::F32, 1)?;
    let ce = cross_entropy(&logits, &targets, &config)?;
    same_bits(&r_drop_loss(&logits, &logits, &targets, 5., &config)?, &ce, "agree")?;
    let others = random(&[2, 3], DType::F32, 2)?;
    let without = r_drop_loss(&logits, &others, &targets, 0., &config)?.to_scalar::<f32>()?;
    let mean = (ce + cross_entropy(&others, &targets, &config)?)?.to_scalar::<f32>()? / 2.;
    assert!((without - mean).abs() < 1e-6);

    // Passes that are sure of different classes: KL is the distance of their logits, 1e4 each way.
    let first = Var::new(&[[1e4f32, 0.], [0., 0.]], &Device::Cpu)?;
    let second = Var::new(&[[0f32, 1e4], [0., 0.]], &Device::Cpu)?;
    let loss = r_drop_loss(&first, &second, &targets, 1., &config)?;
    let expected = (5e3 + 1e4 + 2f32.ln()) / 2.;
    assert!((loss.to_scalar::<f32>()? - expected).abs() < 1e-2);
    let grads = loss.backward()?;
    for var in [&first, &second] {
        let grad = grads.get(var).expect("a gradient").flatten_all()?.to_vec1::<f32>()?;
        assert!(grad.iter().all(|x| x.is_finite()), "{grad:?}");
    }

    // What is ignored counts nothing whatever it holds; if all is, the loss is 0.
    let ignored = Tensor::new(&[-100i64, 0], &Device::Cpu)?;
    let bad = Tensor::new(&[[f32::NAN, f32::INFINITY], [1., 0.]], &Device::Cpu)?;
    assert!(r_drop_loss(&bad, &second, &ignored, 1., &config)?.to_scalar::<f32>()?.is_finite());
    let all = Tensor::new(&[-100i64, -100], &Device::Cpu)?;
    assert_eq!(r_drop_loss(&first, &second, &all, 1., &config)?.to_scalar::<f32>()?, 0.);
    Ok(())
}

#[test]
fn tokens_and_label_smoothing_go_to_the_cross_entropy() -> Result<()> {
    let config = CrossEntropyConfig { label_smoothing: 0.1, ..Default::default() };
    let [a, b] = [1, 2].map(|seed| random(&[2, 3, 5], DType::F32, seed));
    let (a, b) = (a?, b?);
    let targets = Tensor::new(&[[0u32, 1, 2], [3, 4, 0]], &Device::Cpu)?;
    let smoothed = r_drop_loss(&a, &b, &targets, 2., &config)?.to_scalar::<f32>()?;
    let plain = CrossEntropyConfig::default();
    let kl =
        (r_drop_loss(&a, &b, &targets, 2., &plain)? - r_drop_loss(&a, &b, &targets, 0., &plain)?)?;
    let ce = r_drop_loss(&a, &b, &targets, 0., &config)?;
    assert!((smoothed - (ce + kl)?.to_scalar::<f32>()?).abs() < 1e-5);
    Ok(())
}

#[test]
fn one_forward_of_the_batch_beside_itself_has_two_masks_of_one_key() -> Result<()> {
    let generator = Arc::new(MaskGenerator::new(7));
    let layer = Dropout::with_generator(0.5, generator.clone())?;
    let x = random(&[3, 8], DType::F32, 1)?;
    let [first, second] = r_drop_forward(&x, |xs| layer.forward(xs, true))?;
    let drop = DropMask::new(0.5, MaskKey::derive(7, 0))?;
    same_bits(&first, &dropout(&x, &drop.window(&[6, 8], &[0, 0]))?, "first")?;
    same_bits(&second, &dropout(&x, &drop.window(&[6, 8], &[3, 0]))?, "second")?;
    assert_eq!(generator.state().counter, 1);
    Ok(())
}

#[test]
fn bad_arguments_are_refused() -> Result<()> {
    let config = CrossEntropyConfig::default();
    let (a, targets) = (random(&[2, 3], DType::F32, 1)?, Tensor::new(&[1u32, 0], &Device::Cpu)?);
    let loss = |others: &Tensor, alpha| message(r_drop_loss(&a, others, &targets, alpha, &config));
    for alpha in [-1., f64::NAN, f64::INFINITY] {
        let error = loss(&a, alpha);
        assert!(
            error.starts_with("r_drop: alpha: expected a finite number of at least 0"),
            "{error}"
        );
    }
    let error = loss(&a.narrow(1, 0, 2)?, 1.);
    assert!(error.starts_with("r_drop: others: expected shape [2, 3] like logits"), "{error}");
    let error = loss(&a.to_dtype(DType::F16)?, 1.);
    assert!(error.starts_with("r_drop: others: expected dtype F32 like logits"), "{error}");
    let error = message(r_drop_loss(&targets, &targets, &targets, 1., &config));
    assert!(error.starts_with("r_drop: logits: expected dtype f32"), "{error}");
    let error = message(r_drop_loss(&a, &a, &targets.narrow(0, 0, 1)?, 1., &config));
    assert!(error.starts_with("cross_entropy: targets: expected shape [2]"), "{error}");
    let error = message(r_drop_forward(&a.sum_all()?, |xs| Ok(xs.clone())));
    assert!(error.starts_with("r_drop: x: expected a batch"), "{error}");
    let error = message(r_drop_forward(&a, |xs| xs.narrow(0, 0, 2)));
    assert!(error.starts_with("r_drop: model: expected results for twice 2 samples"), "{error}");
    Ok(())
}
