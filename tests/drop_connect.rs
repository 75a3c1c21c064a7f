//! DropConnect: which connections drop, what outputs are on average, the paper's inference, and what is refused.
//! Values and gradients against the formula are in `tests/ops.rs`.
//!
//! One text, since both layers are held to the same facts.

use std::sync::Arc;

use candle_core::{DType, Device, Error, ModuleT, Result, Tensor, Var};
use candle_dropout::functional::{drop_connect_conv2d, drop_connect_linear, dropout};
use candle_dropout::{
    DropConnectConv2d, DropConnectLinear, DropMask, MaskGenerator, MaskKey, Rate, TrainMode,
    compose, nn, seeded_var_builder,
};
use candle_nn::{Conv2d, Conv2dConfig, Linear, Module, VarMap};
use cases::runner::{gradient, same_bits};
use cases::{DTYPES, bits, mask, random};

fn generator(seed: u64) -> Arc<MaskGenerator> {
    Arc::new(MaskGenerator::new(seed))
}

fn linear(drop_p: f64, dtype: DType, seed: u64) -> Result<DropConnectLinear> {
    let (weight, bias) = (random(&[3, 6], dtype, 1)?, random(&[3], dtype, 2)?);
    DropConnectLinear::from_linear(Linear::new(weight, Some(bias)), drop_p, generator(seed))
}

/// Two groups, strided, of which windows leave a rest.
fn conv2d(drop_p: f64, dtype: DType, seed: u64) -> Result<DropConnectConv2d> {
    let config = Conv2dConfig { padding: 1, stride: 2, groups: 2, ..Default::default() };
    let (weight, bias) = (random(&[4, 2, 3, 2], dtype, 1)?, random(&[4], dtype, 2)?);
    DropConnectConv2d::from_conv2d(Conv2d::new(weight, Some(bias), config), drop_p, generator(seed))
}

const IMAGE: [usize; 4] = [2, 4, 5, 6];

// ---- which connections drop ----

#[test]
fn a_weight_drops_as_dropout_drops_it_and_for_all_rows_at_once() -> Result<()> {
    for dtype in DTYPES {
        let layer = DropConnectLinear::from_linear(
            Linear::new(random(&[13, 41], dtype, 1)?, None),
            0.4,
            generator(5),
        )?;
        let unit = Tensor::eye(41, dtype, &Device::Cpu)?;
        let y = layer.forward(&Tensor::cat(&[&unit, &unit], 0)?, true)?;
        let drop = DropMask::new(0.4, MaskKey::derive(5, 0))?;
        let dropped = dropout(layer.weight(), &drop)?;
        for half in [0, 41] {
            // Sums of zeros and one element: its own bits, but for the sign of a zero.
            let y = (y.narrow(0, half, 41)?.t()?.contiguous()? + 0.)?;
            same_bits(&y, &(&dropped + 0.)?, "weight")?;
        }
    }
    Ok(())
}

#[test]
fn a_kernel_drops_as_dropout_drops_it_and_for_all_images_and_places_at_once() -> Result<()> {
    // One pixel that is 1, which meets each element of the kernel once: the kernel comes out backwards.
    let weight = random(&[3, 1, 2, 5], DType::F32, 1)?;
    let drop = mask(0.4);
    let x = Tensor::zeros((2, 1, 3, 9), DType::F32, &Device::Cpu)?;
    let x = x.slice_assign(
        &[0..2, 0..1, 1..2, 4..5],
        &Tensor::ones((2, 1, 1, 1), DType::F32, &Device::Cpu)?,
    )?;
    let y = drop_connect_conv2d(&x, &weight, None, Conv2dConfig::default(), &drop)?;
    let dropped = dropout(&weight, &drop)?.flip(&[2, 3])?.reshape((3, 2, 5))?;
    for image in 0..2 {
        let y = (y.get(image)? + 0.)?;
        assert_eq!(y.to_vec3::<f32>()?, (&dropped + 0.)?.to_vec3::<f32>()?);
    }
    Ok(())
}

/// NaN and infinities where `keep` is 0.
fn poisoned(x: &Tensor, keep: &Tensor) -> Result<Tensor> {
    let poison = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let poison: Vec<_> = (0..x.elem_count()).map(|i| poison[i % 3]).collect();
    keep.where_cond(x, &Tensor::from_vec(poison, x.dims(), &Device::Cpu)?.to_dtype(x.dtype())?)
}

