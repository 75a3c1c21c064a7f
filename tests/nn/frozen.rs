//! What `nn` leaves to candle-nn has gradients, in training and in evaluation: none of it trains as if frozen.

use candle_core::{DType, Device, Error, Module, ModuleT, Result, Tensor, Var};
use candle_dropout::nn::{self, RNN, VarBuilder, VarMap};
use candle_dropout::seeded_var_builder;
use cases::{epsilon, error, random};

use crate::fails;

type Layer = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// Makes a layer of variables, which is called with a variable of these dims; the gradient of each is that of
/// differences in f64, along one direction through all of them, and none but `without` is all zeros.
fn learns(
    name: &str,
    dims: &[usize],
    without: &[&str],
    layer: impl Fn(VarBuilder) -> Result<Layer>,
) -> Result<()> {
    let vars = VarMap::new();
    let layer = layer(seeded_var_builder(&vars, 3, DType::F64, &Device::Cpu))?;
    let x = Var::from_tensor(&random(dims, DType::F64, 1)?)?;
    let dy = random(layer(&x)?.dims(), DType::F64, 2)?;
    let loss = || -> Result<Tensor> { (layer(&x)? * &dy)?.sum_all() };
    let mut named: Vec<(String, Var)> = vars
        .data()
        .lock()
        .expect("no panic before")
        .iter()
        .map(|(n, v)| (n.clone(), v.clone()))
        .collect();
    named.sort_by(|(a, _), (b, _)| a.cmp(b));
    named.retain(|(name, _)| !without.contains(&name.as_str()));
    named.push(("the input".into(), x.clone()));
    let grads = loss()?.backward()?;
    let (h, mut slope) = (1e-6, 0.);
    let mut directions = Vec::new();
    for (at, (var_name, var)) in named.iter().enumerate() {
        let grad = grads.get(var).unwrap_or_else(|| panic!("{name}: {var_name} has no gradient"));
        let sum = grad.abs()?.sum_all()?.to_scalar::<f64>()?;
        assert!(sum.is_finite() && sum > 0., "{name}: {var_name}: {sum}");
        let direction = random(var.dims(), DType::F64, 10 + at as u64)?;
        slope += (grad * &direction)?.sum_all()?.to_scalar::<f64>()?;
        directions.push((var.as_tensor().copy()?, direction));
    }
    let at = |step: f64| -> Result<f64> {
        for ((_, var), (value, direction)) in named.iter().zip(&directions) {
            var.set(&(value + (direction * step)?)?)?;
        }
        loss()?.to_scalar()
    };
    let difference = (at(h)? - at(-h)?) / (2. * h);
    // Differences of f64 at a step of 1e-6 have nine digits or so.
    let off = (difference - slope).abs();
    assert!(off <= 1e-6 * slope.abs().max(1.), "{name}: {difference} and {slope}");
    Ok(())
}

#[test]
fn batch_norm_learns_in_training_and_in_evaluation() -> Result<()> {
    for train in [true, false] {
        for dims in [&[5, 3][..], &[4, 3, 7], &[2, 3, 4, 5]] {
            let of_input = ["running_mean", "running_var"];
            learns("batch_norm", dims, &of_input, |vb| {
                let layer = nn::batch_norm(3, 1e-5, vb)?;
                Ok(Box::new(move |x| layer.forward_t(x, train)))
            })?;
        }
    }
    Ok(())
}

#[test]
fn group_norm_embedding_and_prelu_learn() -> Result<()> {
    for groups in [1, 2, 6] {
        learns("group_norm", &[2, 6, 5, 3], &[], |vb| {
            let layer = nn::group_norm(groups, 6, 1e-5, vb)?;
            Ok(Box::new(move |x| layer.forward(x)))
        })?;
    }
    learns("embedding", &[4, 3], &[], |vb| {
        let layer = nn::embedding(5, 3, vb)?;
        let ids = Tensor::new(&[4u32, 0, 1, 4], &Device::Cpu)?;
        Ok(Box::new(move |x| layer.forward(&ids)? * x))
    })?;
    for channels in [None, Some(3)] {
        learns("prelu", &[2, 3, 5], &[], |vb| {
            let layer = nn::prelu(channels, vb)?;
            Ok(Box::new(move |x| layer.forward(x)))
        })?;
    }
    Ok(())
}

