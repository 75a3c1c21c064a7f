//! What follows from passes: moments, entropies, gradients.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_dropout::{Dropout, McDropout, McPrediction};
use cases::random;

use crate::SEED;

#[test]
fn passes_are_independent_and_have_the_moments_of_dropout() -> Result<()> {
    let (layer, times, len) = (Dropout::new(0.25), 400, 64);
    let x = Tensor::ones((4, len), DType::F32, &Device::Cpu)?;
    let prediction =
        McDropout::new(times, SEED)?.predict(&x, 0, |xs, train| layer.forward(xs, train))?;
    // Each element is 0 or 4/3: mean 1, variance 1/3.
    let mean = f64::from(prediction.mean()?.mean_all()?.to_scalar::<f32>()?);
    let sigma = (1. / 3. / (times * 4 * len) as f64).sqrt();
    assert!((mean - 1.).abs() < 5. * sigma, "{mean}");
    // The variance has that of m4 - v² over so many, here (7/27 - 1/9) of each element, and a bias of 1/T.
    let variance = f64::from(prediction.variance()?.mean_all()?.to_scalar::<f32>()?);
    let sigma = ((7. / 27. - 1. / 9.) / (times * 4 * len) as f64).sqrt();
    assert!((variance - (1. - 1. / times as f64) / 3.).abs() < 5. * sigma, "{variance}");
    // Neighbouring passes and samples are uncorrelated.
    let centred = (prediction.samples() - 1.)?;
    for dim in [0, 1] {
        let n = centred.dim(dim)? - 1;
        let product = (centred.narrow(dim, 0, n)? * centred.narrow(dim, 1, n)?)?;
        let count = product.elem_count() as f64;
        let correlation = f64::from(product.mean_all()?.to_scalar::<f32>()?) * 3.;
        assert!(correlation.abs() < 5. / count.sqrt(), "dimension {dim}: {correlation}");
    }
    Ok(())
}

#[test]
fn gradients_flow_through_passes_and_statistics() -> Result<()> {
    let layer = Dropout::new(0.5);
    let x = Var::from_tensor(&random(&[2, 3], DType::F64, 1)?)?;
    let loss = |x: &Tensor| {
        let prediction =
            McDropout::new(3, SEED)?.predict(x, 0, |xs, train| layer.forward(&xs.sqr()?, train))?;
        let sums = [prediction.mean()?.sum_all()?, prediction.variance()?.sum_all()?];
        let entropies = [
            prediction.predictive_entropy()?.sum_all()?,
            prediction.mutual_information()?.sum_all()?,
        ];
        ((&sums[0] + &sums[1])? + (&entropies[0] + &entropies[1])?)?.to_dtype(DType::F64)
    };
    let grads = loss(&x)?.backward()?;
    let grad = grads.get(&x).expect("a gradient").flatten_all()?.to_vec1::<f64>()?;
    let numbers = x.flatten_all()?.to_vec1::<f64>()?;
    for (at, grad) in grad.iter().enumerate() {
        let at_distance = |h: f64| {
            let mut moved = numbers.clone();
            moved[at] += h;
            loss(&Tensor::from_vec(moved, (2, 3), &Device::Cpu)?)?.to_scalar::<f64>()
        };
        let slope = (at_distance(1e-6)? - at_distance(-1e-6)?) / 2e-6;
        assert!((slope - grad).abs() < 1e-6 * slope.abs().max(1.), "{at}: {slope} and {grad}");
    }
    Ok(())
}

// ---- entropies ----

/// The prediction whose passes are these logits, of one sample.
fn of_logits(passes: &[&[f32]], dtype: DType) -> Result<McPrediction> {
    let (times, classes) = (passes.len(), passes[0].len());
    let logits =
        Tensor::from_vec(passes.concat(), (times, classes), &Device::Cpu)?.to_dtype(dtype)?;
    let x = Tensor::zeros((1, 1), DType::F32, &Device::Cpu)?;
    McDropout::new(times, SEED)?.predict(&x, 0, |_, _| Ok(logits.clone()))
}

fn number(x: &Tensor) -> Result<f64> {
    x.to_dtype(DType::F64)?.squeeze(0)?.to_scalar()
}

#[test]
fn entropies_are_those_of_closed_forms() -> Result<()> {
    const LN_2: f64 = std::f64::consts::LN_2;
    let (ln_3, inf) = (3f32.ln(), f32::INFINITY);
    // Of a quarter and three.
    let quarter = 2. * LN_2 - 0.75 * 3f64.ln();
    let classes = [0f32; 10];
    let rows: [(&[&[f32]], f64, f64); 9] = [
        // passes; predictive entropy, mutual information
        (&[&classes, &classes], 10f64.ln(), 0.),
        (&[&[ln_3, 0.], &[0., ln_3]], LN_2, LN_2 - quarter),
        (&[&[ln_3 + 4., 4.], &[ln_3 - 4., -4.]], quarter, 0.),
        (&[&[300., 300.], &[-300., -300.]], LN_2, 0.),
        (&[&[1e4, 0.], &[0., 1e4]], LN_2, LN_2),
        (&[&[1e4, 0., 0.], &[0., 1e4, 0.], &[0., 0., 1e4]], 3f64.ln(), 3f64.ln()),
        (&[&[0., 0., -inf], &[5., 5., -inf]], LN_2, 0.),
        (&[&[0., -inf], &[-inf, 0.]], LN_2, LN_2),
        (&[&[1e4, -1e4]], 0., 0.),
    ];
    for (passes, predictive, information) in rows {
        for (dtype, bound) in
            [(DType::F64, 1e-6), (DType::F32, 2e-6), (DType::F16, 1e-2), (DType::BF16, 1e-2)]
        {
            let prediction = of_logits(passes, dtype)?;
            let got = [
                number(&prediction.predictive_entropy()?)?,
                number(&prediction.mutual_information()?)?,
                number(&prediction.expected_entropy()?)?,
            ];
            let expected = [predictive, information, predictive - information];
            for (got, expected) in got.into_iter().zip(expected) {
                assert!(
                    (got - expected).abs() < bound,
                    "{passes:?} in {dtype:?}: {got}, {expected}"
                );
                assert!(got >= 0., "{passes:?} in {dtype:?}: {got}");
            }
            let sum = prediction.probabilities()?.sum(D::Minus1)?;
            assert!((number(&sum)? - 1.).abs() < bound);
        }
    }
    Ok(())
}

#[test]
fn entropies_have_the_shape_of_what_is_classified() -> Result<()> {
    // Logits of [B, S, classes], and statistics in f32 of halves.
    let layer = Dropout::new(0.5);
    let x = random(&[2, 5, 4], DType::F16, 1)?;
    let prediction =
        McDropout::new(6, SEED)?.predict(&x, 0, |xs, train| layer.forward(xs, train))?;
    let expected = prediction.expected_entropy()?;
    let (predictive, information) =
        (prediction.predictive_entropy()?, prediction.mutual_information()?);
    for x in [&expected, &predictive, &information] {
        assert_eq!((x.dims(), x.dtype()), (&[2, 5][..], DType::F32));
    }
    assert_eq!(prediction.mean()?.dtype(), DType::F32);
    assert_eq!(prediction.variance()?.dims(), [2, 5, 4]);
    let difference = ((predictive - expected)? - information)?.abs()?.max_all()?;
    assert!(difference.to_scalar::<f32>()? < 1e-6);
    Ok(())
}
