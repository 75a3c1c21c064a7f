//! Normal noise: its statistics, its windows, the layers that draw it, and what is pruned by its variance.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{gaussian_dropout, gaussian_noise, reparameterize};
use candle_dropout::nn::{Conv2dConfig, Module, VarBuilder, VarMap};
use candle_dropout::{
    DropMask, GaussianDropout, GaussianNoise, MaskGenerator, MaskKey, NoiseKey, Rate,
    VariationalConv2d, VariationalLinear, kl_weight,
};
use cases::runner::same_bits;
use cases::{bits, error, largest, random};

const CPU: Device = Device::Cpu;

/// A bound on a standard normal variable, as in `mask_law.rs`.
const MAX_Z: f64 = 4.5;

fn noise() -> NoiseKey {
    NoiseKey::new(MaskKey::derive(42, 7))
}

fn generator() -> Arc<MaskGenerator> {
    Arc::new(MaskGenerator::new(42))
}

fn normals(rows: usize, cols: usize) -> Result<Vec<f64>> {
    noise().to_tensor((rows, cols), &CPU)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

/// The upper tail of a standard normal variable by its continued fraction, for z of 1 and more.
fn upper_tail(z: f64) -> f64 {
    let fraction = (1..200).rev().fold(z, |f, k| z + f64::from(k) / f);
    (-0.5 * z * z).exp() / (2. * std::f64::consts::PI).sqrt() / fraction
}

/// The distribution function by its series near 0 and the tail elsewhere.
fn distribution(z: f64) -> f64 {
    let (x, mut term, mut sum) = (z.abs(), z.abs(), z.abs());
    if x >= 3. {
        return if z > 0. { 1. - upper_tail(x) } else { upper_tail(x) };
    }
    for k in 1..60 {
        term *= x * x / f64::from(2 * k + 1);
        sum += term;
    }
    let half = sum * (-0.5 * x * x).exp() / (2. * std::f64::consts::PI).sqrt();
    if z > 0. { 0.5 + half } else { 0.5 - half }
}

#[test]
fn moments_are_those_of_a_normal_variable() -> Result<()> {
    let z = normals(1000, 2003)?;
    let n = z.len() as f64;
    // The k-th moment has the variance (E z^2k - (E z^k)^2) / n.
    for (k, expected, variance) in [(1, 0., 1.), (2, 1., 2.), (3, 0., 15.), (4, 3., 96.)] {
        let moment = mean(z.iter().map(|z| z.powi(k)));
        let deviations = (moment - expected) / (variance / n).sqrt();
        assert!(deviations.abs() < MAX_Z, "moment {k}: {moment}, {deviations} deviations");
    }
    Ok(())
}

#[test]
fn tails_are_those_of_a_normal_variable() -> Result<()> {
    let z = normals(2000, 2000)?;
    let n = z.len() as f64;
    for limit in [1., 2., 3., 4.] {
        let expected = 2. * upper_tail(limit) * n;
        let beyond = z.iter().filter(|z| z.abs() > limit).count() as f64;
        let deviations = (beyond - expected) / expected.sqrt();
        assert!(deviations.abs() < MAX_Z, "beyond {limit}: {beyond} of {expected}");
    }
    assert!(z.iter().all(|z| z.abs() <= 6.763_706));
    Ok(())
}

#[test]
fn neighbours_are_uncorrelated_and_so_are_their_squares() -> Result<()> {
    let (rows, cols) = (500, 2003);
    let z = normals(rows, cols)?;
    for distance in [1, 2, 3, 4, 5, 7, 8, 64, cols, 2 * cols] {
        let pairs = z.iter().zip(&z[distance..]);
        let n = (z.len() - distance) as f64;
        let product: f64 = pairs.clone().map(|(a, b)| a * b).sum();
        let squares: f64 = pairs.map(|(a, b)| (a * a - 1.) * (b * b - 1.)).sum();
        for (sum, deviation) in [(product, n.sqrt()), (squares, 2. * n.sqrt())] {
            assert!((sum / deviation).abs() < MAX_Z, "distance {distance}: {}", sum / deviation);
        }
    }
    Ok(())
}

#[test]
fn the_distribution_is_normal_by_kolmogorov_and_smirnov() -> Result<()> {
    let mut z = normals(300, 1001)?;
    z.sort_by(f64::total_cmp);
    let n = z.len() as f64;
    let distance = z.iter().enumerate().fold(0f64, |worst, (i, z)| {
        let p = distribution(*z);
        worst.max((p - i as f64 / n).abs()).max((p - (i + 1) as f64 / n).abs())
    });
    // Exceeded with probability 2 exp(-2 x^2) = 1e-6.
    assert!(distance * n.sqrt() < 2.7, "{}", distance * n.sqrt());
    Ok(())
}

#[test]
fn any_split_draws_the_noise_of_the_whole() -> Result<()> {
    let (x, std) = (random(&[4, 6, 33], DType::F32, 1)?, random(&[4, 6, 33], DType::F32, 2)?);
    let whole = reparameterize(&x, &std, Some(&noise()))?;
    for (dim, from, len) in [(0, 1, 2), (1, 4, 2), (2, 1, 32), (2, 3, 13), (2, 6, 27), (2, 8, 16)] {
        let mut start = [0; 3];
        start[dim] = from;
        let noise = noise().window(&[4, 6, 33], &start);
        let [x, std] = [&x, &std].map(|x| x.narrow(dim, from, len));
        let part = reparameterize(&x?, &std?, Some(&noise))?;
        same_bits(&part, &whole.narrow(dim, from, len)?, "a part")?;
    }
    Ok(())
}

#[test]
fn every_dtype_has_the_numbers_of_f32() -> Result<()> {
    let z = noise().to_tensor((3, 17), &CPU)?;
    for dtype in [DType::F64, DType::F16, DType::BF16] {
        let y = gaussian_noise(&Tensor::zeros((3, 17), dtype, &CPU)?, 1., Some(&noise()))?;
        same_bits(&y, &z.to_dtype(dtype)?, "noise")?;
    }
    Ok(())
}

#[test]
fn a_mask_and_noise_of_one_key_have_no_draw_in_common() -> Result<()> {
    let drop = DropMask::new(0.5, MaskKey::new(3))?;
    let keep = drop.to_tensor((200, 1000), &CPU)?.to_dtype(DType::F64)?;
    let z = NoiseKey::from(&drop).to_tensor((200, 1000), &CPU)?.to_dtype(DType::F64)?;
    let sum = ((keep * 2.)?.affine(1., -1.)? * z)?.sum_all()?.to_scalar::<f64>()?;
    assert!((sum / 200_000f64.sqrt()).abs() < MAX_Z, "{sum}");
    Ok(())
}

#[test]
fn errors_name_op_argument_expected_got_and_remedy() -> Result<()> {
    let x = Tensor::zeros((2, 3), DType::F32, &CPU)?;
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    for std in [-1., f64::NAN, f64::INFINITY, 1e39] {
        for (op, result) in [
            ("gaussian_dropout", gaussian_dropout(&x, std, None)),
            ("gaussian_noise", gaussian_noise(&x, std, Some(&noise()))),
        ] {
            let error = message(result);
            let expected =
                format!("{op}: std: expected a finite standard deviation of at least 0, got {std}");
            assert!(error.starts_with(&expected), "{error}");
        }
        assert!(GaussianNoise::new(std, generator()).is_err());
    }
    let error = message(reparameterize(&x, &x.t()?, None));
    assert!(error.starts_with("reparameterize: std: expected shape [2, 3] like mean"), "{error}");
    let error = message(reparameterize(&x, &x.to_dtype(DType::F64)?, None));
    assert!(error.starts_with("reparameterize: std: expected dtype F32 like mean"), "{error}");
    let error = message(gaussian_noise(&x.to_dtype(DType::U8)?, 1., None));
    assert!(error.starts_with("gaussian_noise: x: expected dtype"), "{error}");
    let far = noise().window(&[2, (1 << 34) + 3], &[0, 1 << 34]);
    let error = message(gaussian_noise(&x, 1., Some(&far)));
    assert!(error.starts_with("gaussian_noise: x: expected at most 2^34 columns"), "{error}");
    for rate in [-0.1, 1.5, f64::NAN] {
        let error = GaussianDropout::new(rate, generator()).unwrap_err().to_string();
        assert!(error.starts_with("gaussian_dropout: drop_p: expected a probability"), "{error}");
    }
    let error = GaussianDropout::new(1., generator()).unwrap_err().to_string();
    assert!(
        error.starts_with("gaussian_dropout: drop_p: expected a probability below 1"),
        "{error}"
    );
    Ok(())
}

// ---- layers ----

fn deviation(y: &Tensor) -> Result<f64> {
    let y: Vec<f64> = y.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    let mean = mean(y.iter().copied());
    Ok((y.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / y.len() as f64).sqrt())
}

/// Keras' `test_gaussian_dropout_correctness` and `test_gaussian_noise_correctness`: inputs of ones, `[20, 500]`.
#[test]
fn deviations_are_those_of_keras_tests() -> Result<()> {
    let x = Tensor::ones((20, 500), DType::F32, &CPU)?;
    let y = GaussianDropout::new(0.3, generator())?.forward(&x, true)?;
    assert!((deviation(&y)? - (0.3f64 / 0.7).sqrt()).abs() < 0.02);
    let y = GaussianNoise::new(0.3, generator())?.forward(&x, true)?;
    assert!((deviation(&y)? - 0.3).abs() < 0.02);
    Ok(())
}

#[test]
fn layers_draw_one_key_in_training_and_none_in_evaluation() -> Result<()> {
    let generator = generator();
    let x = random(&[3, 5], DType::F32, 1)?;
    let (dropout, noise) =
        (GaussianDropout::new(0.3, generator.clone())?, GaussianNoise::new(0., generator.clone())?);
    assert_eq!(bits(&dropout.forward(&x, false)?)?, bits(&x)?);
    assert_eq!(bits(&noise.forward(&x, false)?)?, bits(&x)?);
    assert_eq!(generator.state().counter, 0);
    assert_eq!(bits(&noise.forward(&x, true)?)?, bits(&x)?); // of deviation 0
    assert_eq!(generator.state().counter, 1);
    let y = dropout.forward(&x, true)?;
    assert_eq!(generator.state().counter, 2);
    let key = NoiseKey::new(MaskKey::derive(42, 1));
    same_bits(&y, &gaussian_dropout(&x, dropout.std()?, Some(&key))?, "the second key")
}

fn variational_linear(in_dim: usize, out_dim: usize) -> Result<(VarMap, VariationalLinear)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
    let layer = VariationalLinear::new(in_dim, out_dim, generator(), vb)?;
    Ok((vars, layer))
}

