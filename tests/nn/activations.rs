//! Activations compute what candle's compute, near 0 and far from it, under candle's names.

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_dropout::functional::Activation as Fused;
use candle_dropout::nn::{self, Activation};
use cases::{DTYPES, epsilon, error, random};

use crate::agrees::{Call, agrees_in_all};

const ACTIVATIONS: [(Activation, Option<Fused>); 15] = [
    (Activation::Gelu, Some(Fused::GeluErf)),
    (Activation::NewGelu, Some(Fused::GeluTanh)),
    (Activation::Relu, Some(Fused::Relu)),
    (Activation::Relu2, Some(Fused::Relu2)),
    (Activation::Relu6, None),
    (Activation::Silu, Some(Fused::Silu)),
    (Activation::Sigmoid, Some(Fused::Sigmoid)),
    (Activation::HardSigmoid, None),
    (Activation::Swiglu, Some(Fused::SwiGlu)),
    (Activation::Swish, Some(Fused::Silu)),
    (Activation::Mish, None),
    (Activation::HardSwish, None),
    (Activation::Elu(0.7), None),
    (Activation::LeakyRelu(0.1), None),
    (Activation::GeluPytorchTanh, Some(Fused::GeluTanh)),
];

#[test]
fn activations() -> Result<()> {
    for (activation, fused) in ACTIVATIONS {
        let candles = candle_nn::Activation::from(activation);
        // Candle's own gradients of the GELUs have constants of six digits.
        let formula = move |x: &[Tensor]| match fused {
            Some(fused) => {
                let keep = Tensor::ones(candles.forward(&x[0])?.dims(), DType::U8, &Device::Cpu)?;
                cases::activation_dropout::formula(&x[0], None, fused, &keep, 1.)
            }
            None => candles.forward(&x[0]),
        };
        for dims in [vec![2], vec![3, 16], vec![2, 3, 34]] {
            let ours = move |x: &[Tensor]| x[0].apply(&activation);
            agrees_in_all(
                &format!("{activation:?}"),
                std::slice::from_ref(&dims),
                4,
                &ours,
                &formula,
            )?;
            for dtype in DTYPES {
                let x = random(&dims, dtype, 3)?;
                let wide = x.to_dtype(DType::F64)?.apply(&candles)?;
                let off = error(&x.apply(&activation)?.to_dtype(DType::F64)?, &wide)?;
                assert!(off <= 4. * epsilon(dtype) * 4., "{activation:?} {dtype:?}: {off}");
            }
        }
    }
    Ok(())
}

#[test]
fn activations_are_candles_by_name_and_back() -> Result<()> {
    for (activation, fused) in ACTIVATIONS {
        let candles = candle_nn::Activation::from(activation);
        assert_eq!(format!("{activation:?}"), format!("{candles:?}"));
        assert_eq!(Activation::from(candles), activation);
        let json = serde_json::to_string(&activation).expect("JSON");
        assert_eq!(json, serde_json::to_string(&candles).expect("JSON"));
        assert_eq!(serde_json::from_str::<Activation>(&json).expect("an activation"), activation);
        for ours in [Fused::try_from(activation), Fused::try_from(candles)] {
            match fused {
                Some(fused) => assert_eq!(ours?, fused),
                None => {
                    let error = ours.expect_err("no such form").to_string();
                    assert!(error.starts_with("activation: expected Gelu"), "{error}");
                    assert!(error.contains(&format!("got {activation:?}; ")), "{error}");
                }
            }
        }
    }
    for name in [
        "gelu",
        "gelu_new",
        "gelu_pytorch_tanh",
        "relu",
        "silu",
        "swish",
        "relu2",
        "mish",
        "newgelu",
    ] {
        let json = format!("{name:?}");
        let candles: candle_nn::Activation = serde_json::from_str(&json).expect(name);
        assert_eq!(serde_json::from_str::<Activation>(&json).expect(name), candles.into());
    }
    assert!(serde_json::from_str::<Activation>("\"geglu\"").is_err());
    assert_eq!(Activation::default(), candle_nn::Activation::default().into());
    Ok(())
}

/// Candle computes them for integers, which no kernel of ours takes.
#[test]
fn integers_are_left_to_candle() -> Result<()> {
    let x = Tensor::new(&[3i64, -2, 0], &Device::Cpu)?;
    let relu = x.apply(&Activation::Relu)?;
    assert_eq!(relu.to_vec1::<i64>()?, x.apply(&candle_nn::Activation::Relu)?.to_vec1::<i64>()?);
    Ok(())
}