#[test]
fn convolutions_learn() -> Result<()> {
    for (stride, padding, dilation, groups) in
        [(1, 0, 1, 1), (1, 1, 1, 2), (2, 1, 1, 1), (2, 1, 1, 2), (3, 2, 2, 2)]
    {
        learns(&format!("conv1d {stride} {padding} {dilation} {groups}"), &[2, 4, 9], &[], |vb| {
            let config =
                nn::Conv1dConfig { stride, padding, dilation, groups, ..Default::default() };
            let layer = nn::conv1d(4, 6, 3, config, vb)?;
            Ok(Box::new(move |x| layer.forward(x)))
        })?;
        learns(
            &format!("conv2d {stride} {padding} {dilation} {groups}"),
            &[2, 4, 7, 7],
            &[],
            |vb| {
                let config =
                    nn::Conv2dConfig { stride, padding, dilation, groups, ..Default::default() };
                let layer = nn::conv2d(4, 6, 3, config, vb)?;
                Ok(Box::new(move |x| layer.forward(x)))
            },
        )?;
    }
    for (padding, output_padding, stride, dilation) in
        [(0, 0, 1, 1), (1, 0, 2, 1), (1, 1, 2, 1), (0, 0, 1, 2), (2, 2, 3, 2), (0, 1, 3, 1)]
    {
        learns("conv_transpose2d", &[2, 4, 5, 6], &[], |vb| {
            let config = nn::ConvTranspose2dConfig { padding, output_padding, stride, dilation };
            let layer = nn::conv_transpose2d(4, 6, 3, config, vb)?;
            Ok(Box::new(move |x| layer.forward(x)))
        })?;
    }
    // One sequence longer, with what no window reaches.
    learns("conv1d", &[3, 2, 10], &[], |vb| {
        let config = nn::Conv1dConfig { stride: 2, ..Default::default() };
        let layer = nn::conv1d_no_bias(2, 3, 3, config, vb)?;
        Ok(Box::new(move |x| layer.forward(x)))
    })?;
    for (padding, output_padding, stride, dilation, groups) in
        [(0, 0, 1, 1, 1), (1, 0, 2, 1, 2), (1, 1, 2, 2, 1), (0, 1, 3, 1, 2)]
    {
        learns("conv_transpose1d", &[3, 4, 5], &[], |vb| {
            let config =
                nn::ConvTranspose1dConfig { padding, output_padding, stride, dilation, groups };
            let layer = nn::conv_transpose1d(4, 6, 3, config, vb)?;
            Ok(Box::new(move |x| layer.forward(x)))
        })?;
    }
    Ok(())
}

#[test]
fn recurrent_layers_learn() -> Result<()> {
    learns("lstm", &[2, 4, 3], &[], |vb| {
        let layer = nn::lstm(3, 5, Default::default(), vb)?;
        Ok(Box::new(move |x| layer.states_to_tensor(&layer.seq(x)?)))
    })?;
    learns("gru", &[2, 4, 3], &[], |vb| {
        let layer = nn::gru(3, 5, Default::default(), vb)?;
        Ok(Box::new(move |x| layer.states_to_tensor(&layer.seq(x)?)))
    })
}