fn var(vars: &VarMap, name: &str) -> Var {
    vars.data().lock().unwrap()[name].clone()
}

#[test]
fn a_variational_layer_samples_with_mean_and_variance_of_the_formula() -> Result<()> {
    let (vars, layer) = variational_linear(7, 3)?;
    var(&vars, "log_sigma2").set(&(random(&[3, 7], DType::F64, 2)? - 2.)?)?;
    let (n, x) = (20_000, random(&[1, 7], DType::F64, 1)?);
    let y = layer.forward(&x.broadcast_as((n, 7))?.contiguous()?, true)?;
    let theta = x.matmul(&layer.weight().t()?)?.broadcast_add(layer.bias().expect("a bias"))?;
    let sigma2 = var(&vars, "log_sigma2").exp()?;
    let variance = (x.sqr()?.matmul(&sigma2.t()?)? + 1e-8)?.flatten_all()?.to_vec1::<f64>()?;
    let theta = theta.flatten_all()?.to_vec1::<f64>()?;
    for column in 0..3 {
        let y = y.narrow(1, column, 1)?.flatten_all()?.to_vec1::<f64>()?;
        let (m, v) = (mean(y.iter().copied()), variance[column]);
        assert!(((m - theta[column]) / (v / n as f64).sqrt()).abs() < MAX_Z);
        let s = mean(y.iter().map(|y| (y - theta[column]).powi(2)));
        assert!(((s / v - 1.) / (2. / n as f64).sqrt()).abs() < MAX_Z);
    }
    Ok(())
}