#[test]
fn elementwise_functions() -> Result<()> {
    let selu = |x: &Tensor| -> Result<Tensor> {
        let negative = ((x.exp()? - 1.)? * f64::from(1.67f32))?;
        x.gt(0.)?.where_cond(x, &negative)? * f64::from(1.05f32)
    };
    let functions: [(&str, &Call, &Call); 5] = [
        ("silu", &|x| nn::ops::silu(&x[0]), &|x| candle_nn::ops::silu(&x[0])),
        ("swiglu", &|x| nn::ops::swiglu(&x[0]), &|x| candle_nn::ops::swiglu(&x[0])),
        ("sigmoid", &|x| nn::ops::sigmoid(&x[0]), &|x| candle_nn::ops::sigmoid(&x[0])),
        ("mish", &|x| nn::ops::mish(&x[0]), &|x| candle_nn::ops::mish(&x[0])),
        ("selu", &|x| nn::ops::selu(&x[0], 1.67, 1.05), &|x| selu(&x[0])),
    ];
    for (name, ours, candles) in functions {
        for dims in [vec![2], vec![3, 16], vec![2, 3, 34]] {
            agrees_in_all(name, &[dims], 4, ours, candles)?;
        }
    }
    let x = random(&[5, 7], DType::F32, 1)?;
    let theirs = candle_nn::ops::selu(&x, 1.67, 1.05)?.to_dtype(DType::F64)?;
    let off = error(&nn::ops::selu(&x, 1.67, 1.05)?.to_dtype(DType::F64)?, &theirs)?;
    assert!(off <= 4. * 4. * epsilon(DType::F32), "{off}");
    Ok(())
}

/// On both sides of where it is taken for saturated, and far beyond, where candle's gradient is no number.
#[test]
fn mish_is_its_formula_in_f64_near_0_and_far_from_it() -> Result<()> {
    let near = (-160..=200).map(|at| at as f32 / 8.);
    let xs: Vec<f32> = near.chain([11., 11.5, 20.5, 100., 300., -100., -300.]).collect();
    for dtype in DTYPES {
        let x = Var::from_tensor(&Tensor::new(&xs[..], &Device::Cpu)?.to_dtype(dtype)?)?;
        let y = nn::ops::mish(&x)?;
        let grads = y.sum_all()?.backward()?;
        let wide = |x: &Tensor| x.to_dtype(DType::F64)?.to_vec1::<f64>();
        let (ys, dys) = (wide(&y)?, wide(grads.get(&x).expect("a gradient"))?);
        let saturated = if dtype == DType::F64 { 20. } else { 11. };
        for ((x, y), dy) in wide(&x)?.into_iter().zip(ys).zip(dys) {
            let tanh = x.exp().ln_1p().tanh();
            let sigmoid = 1. / (1. + (-x).exp());
            let (expected, slope) = (x * tanh, tanh + x * (1. - tanh * tanh) * sigmoid);
            // Roundings of up to an epsilon in e^x, the logarithm and the tanh, and of half of one in the sum and
            // the product; none grows on the way: the derivative of the tanh is 1 at most, that of the logarithm
            // less, and s (1 - tanh(s)^2) less than 1 / 2.
            let off = (y - expected).abs();
            assert!(
                off <= 4. * epsilon(dtype) * x.abs(),
                "{dtype:?}: mish({x}) = {y}, not {expected}"
            );
            // The tanh, and x sigmoid(x) times what its square leaves of 1: twice its error and two roundings, in a
            // product of three factors.
            let off = (dy - slope).abs();
            let bound = epsilon(dtype) * (4. + 13. * x.abs() * sigmoid);
            assert!(off <= bound, "{dtype:?}: mish'({x}) = {dy}, not {slope}");
            // What is missing to 1 is less than a quarter of an epsilon.
            if x >= saturated {
                assert_eq!((y, dy), (x, 1.), "{dtype:?}: mish({x})");
            }
        }
    }
    let x = Var::new(&[300f32], &Device::Cpu)?;
    let candles = candle_nn::ops::mish(&x)?.backward()?.get(&x).expect("one").to_vec1::<f32>()?;
    assert!(candles[0].is_nan(), "candle-nn is mended: {candles:?}");
    Ok(())
}

/// Where candle's gradient is no number.
#[test]
fn far_from_0_values_and_gradients_are_numbers() -> Result<()> {
    let far: [f32; 9] = [-300., -100., -20., -12., 0., 12., 20., 100., 300.];
    for dtype in DTYPES {
        let x = Var::from_tensor(&Tensor::new(&far, &Device::Cpu)?.to_dtype(dtype)?)?;
        let gradient = |y: Tensor| -> Result<Vec<f64>> {
            let grads = y.sum_all()?.backward()?;
            grads.get(&x).expect("a gradient").to_dtype(DType::F64)?.to_vec1()
        };
        for (dy, x) in
            gradient(nn::ops::selu(&x, 1.5, 2.)?)?.iter().zip(far).filter(|(_, x)| x.abs() > 11.)
        {
            let expected = if x > 0. { 2. } else { 3. * f64::from(x).exp() };
            assert!((dy - expected).abs() <= 4. * epsilon(dtype), "selu'({x}) = {dy}");
        }
        for target in [0f32, 1.] {
            let targets = Tensor::full(target, far.len(), &Device::Cpu)?.to_dtype(dtype)?;
            let loss = nn::loss::binary_cross_entropy_with_logit(&x, &targets)?;
            assert_eq!(loss.dtype(), dtype);
            for (dx, x) in gradient(loss)?.iter().zip(far) {
                let expected =
                    (1. / (1. + (-f64::from(x)).exp()) - f64::from(target)) / far.len() as f64;
                assert!(
                    (dx - expected).abs() <= 4. * epsilon(dtype),
                    "bce'({x}) = {dx}, not {expected}"
                );
            }
        }
    }
    Ok(())
}