#[test]
fn dropped_infinities_and_nans_vanish_from_results_and_gradients() -> Result<()> {
    type Call = fn(&Tensor, &Tensor) -> Result<Tensor>;
    let of_linear: Call = |x, weight| drop_connect_linear(x, weight, None, &mask(0.4));
    let of_conv2d: Call =
        |x, weight| drop_connect_conv2d(x, weight, None, Conv2dConfig::default(), &mask(0.4));
    let fact = || -> Result<()> {
        for dtype in DTYPES {
            for (call, x, weight) in [
                (of_linear, &[5, 41][..], &[13, 41][..]),
                (of_conv2d, &[2, 3, 6, 5], &[4, 3, 2, 3]),
            ] {
                let keep = mask(0.4).to_tensor(weight, &Device::Cpu)?;
                let (x, weight) = (random(x, dtype, 1)?, random(weight, dtype, 2)?);
                let (x, bad) =
                    (Var::from_tensor(&x)?, Var::from_tensor(&poisoned(&weight, &keep)?)?);
                let weight = Var::from_tensor(&weight)?;
                let (y, clean) = (call(&x, &bad)?, call(&x, &weight)?);
                same_bits(&y, &clean, "output")?;
                let dy = random(y.dims(), dtype, 3)?;
                same_bits(&gradient(&y, &dy, &x)?, &gradient(&clean, &dy, &x)?, "dx")?;
                let dweight = gradient(&y, &dy, &bad)?;
                same_bits(&dweight, &gradient(&clean, &dy, &weight)?, "dweight")?;
                let dropped = bits(&dweight)?.into_iter().zip(bits(&keep)?);
                assert!(dropped.filter(|(_, keep)| *keep == 0).all(|(dweight, _)| dweight == 0));
            }
        }
        Ok(())
    };
    fact()?;
    let _composed = compose();
    fact()
}

#[test]
fn a_part_of_a_weight_with_its_window_is_that_part_of_the_whole() -> Result<()> {
    let (x, weight) = (random(&[5, 16], DType::F64, 1)?, random(&[9, 16], DType::F64, 2)?);
    let whole = drop_connect_linear(&x, &weight, None, &mask(0.4))?;
    let part = weight.narrow(0, 4, 5)?;
    let y = drop_connect_linear(&x, &part, None, &mask(0.4).window(&[9, 16], &[4, 0]))?;
    let off = (y - whole.narrow(1, 4, 5)?)?.abs()?.max_all()?.to_scalar::<f64>()?;
    assert!(off < 1e-12, "{off}");
    Ok(())
}

#[test]
fn nothing_kept_leaves_the_bias_and_gradients_of_zeros() -> Result<()> {
    let (linear, conv2d) = (linear(1., DType::F32, 1)?, conv2d(1., DType::F32, 1)?);
    let y = linear.forward(&random(&[2, 6], DType::F32, 3)?, true)?;
    assert_eq!(y.to_vec2::<f32>()?, vec![linear.bias().unwrap().to_vec1::<f32>()?; 2]);
    let x = Var::from_tensor(&random(&IMAGE, DType::F32, 3)?)?;
    let y = conv2d.forward(&x, true)?;
    let bias = conv2d.bias().unwrap().reshape((1, 4, 1, 1))?.broadcast_as(y.dims())?;
    same_bits(&y, &bias.contiguous()?, "bias")?;
    let dx = gradient(&y, &random(y.dims(), DType::F32, 4)?, &x)?;
    assert_eq!(dx.abs()?.max_all()?.to_scalar::<f32>()?, 0.);
    Ok(())
}

// ---- the layers ----