#[test]
fn a_variational_layer_has_the_gradients_of_finite_differences() -> Result<()> {
    let (vars, layer) = variational_linear(5, 3)?;
    var(&vars, "log_sigma2").set(&random(&[3, 5], DType::F64, 2)?)?;
    let x = random(&[4, 5], DType::F64, 1)?;
    let state = MaskGenerator::new(42).state();
    let loss = |layer: &VariationalLinear| -> Result<Tensor> {
        layer.forward(&x, true)?.sqr()?.sum_all()? + layer.kl()?
    };
    // A layer of the same variables begins with the same key.
    let fresh = || {
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
        VariationalLinear::new(5, 3, Arc::new(MaskGenerator::from(state)), vb)
    };
    let grads = loss(&layer)?.backward()?;
    for name in ["weight", "log_sigma2", "bias"] {
        let var = var(&vars, name);
        let (dims, values) = (var.dims().to_vec(), var.flatten_all()?.to_vec1::<f64>()?);
        let grad = grads.get(&var).expect("a gradient").flatten_all()?.to_vec1::<f64>()?;
        for at in 0..values.len() {
            let mut sides = [0.; 2];
            for (side, step) in sides.iter_mut().zip([1e-6, -1e-6]) {
                let mut moved = values.clone();
                moved[at] += step;
                var.set(&Tensor::from_vec(moved, dims.as_slice(), &CPU)?)?;
                *side = loss(&fresh()?)?.to_scalar::<f64>()?;
            }
            let difference = (sides[0] - sides[1]) / 2e-6;
            assert!(
                (difference - grad[at]).abs() < 1e-5 * grad[at].abs().max(1.),
                "{name} {at}: {difference} {}",
                grad[at]
            );
        }
        var.set(&Tensor::from_vec(values, dims.as_slice(), &CPU)?)?;
    }
    Ok(())
}