#[test]
fn functions_that_are_candles_own_have_gradients() -> Result<()> {
    let target = random(&[4, 3], DType::F64, 5)?;
    let classes = Tensor::new(&[2u32, 0, 1, 2], &Device::Cpu)?;
    let positive = |x: &Tensor| x.sqr()? + 0.5;
    let functions: [(&str, &[usize], Layer); 12] = [
        ("mse", &[4, 3], {
            let target = target.clone();
            Box::new(move |x| nn::loss::mse(x, &target))
        }),
        ("huber", &[4, 3], Box::new(move |x| nn::loss::huber(x, &target, 0.7))),
        ("nll", &[4, 3], Box::new(move |x| nn::loss::nll(x, &classes))),
        ("hard_sigmoid", &[4, 3], Box::new(|x| nn::ops::hard_sigmoid(&(x * 2.)?))),
        ("leaky_relu", &[4, 3], Box::new(|x| nn::ops::leaky_relu(x, 0.1))),
        ("pixel_shuffle", &[1, 8, 2, 3], Box::new(|x| nn::ops::pixel_shuffle(x, 2))),
        ("pixel_unshuffle", &[1, 2, 4, 6], Box::new(|x| nn::ops::pixel_unshuffle(x, 2))),
        ("replication_pad2d", &[1, 2, 4, 6], Box::new(|x| nn::ops::replication_pad2d(x, 1))),
        ("identity", &[4, 3], Box::new(|x| nn::ops::Identity.forward(x))),
        (
            "rms_norm_slow",
            &[4, 3],
            Box::new(move |x| nn::ops::rms_norm_slow(x, &positive(&x.get(0)?)?, 1e-5)),
        ),
        (
            "layer_norm_slow",
            &[4, 3],
            Box::new(move |x| {
                nn::ops::layer_norm_slow(x, &positive(&x.get(0)?)?, &x.get(1)?, 1e-5)
            }),
        ),
        (
            "rope_i_slow",
            &[1, 2, 3, 4],
            Box::new(|x| {
                let table = x.get(0)?.get(0)?.narrow(1, 0, 2)?;
                nn::rotary_emb::rope_i_slow(x, &table, &table)
            }),
        ),
    ];
    for (name, dims, function) in functions {
        let function = std::rc::Rc::new(function);
        learns(name, dims, &[], |_| {
            let function = function.clone();
            Ok(Box::new(move |x| function(x)))
        })?;
    }
    Ok(())
}

/// With a gradient and without, and of a strided weight, which candle's takes for another.
#[test]
fn a_convolution_of_sequences_is_candles() -> Result<()> {
    for (stride, padding, dilation, groups) in [(1, 0, 1, 1), (2, 1, 1, 2), (3, 2, 2, 1)] {
        let config = nn::Conv1dConfig { stride, padding, dilation, groups, ..Default::default() };
        let x = random(&[2, 4, 10], DType::F64, 1)?;
        let weight = random(&[6, 4 / groups, 3], DType::F64, 2)?;
        let bias = Some(random(&[6], DType::F64, 3)?);
        let candles = candle_nn::Conv1d::new(weight.clone(), bias.clone(), config).forward(&x)?;
        let strided = weight.transpose(0, 2)?.contiguous()?.transpose(0, 2)?;
        let tracked = Var::from_tensor(&weight)?.as_tensor().clone();
        for weight in [weight, strided, tracked] {
            let ours = nn::Conv1d::new(weight, bias.clone(), config).forward(&x)?;
            let off = error(&ours, &candles)?;
            assert!(off <= epsilon(DType::F64) * 12. * 4., "{config:?}: {off}");
        }
    }
    let layer = nn::Conv1d::new(
        Var::zeros((1, 1, 5), DType::F32, &Device::Cpu)?.as_tensor().clone(),
        None,
        Default::default(),
    );
    let got = ["conv1d: x: expected at least 5 positions", "got 3; pad it"];
    fails(layer.forward(&random(&[1, 1, 3], DType::F32, 1)?), &got);
    let got = ["conv1d: x: expected [B, in, L]", "got [1, 3]"];
    fails(layer.forward(&random(&[1, 3], DType::F32, 1)?), &got);
    Ok(())
}

/// Why `Conv1d` is replaced.
#[test]
fn candles_gradient_of_conv1d_is_another() -> Result<()> {
    let x = Var::from_tensor(&random(&[2, 1, 5], DType::F64, 1)?)?;
    let weight = random(&[2, 1, 3], DType::F64, 2)?;
    let dy = random(&[2, 2, 3], DType::F64, 3)?;
    let gradient = |y: Tensor| -> Result<Tensor> {
        Ok((y * &dy)?.sum_all()?.backward()?.get(&x).expect("a gradient").clone())
    };
    let ours = nn::Conv1d::new(weight.clone(), None, Default::default()).forward(&x)?;
    let candles = candle_nn::Conv1d::new(weight, None, Default::default()).forward(&x)?;
    assert!(error(&ours, &candles)? < 1e-12);
    let off = error(&gradient(ours)?, &gradient(candles)?)?;
    assert!(off > 0.1, "candle is mended: {off}");
    Ok(())
}

