//! Logits that are far from 0 and near one another.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{CrossEntropyConfig, Reduction, cross_entropy};
use cases::random;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::{run, smoothed};

/// The gradient of a row of the sum, in f64.
fn row_gradient(
    logits: &[f32],
    target: u32,
    label_smoothing: f64,
    dtype: DType,
) -> Result<Vec<f64>> {
    let reduction = Reduction::Sum;
    let config = CrossEntropyConfig { label_smoothing, reduction, ..Default::default() };
    let logits =
        Var::from_tensor(&Tensor::new(logits, &Device::Cpu)?.unsqueeze(0)?.to_dtype(dtype)?)?;
    let loss = cross_entropy(&logits, &Tensor::new(&[target], &Device::Cpu)?, &config)?;
    let grads = loss.backward()?;
    grads.get(&logits).expect("a gradient").to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

#[test]
fn equal_logits_have_equal_probabilities_however_large() -> Result<()> {
    for value in [6e4f32, -6e4, 1e8, 1e30] {
        let gradient = row_gradient(&[value; 3], 0, 0., DType::F32)?;
        for (got, expected) in gradient.iter().zip([-2. / 3., 1. / 3., 1. / 3.]) {
            assert!((got - expected).abs() < 1e-7, "{value}: {gradient:?}");
        }
        assert_eq!(row_gradient(&[value; 4], 0, 0., DType::F32)?, [-0.75, 0.25, 0.25, 0.25]);
    }
    Ok(())
}

/// A row of logits that have much in common; its `Debug` is what a failure prints.
#[derive(Clone, Debug)]
struct FarRow {
    classes: usize,
    /// What they have in common, and how far they lie apart.
    offset: f64,
    spread: f64,
    /// They rise along the row, so that its maximum grows from block to block.
    rises: bool,
    label_smoothing: f64,
    seed: u64,
}

fn far_row() -> impl Strategy<Value = FarRow> {
    let offset = prop_oneof![Just(0.), (-2f64..30.).prop_map(|power| 10f64.powf(power))];
    let offset = (any::<bool>(), offset).prop_map(|(negative, x)| if negative { -x } else { x });
    let classes = prop_oneof![1usize..100, 1usize..5000, 30_000usize..60_000];
    let spread = prop_oneof![Just(0.), (-3f64..2.).prop_map(|power| 10f64.powf(power))];
    let smoothing = prop_oneof![Just(0.), Just(1.), 0f64..1.];
    (classes, offset, spread, any::<bool>(), smoothing, any::<u64>()).prop_map(
        |(classes, offset, spread, rises, label_smoothing, seed)| FarRow {
            classes,
            offset,
            spread,
            rises,
            label_smoothing,
            seed,
        },
    )
}

#[test]
fn the_gradient_of_a_row_sums_to_0_at_any_offset_and_is_that_of_f64() {
    let config = ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() };
    let outcome = TestRunner::new(config).run(&far_row(), |row| {
        let FarRow { classes, offset, spread, rises, label_smoothing, seed } = row;
        let mut apart: Vec<f32> = random(&[classes], DType::F32, seed).unwrap().to_vec1().unwrap();
        if rises {
            apart.sort_unstable_by(f32::total_cmp);
        }
        let target = (seed % classes as u64) as u32;
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let logits: Vec<f32> =
                apart.iter().map(|x| (offset + spread * f64::from(*x)) as f32).collect();
            // Rounded to the dtype, of which f16 has no numbers beyond 65504.
            let rounded = Tensor::new(logits, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let logits: Vec<f32> = rounded.to_dtype(DType::F32).unwrap().to_vec1().unwrap();
            if logits.iter().any(|x| x.is_infinite()) {
                continue;
            }
            let got = row_gradient(&logits, target, label_smoothing, dtype).unwrap();
            let wide: Vec<f64> = logits.iter().map(|x| f64::from(*x)).collect();
            let max = wide.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = wide.iter().map(|x| (x - max).exp()).sum();
            let uniform = label_smoothing / classes as f64;
            // What the dtype rounds by, of normal numbers and of others.
            let (unit, least) = match dtype {
                DType::F16 => (0.5f64.powi(11), 0.5f64.powi(25)),
                DType::BF16 => (0.5f64.powi(8), f64::from(f32::MIN_POSITIVE)),
                // The exponentials of f32 end with its normal numbers.
                _ => (0., f64::from(f32::MIN_POSITIVE)),
            };
            for (j, (got, x)) in got.iter().zip(&wide).enumerate() {
                let q = uniform + if j as u32 == target { 1. - label_smoothing } else { 0. };
                let p = (x - max).exp() / sum;
                // The rounding of the exponent, x - max, comes on top of 1e-6 of what is subtracted.
                let tolerance =
                    1e-6 * (p * (1. + (max - x) / 16.) + q) + unit * (p - q).abs() + least;
                prop_assert!(
                    (got - (p - q)).abs() <= tolerance,
                    "{:?}: {} not {}",
                    dtype,
                    got,
                    p - q
                );
            }
            let total: f64 = got.iter().sum();
            let rounded_off: f64 = got.iter().map(|d| unit * d.abs() + least).sum();
            prop_assert!(total.abs() <= 1e-6 + rounded_off, "{:?}: the sum is {:e}", dtype, total);
        }
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn the_loss_far_from_0_is_that_of_f64() {
    let config = ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() };
    let outcome = TestRunner::new(config).run(&far_row(), |row| {
        let FarRow { classes, offset, spread, label_smoothing, seed, .. } = row;
        let apart = random(&[1, classes], DType::F64, seed).unwrap();
        let logits = ((apart * spread).unwrap() + offset).unwrap().to_dtype(DType::F32).unwrap();
        let targets = Tensor::new(&[(seed % classes as u64) as u32], &Device::Cpu).unwrap();
        let config = smoothed(label_smoothing);
        let loss = cross_entropy(&logits, &targets, &config).unwrap();
        let wide = logits.to_dtype(DType::F64).unwrap();
        let exact = cases::cross_entropy::formula(&wide, &targets, &config).unwrap();
        let exact = exact.to_scalar::<f64>().unwrap();
        let off = f64::from(loss.to_scalar::<f32>().unwrap()) - exact;
        // Of a sum that is hardly more than 1 the logarithm is known to a rounding of 1.
        prop_assert!(off.abs() <= 5e-7 * exact + 1e-7, "off by {:e} of {}", off, exact);
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn smoothing_a_large_vocabulary_far_from_0_keeps_its_digits() -> Result<()> {
    // Sums of 50,257 logits near 4,096, which f32 holds in steps of 16 and more.
    let logits = (random(&[3, 50_257], DType::F32, 1)? + 4096.)?;
    let targets = Tensor::new(&[7u32, 0, 50_256], &Device::Cpu)?;
    for label_smoothing in [0.1, 1.] {
        let config = smoothed(label_smoothing);
        let exact =
            cases::cross_entropy::formula(&logits.to_dtype(DType::F64)?, &targets, &config)?;
        let [loss, _] = run(&logits, &targets, &config)?;
        let off = f64::from(loss.to_scalar::<f32>()?) / exact.to_scalar::<f64>()? - 1.;
        assert!(off.abs() < 2e-7, "off by {off}");
    }
    Ok(())
}