#[test]
fn a_call_draws_one_key_in_training_whatever_the_rate_and_none_in_evaluation() -> Result<()> {
    for drop_p in [0., 0.3, 1.] {
        let generator = generator(3);
        let weight = random(&[3, 6], DType::F32, 1)?;
        let linear =
            DropConnectLinear::from_linear(Linear::new(weight, None), drop_p, generator.clone())?;
        let weight = random(&[3, 4, 1, 1], DType::F32, 1)?;
        let conv2d = Conv2d::new(weight, None, Conv2dConfig::default());
        let conv2d = DropConnectConv2d::from_conv2d(conv2d, drop_p, generator.clone())?;
        let (x, image) = (random(&[2, 6], DType::F32, 2)?, random(&IMAGE, DType::F32, 2)?);
        for (train, keys) in [(true, 2), (false, 2), (true, 4)] {
            linear.forward_t(&x, train)?;
            conv2d.forward_t(&image, train)?;
            assert_eq!(generator.state().counter, keys, "drop_p {drop_p}");
        }
        if drop_p < 1. {
            linear.forward_sampled(&x, 2, MaskKey::new(1), |u| u.relu())?;
            conv2d.forward_sampled(&image, 2, MaskKey::new(1), |u| u.relu())?;
        }
        assert_eq!(generator.state().counter, 4, "sampling takes its own key");
    }
    Ok(())
}

#[test]
fn evaluation_is_candles_layer_with_the_same_variables() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let (vars, device) = (VarMap::new(), Device::Cpu);
        let vb = seeded_var_builder(&vars, 1, dtype, &device);
        let ours = DropConnectLinear::new(6, 3, 0.5, generator(1), vb.pp("fc"))?;
        let theirs = candle_nn::linear(6, 3, vb.pp("fc"))?;
        let x = random(&[2, 6], dtype, 1)?;
        same_bits(&ours.forward(&x, false)?, &nn::Linear::from(theirs).forward(&x)?, "linear")?;

        let config = Conv2dConfig { padding: 1, stride: 2, groups: 2, ..Default::default() };
        let ours = DropConnectConv2d::new(4, 6, 3, config, 0.5, generator(1), vb.pp("conv"))?;
        let theirs = candle_nn::conv2d(4, 6, 3, config, vb.pp("conv"))?;
        let x = random(&IMAGE, dtype, 1)?;
        same_bits(&ours.forward(&x, false)?, &theirs.forward(&x)?, "conv2d")?;
        let mut names: Vec<_> = vars.data().lock().unwrap().keys().cloned().collect();
        names.sort();
        assert_eq!(names, ["conv.bias", "conv.weight", "fc.bias", "fc.weight"]);
    }
    Ok(())
}

#[test]
fn a_switch_and_a_new_rate_reach_the_layers() -> Result<()> {
    let (mode, x) = (TrainMode::new(), random(&[2, 6], DType::F32, 1)?);
    let mut layer = linear(0.5, DType::F32, 1)?.switched(&mode);
    assert_ne!(bits(&layer.forward(&x)?)?, bits(&layer.layer().forward(&x, false)?)?);
    layer.layer_mut().set_drop_p(0.)?;
    assert_eq!(layer.layer().drop_p(), 0.);
    same_bits(&layer.forward(&x)?, &layer.layer().forward(&x, false)?, "at a rate of 0")?;
    let mut conv = conv2d(0.5, DType::F32, 1)?;
    assert!(conv.set_drop_p(1.5).is_err());
    assert_eq!(conv.drop_p(), 0.5);
    let (image, _eval) = (random(&IMAGE, DType::F32, 1)?, mode.eval());
    let expected = conv.forward(&image, false)?;
    same_bits(&conv.switched(&mode).forward(&image)?, &expected, "in evaluation")
}

#[test]
fn gradients_arrive_where_candles_own_convolution_refuses_to_give_them() -> Result<()> {
    // Windows leave a row and no column.
    let x = Var::from_tensor(&random(&[1, 1, 6, 5], DType::F64, 1)?)?;
    let weight = random(&[1, 1, 3, 3], DType::F64, 2)?;
    assert!(x.conv2d(&weight, 0, 2, 1, 1)?.sum_all()?.backward().is_err());
    let config = Conv2dConfig { stride: 2, ..Default::default() };
    let y = drop_connect_conv2d(&x, &weight, None, config, &DropMask::none())?;
    let grads = y.sum_all()?.backward()?;
    let dx = grads.get(&x).expect("a gradient").reshape((6, 5))?.to_vec2::<f64>()?;
    let weight = weight.reshape((3, 3))?.to_vec2::<f64>()?;
    assert_eq!(dx[5], [0.; 5]);
    // The third column lies in two windows.
    let [a, b, c] = [weight[1][0], weight[1][1], weight[1][2]];
    assert_eq!(dx[1], [a, b, c + a, b, c]);
    Ok(())
}