#[test]
fn where_inputs_and_weights_are_0_gradients_are_finite() -> Result<()> {
    let (vars, layer) = variational_linear(4, 2)?;
    var(&vars, "weight").set(&Tensor::zeros((2, 4), DType::F64, &CPU)?)?;
    let x = Var::zeros((3, 4), DType::F64, &CPU)?;
    let loss = (layer.forward(&x, true)?.sqr()?.sum_all()? + layer.kl()?)?;
    let grads = loss.backward()?;
    for var in [x.clone(), var(&vars, "weight"), var(&vars, "log_sigma2")] {
        let grad = grads.get(&var).expect("a gradient");
        assert!(grad.flatten_all()?.to_vec1::<f64>()?.iter().all(|g| g.is_finite()));
    }
    Ok(())
}

/// By the formula of the paper, at values of log alpha on both sides of the threshold.
#[test]
fn the_divergence_and_what_is_pruned_follow_log_alpha() -> Result<()> {
    let (vars, layer) = variational_linear(5, 1)?;
    let log_alpha = [-20f64, -1., 2.9, 3.1, 40.];
    let theta = [0.5f64, -2., 1., 3., -0.1];
    let log_sigma2: Vec<f64> = log_alpha.iter().zip(theta).map(|(a, t)| a + (t * t).ln()).collect();
    var(&vars, "weight").set(&Tensor::from_slice(&theta, (1, 5), &CPU)?)?;
    var(&vars, "log_sigma2").set(&Tensor::from_vec(log_sigma2, (1, 5), &CPU)?)?;
    let expected: f64 = log_alpha
        .iter()
        .map(|a| a.clamp(-10., 10.))
        .map(|a| {
            let sigmoid = 1. / (1. + (-(1.87320 + 1.48695 * a)).exp());
            0.63576 - 0.63576 * sigmoid + 0.5 * (1. + (-a).exp()).ln()
        })
        .sum();
    assert!((layer.kl()?.to_scalar::<f64>()? - expected).abs() < 1e-9);
    assert_eq!(layer.sparsity()?, 0.4);
    let pruned = layer.prune()?;
    assert_eq!(pruned.weight().to_vec2::<f64>()?, [[0.5, -2., 1., 0., 0.]]);
    let x = random(&[3, 5], DType::F64, 1)?;
    same_bits(&layer.forward(&x, false)?, &pruned.forward(&x)?, "evaluation")
}

