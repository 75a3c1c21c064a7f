use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{CrossEntropyConfig, cross_entropy, dropout};
use candle_dropout::{DropMask, MaskGenerator, MaskKey, MultiSampleDropout};
use cases::runner::{gradient, same_bits};
use cases::{bits, random};

use crate::message;

#[test]
fn it_is_the_mean_of_the_head_over_the_draws_of_one_key() -> Result<()> {
    let generator = Arc::new(MaskGenerator::new(3));
    let layer = MultiSampleDropout::new(0.5, 4, generator.clone())?;
    let x = Var::from_tensor(&random(&[5, 6], DType::F32, 1)?)?;
    let weight = Var::from_tensor(&random(&[6, 3], DType::F32, 2)?)?;
    let dy = random(&[5, 3], DType::F32, 3)?;
    for call in 0..3 {
        let y = layer.forward(&x, true, |x| x.matmul(&weight))?;
        let key = MaskKey::derive(3, call);
        let of_sample = |k| dropout(&x, &DropMask::new(0.5, key.draw(k))?)?.matmul(&weight);
        let mean = ((((of_sample(0)? + of_sample(1)?)? + of_sample(2)?)? + of_sample(3)?)? / 4.)?;
        same_bits(&y, &mean, "output")?;
        for var in [&x, &weight] {
            same_bits(&gradient(&y, &dy, var)?, &gradient(&mean, &dy, var)?, "gradient")?;
        }
        assert_eq!(generator.state().counter, call + 1, "one key a call");
    }
    let y = layer.forward(&x, false, |x| x.matmul(&weight))?;
    same_bits(&y, &x.matmul(&weight)?, "evaluation")?;
    assert_eq!(generator.state().counter, 3, "none in evaluation");
    Ok(())
}

#[test]
fn losses_are_averaged_as_in_the_paper() -> Result<()> {
    let layer = MultiSampleDropout::new(0.3, 8, Arc::new(MaskGenerator::new(3)))?;
    let (logits, targets) =
        (random(&[5, 4], DType::F32, 1)?, Tensor::new(&[0u32, 1, 2, 3, 0], &Device::Cpu)?);
    let loss = |x: &Tensor| cross_entropy(x, &targets, &CrossEntropyConfig::default());
    let mean = layer.forward(&logits, true, loss)?.to_scalar::<f32>()?;
    let of_samples = (0..8).map(|k| {
        let drop = DropMask::new(0.3f32, MaskKey::derive(3, 0).draw(k))?;
        loss(&dropout(&logits, &drop)?)?.to_scalar::<f32>()
    });
    let of_samples = of_samples.collect::<Result<Vec<_>>>()?;
    assert!((mean - of_samples.iter().sum::<f32>() / 8.).abs() < 1e-6);
    Ok(())
}

#[test]
fn more_samples_have_less_variance_and_the_same_mean() -> Result<()> {
    let x = Tensor::ones((64, 64), DType::F64, &Device::Cpu)?;
    for samples in [1, 2, 8] {
        let layer = MultiSampleDropout::new(0.5, samples, Arc::new(MaskGenerator::new(3)))?;
        let y = layer.forward(&x, true, |x| Ok(x.clone()))?.flatten_all()?.to_vec1::<f64>()?;
        let (n, k) = (y.len() as f64, samples as f64);
        let mean = y.iter().sum::<f64>() / n;
        assert!((mean - 1.).abs() < 5. / (n * k).sqrt(), "{mean}");
        // A binomial count of k, as 2 / k each: variance 1 / k, fourth moment (3 - 2 / k) / k².
        let variance = y.iter().map(|y| (y - 1.).powi(2)).sum::<f64>() / n;
        let sigma = ((2. - 2. / k) / (k * k) / n).sqrt();
        assert!((variance - 1. / k).abs() <= 5. * sigma + 1e-12, "{samples}: {variance}");
    }
    Ok(())
}

#[test]
fn bad_arguments_are_refused_and_rates_of_0_and_1_are_exact() -> Result<()> {
    let generator = Arc::new(MaskGenerator::new(3));
    let new = |drop_p: f64, samples| MultiSampleDropout::new(drop_p, samples, generator.clone());
    for drop_p in [-0.1, 1.1, f64::NAN] {
        let error = message(new(drop_p, 8));
        assert!(
            error.starts_with("multi_sample_dropout: drop_p: expected a probability"),
            "{error}"
        );
    }
    assert!(message(new(0.5, 0)).starts_with("multi_sample_dropout: samples: expected at least 1"));
    let x = random(&[3, 4], DType::F32, 1)?;
    same_bits(&new(0., 4)?.forward(&x, true, |x| Ok(x.clone()))?, &x, "p = 0")?;
    assert_eq!(bits(&new(1., 4)?.forward(&x, true, |x| Ok(x.clone()))?)?, [0; 12]);
    let mut layer = new(0.5, 4)?;
    layer.set_drop_p(0.25)?;
    assert_eq!((layer.drop_p(), layer.samples()), (0.25, 4));
    Ok(())
}