/// Batch entry by batch entry, which candle computes rightly, too.
#[test]
fn a_transposed_convolution_of_sequences_is_candles() -> Result<()> {
    for (padding, output_padding, stride, dilation, groups) in
        [(0, 0, 1, 1, 1), (1, 0, 2, 1, 2), (1, 1, 2, 2, 1), (0, 1, 3, 1, 2), (2, 0, 1, 1, 1)]
    {
        let config =
            nn::ConvTranspose1dConfig { padding, output_padding, stride, dilation, groups };
        let x = random(&[3, 4, 5], DType::F64, 1)?;
        let weight = random(&[4, 6 / groups, 3], DType::F64, 2)?;
        let bias = Some(random(&[6], DType::F64, 3)?);
        let ours = nn::ConvTranspose1d::new(weight.clone(), bias.clone(), config).forward(&x)?;
        let candles = candle_nn::ConvTranspose1d::new(weight, bias, config);
        for at in 0..3 {
            let off =
                error(&ours.narrow(0, at, 1)?, &candles.forward(&x.narrow(0, at, 1)?.copy()?)?)?;
            assert!(off <= epsilon(DType::F64) * 12. * 4., "{config:?}: {off}");
        }
    }
    let layer = |padding| {
        let config = nn::ConvTranspose1dConfig { padding, ..Default::default() };
        Ok::<_, Error>(nn::ConvTranspose1d::new(random(&[4, 6, 3], DType::F32, 1)?, None, config))
    };
    let x = random(&[1, 4, 2], DType::F32, 1)?;
    let got = ["conv_transpose1d: padding: expected less than half of 4 positions, got 2"];
    fails(layer(2)?.forward(&x), &got);
    fails(
        layer(0)?.forward(&x.get(0)?),
        &["conv_transpose1d: x: expected [B, in, L]", "got [4, 2]"],
    );
    fails(
        layer(0)?.forward(&x.narrow(1, 0, 3)?),
        &["conv_transpose1d: x: expected 4 channels", "got 3"],
    );
    Ok(())
}

/// With a gradient and without.
#[test]
fn configurations_of_no_convolution_are_refused() -> Result<()> {
    let x = random(&[1, 4, 5], DType::F32, 1)?;
    let tracked = Var::from_tensor(&x)?;
    let refused = |[kernel, stride, dilation, groups]: [usize; 4], expected: &str| -> Result<()> {
        let weight = Tensor::zeros((4, 4, kernel), DType::F32, &Device::Cpu)?;
        let config = nn::Conv1dConfig { stride, dilation, groups, ..Default::default() };
        let conv = nn::Conv1d::new(weight.clone(), None, config);
        let (padding, output_padding) = (0, 0);
        let config =
            nn::ConvTranspose1dConfig { padding, output_padding, stride, dilation, groups };
        let transposed = nn::ConvTranspose1d::new(weight, None, config);
        for x in [&x, tracked.as_tensor()] {
            fails(conv.forward(x), &[&format!("conv1d: {expected}")]);
            fails(transposed.forward(x), &[&format!("conv_transpose1d: {expected}")]);
        }
        Ok(())
    };
    refused([0, 1, 1, 1], "weight: expected a kernel of at least 1 position, got 0; build")?;
    refused([3, 0, 1, 1], "stride: expected at least 1, got 0; set it in the config")?;
    refused([3, 1, 0, 1], "dilation: expected at least 1, got 0; set it in the config")?;
    refused([3, 1, 1, 0], "groups: expected at least 1, got 0; set it in the config")?;
    let layer =
        nn::ConvTranspose1d::new(random(&[4, 4, 3], DType::F32, 2)?, None, Default::default());
    let empty = layer.forward(&Tensor::zeros((1, 4, 0), DType::F32, &Device::Cpu)?);
    fails(empty, &["conv_transpose1d: x: expected at least 1 position, got [1, 4, 0]"]);
    Ok(())
}