// ---- mean and variance ----

/// Asserts that over `calls` training passes mean and variance of each output are these.
fn assert_moments(
    pass: impl Fn() -> Result<Tensor>,
    (mean, variance): (Tensor, Tensor),
    calls: usize,
) -> Result<()> {
    let outputs = (0..calls).map(|_| pass()?.flatten_all()?.to_vec1::<f64>());
    let outputs = outputs.collect::<Result<Vec<_>>>()?;
    let exact = mean.flatten_all()?.to_vec1::<f64>()?.into_iter();
    let exact = exact.zip(variance.flatten_all()?.to_vec1::<f64>()?);
    let mut spread = 0;
    for (at, (mean, variance)) in exact.enumerate() {
        let moment =
            |k: i32| outputs.iter().map(|y| (y[at] - mean).powi(k)).sum::<f64>() / calls as f64;
        let n = calls as f64;
        let z = moment(1) / (variance / n).sqrt();
        assert!(z.abs() < 5., "output {at}: the mean is off by {z} standard deviations");
        let z = (moment(2) - variance) / ((moment(4) - variance * variance) / n).sqrt();
        assert!(z.abs() < 5., "output {at}: the variance is off by {z} standard deviations");
        spread += usize::from(variance > 0.1);
    }
    assert!(spread > 0, "some outputs vary");
    Ok(())
}

#[test]
fn mean_and_variance_of_outputs_are_those_of_the_paper() -> Result<()> {
    for drop_p in [0.1, 0.5, 0.8] {
        let (layer, x) = (linear(drop_p, DType::F64, 7)?, random(&[2, 6], DType::F64, 3)?);
        assert_moments(|| layer.forward(&x, true), layer.moments(&x)?, 4000)?;
    }
    let (layer, x) = (conv2d(0.3, DType::F64, 7)?, random(&IMAGE, DType::F64, 3)?);
    assert_moments(|| layer.forward(&x, true), layer.moments(&x)?, 2000)
}

#[test]
fn moments_are_those_of_the_realised_rate() -> Result<()> {
    let (layer, x) = (linear(0.1, DType::F64, 7)?, random(&[2, 6], DType::F64, 3)?);
    let (mean, variance) = layer.moments(&x)?;
    same_bits(&mean, &layer.forward(&x, false)?, "mean")?;
    let keep_p = Rate::new(0.1)?.keep_p();
    assert_ne!(keep_p, 0.9);
    let squares = x.sqr()?.matmul(&layer.weight().sqr()?.t()?)?;
    let off = ((squares * ((1. - keep_p) / keep_p))? - variance)?.abs()?.max_all()?;
    assert!(off.to_scalar::<f64>()? < 1e-14);
    let (_, variance) = linear(0., DType::F64, 7)?.moments(&x)?;
    assert_eq!(variance.to_vec2::<f64>()?, [[0.; 3]; 2]);
    Ok(())
}

#[test]
fn moments_of_halves_are_computed_in_f32() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let layer = linear(0.5, dtype, 7)?;
        // Its squares are no f16.
        let x = (random(&[2, 6], dtype, 3)? * 200.)?;
        let (mean, variance) = layer.moments(&x)?;
        assert_eq!([mean.dtype(), variance.dtype()], [DType::F32; 2]);
        assert!(variance.max_all()?.to_scalar::<f32>()? > 65504.);
        assert!(variance.max_all()?.to_scalar::<f32>()?.is_finite());
        let y = layer.forward_sampled(&x, 3, MaskKey::new(1), |u| {
            assert_eq!(u.dtype(), dtype);
            u.relu()
        })?;
        assert_eq!((y.dtype(), y.dims()), (dtype, &[2, 3][..]));
    }
    Ok(())
}

// ---- the paper's inference ----