#[test]
fn a_variational_convolution_of_one_pixel_is_a_variational_linear_layer() -> Result<()> {
    let (linear_vars, linear) = variational_linear(6, 4)?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
    let config = Conv2dConfig::default();
    let conv = VariationalConv2d::new(6, 4, 1, config, generator(), vb)?;
    var(&linear_vars, "log_sigma2").set(&random(&[4, 6], DType::F64, 2)?)?;
    for name in ["weight", "log_sigma2"] {
        let of_linear = var(&linear_vars, name);
        var(&vars, name).set(&of_linear.reshape((4, 6, 1, 1))?)?;
    }
    var(&vars, "bias").set(&var(&linear_vars, "bias"))?;
    let x = random(&[5, 6], DType::F64, 1)?;
    let images = x.reshape((5, 6, 1, 1))?;
    let (kl, expected) = (conv.kl()?, linear.kl()?);
    assert!((kl.to_scalar::<f64>()? - expected.to_scalar::<f64>()?).abs() < 1e-9);
    let y = conv.forward(&images, false)?.reshape((5, 4))?;
    let expected = linear.forward(&x, false)?;
    assert!(error(&y, &expected)? <= 1e-12 * largest(&expected)?);
    // The noise of [5, 4, 1, 1] is that of 20 rows.
    let mean = linear.prune()?.forward(&x)?;
    assert_eq!(mean.dims(), [5, 4]);
    let grads = (conv.forward(&images, true)?.sqr()?.sum_all()? + conv.kl()?)?.backward()?;
    for name in ["weight", "log_sigma2", "bias"] {
        let grad = grads.get(&var(&vars, name)).expect("a gradient");
        assert!(largest(grad)? > 0., "{name}");
    }
    Ok(())
}

#[test]
fn the_weight_of_the_divergence_grows_on_a_straight_line() {
    let at = |begin, warm_up| [0, 4, 5, 7, 10, 11].map(|step| kl_weight(step, begin, warm_up));
    assert_eq!(at(5, 5), [0., 0., 0., 0.4, 1., 1.]);
    assert_eq!(at(0, 10), [0., 0.4, 0.5, 0.7, 1., 1.]);
    assert_eq!(kl_weight(0, 0, 0), 0.);
    assert_eq!(kl_weight(1, 0, 0), 1.);
}

#[test]
fn a_rate_has_no_part_in_noise() -> Result<()> {
    let key = MaskKey::new(3);
    let none = NoiseKey::from(&DropMask::with_rate(Rate::DROP_ALL, key));
    assert_eq!(none, NoiseKey::new(key));
    assert_eq!(none.key(), key);
    Ok(())
}