#[test]
fn sampled_outputs_have_the_moments_that_they_are_drawn_with() -> Result<()> {
    const SAMPLES: usize = 4000;
    let n = SAMPLES as f64;
    let (layer, x) = (linear(0.5, DType::F64, 7)?, random(&[4, 6], DType::F64, 3)?);
    let (conv, image) = (conv2d(0.5, DType::F64, 7)?, random(&IMAGE, DType::F64, 3)?);
    let key = MaskKey::new(11);
    let of_linear = |activation: fn(&Tensor) -> Result<Tensor>| {
        layer.forward_sampled(&x, SAMPLES, key, activation)
    };
    let of_conv = |activation: fn(&Tensor) -> Result<Tensor>| {
        conv.forward_sampled(&image, SAMPLES, key, activation)
    };
    let all = [
        (of_linear(|u| Ok(u.clone()))?, of_linear(Tensor::sqr)?, layer.moments(&x)?),
        (of_conv(|u| Ok(u.clone()))?, of_conv(Tensor::sqr)?, conv.moments(&image)?),
    ];
    for (first, second, (mean, variance)) in all {
        let flat = |x: &Tensor| x.flatten_all()?.to_vec1::<f64>();
        let (first, second) = (flat(&first)?, flat(&second)?);
        for (at, (mean, variance)) in flat(&mean)?.into_iter().zip(flat(&variance)?).enumerate() {
            let off = first[at] - mean;
            assert!(off.abs() <= 5.5 * (variance / n).sqrt(), "output {at}: {off}");
            // The variance of the square of a normal number.
            let spread = 2. * variance * variance + 4. * mean * mean * variance;
            let off = second[at] - (mean * mean + variance);
            assert!(off.abs() <= 5.5 * (spread / n).sqrt() + 1e-12, "square of output {at}: {off}");
        }
    }
    Ok(())
}

#[test]
fn a_sample_depends_on_its_key_and_number_alone() -> Result<()> {
    let (layer, x) = (linear(0.5, DType::F64, 7)?, random(&[2, 6], DType::F64, 3)?);
    let seen = |samples: usize, key: u64| -> Result<Vec<Vec<u64>>> {
        let seen = std::cell::RefCell::new(Vec::new());
        layer.forward_sampled(&x, samples, MaskKey::new(key), |u| {
            seen.borrow_mut().push(bits(u)?);
            Ok(u.clone())
        })?;
        Ok(seen.into_inner())
    };
    let (two, five, other) = (seen(2, 1)?, seen(5, 1)?, seen(5, 2)?);
    assert_eq!([two.len(), five.len()], [2, 5]);
    assert_eq!(two, five[..2]);
    let mut all: Vec<_> = five.iter().chain(&other).collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 10, "no two are equal");
    Ok(())
}

/// A rectifier has another mean over the masks than at their mean: the paper's reason to sample.
#[test]
fn behind_an_activation_sampling_is_nearer_to_training_than_the_mean_is() -> Result<()> {
    // Sums of 200 connections, which are nearly normal.
    let (weight, x) = (random(&[8, 200], DType::F64, 1)?, random(&[1, 200], DType::F64, 2)?);
    let weight = weight.broadcast_sub(&weight.mean_keepdim(1)?)?;
    let layer = DropConnectLinear::from_linear(Linear::new(weight, None), 0.5, generator(9))?;
    let calls = 2000;
    let sum = (0..calls).try_fold(Tensor::zeros((1, 8), DType::F64, &Device::Cpu)?, |sum, _| {
        sum + layer.forward(&x, true)?.relu()?
    });
    let trained = (sum? / f64::from(calls))?;
    let sampled = layer.forward_sampled(&x, 2000, MaskKey::new(1), Tensor::relu)?;
    let off = |y: &Tensor| (y - &trained)?.sqr()?.mean_all()?.to_scalar::<f64>();
    let (of_mean, of_samples) = (off(&layer.forward(&x, false)?.relu()?)?, off(&sampled)?);
    assert!(of_samples * 10. < of_mean, "sampled {of_samples}, mean {of_mean}");
    Ok(())
}

// ---- what is refused ----

#[track_caller]
fn refused<T>(result: Result<T>, expected: &str) {
    let error = result.err().map(|error: Error| error.to_string()).unwrap_or_default();
    assert!(error.starts_with(expected), "expected {expected:?}, got {error:?}");
}

#[test]
fn errors_name_op_argument_expected_got_and_remedy() -> Result<()> {
    let f32 = |dims: &[usize]| random(dims, DType::F32, 1);
    let (x, weight, drop) = (f32(&[2, 6])?, f32(&[3, 6])?, mask(0.5));
    let op = |x: &Tensor, weight: &Tensor, bias| drop_connect_linear(x, weight, bias, &drop);
    refused(op(&x, &weight.t()?, None), "drop_connect_linear: x: expected [.., 3]");
    refused(op(&x, &f32(&[6])?, None), "drop_connect_linear: weight: expected a matrix [out, in]");
    refused(op(&x, &weight, Some(&x)), "drop_connect_linear: bias: expected shape [3]");
    refused(op(&x.to_dtype(DType::U8)?, &weight, None), "drop_connect_linear: x: expected dtype");
    refused(
        op(&x, &weight.to_dtype(DType::F64)?, None),
        "drop_connect_linear: weight: expected dtype F32 like x, got F64",
    );
    refused(
        drop_connect_linear(&x, &weight, None, &drop.window(&[3, 5], &[0, 0])),
        "drop_connect_linear: drop.window: expected start + shape",
    );

    let (x, weight) = (f32(&IMAGE)?, f32(&[4, 2, 3, 2])?);
    let plain = Conv2dConfig { groups: 2, ..Default::default() };
    let op = |x: &Tensor, weight: &Tensor, bias, config| {
        drop_connect_conv2d(x, weight, bias, config, &drop)
    };
    let named = |argument: &str| format!("drop_connect_conv2d: {argument}: expected");
    refused(op(&x.get(0)?, &weight, None, plain), &named("x, weight"));
    for (config, argument) in [
        (Conv2dConfig { stride: 0, ..plain }, "stride"),
        (Conv2dConfig { dilation: 0, ..plain }, "dilation"),
        (Conv2dConfig { groups: 0, ..plain }, "groups"),
        (Conv2dConfig { groups: 3, ..plain }, "groups"),
        (Conv2dConfig { groups: 1, ..plain }, "x"),
        (Conv2dConfig { dilation: 3, ..plain }, "x"),
    ] {
        refused(op(&x, &weight, None, config), &named(argument));
    }
    refused(op(&x, &f32(&[4, 2, 0, 2])?, None, plain), &named("weight"));
    let bias = f32(&[2])?;
    refused(op(&x, &weight, Some(&bias), plain), &named("bias"));
    refused(op(&x.to_dtype(DType::I64)?, &weight, None, plain), &named("x"));
    refused(op(&x, &weight.to_dtype(DType::F16)?, None, plain), &named("weight"));
    refused(
        drop_connect_conv2d(&x, &weight, None, plain, &drop.window(&[4, 2], &[0, 0])),
        &named("drop.window"),
    );
    Ok(())
}

#[test]
fn layers_refuse_bad_rates_and_configs_and_draw_no_key_for_them() -> Result<()> {
    let (vars, generator) = (VarMap::new(), generator(1));
    let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
    let of_linear =
        |drop_p: f64| DropConnectLinear::new(6, 3, drop_p, generator.clone(), vb.clone());
    let of_conv = |drop_p: f64, kernel: usize, config: Conv2dConfig| {
        DropConnectConv2d::new(4, 6, kernel, config, drop_p, generator.clone(), vb.clone())
    };
    let plain = Conv2dConfig::default();
    for drop_p in [-0.1, 1.1, f64::NAN] {
        refused(of_linear(drop_p), "drop_connect_linear: drop_p: expected a probability");
        refused(of_conv(drop_p, 3, plain), "drop_connect_conv2d: drop_p: expected a probability");
    }
    refused(of_conv(0.5, 0, plain), "drop_connect_conv2d: weight: expected a kernel");
    for groups in [0, 4] {
        let config = Conv2dConfig { groups, ..plain };
        refused(of_conv(0.5, 3, config), "drop_connect_conv2d: groups: expected");
    }
    assert!(vars.all_vars().is_empty(), "nothing is made for what is refused");

    let x = random(&[2, 6], DType::F32, 1)?;
    let all = of_linear(1.)?;
    refused(all.moments(&x), "drop_connect_linear: drop_p: expected a probability below 1");
    let none = of_linear(0.5)?.forward_sampled(&x, 0, MaskKey::new(1), |u| Ok(u.clone()));
    refused(none, "drop_connect_linear: samples: expected at least 1, got 0");
    assert_eq!(generator.state().counter, 0);
    Ok(())
}
