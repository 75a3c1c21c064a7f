//! What `dropout_add_norm` and the norms promise beyond their formula, which `ops.rs` checks.

use std::cell::Cell;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_dropout::functional::{Norm, dropout_add, dropout_add_norm};
use candle_dropout::nn::{layer_norm, layer_norm_no_bias, rms_norm};
use candle_dropout::{DropMask, LayerNorm, MaskKey, functional};
use candle_nn::{Linear, Optimizer, SGD, VarBuilder, VarMap};
use cases::norm::far::{Far, TOLERANCE};
use cases::{bits, random};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

fn norms(cols: usize, dtype: DType) -> Result<[Norm; 2]> {
    let (weight, bias) = (random(&[cols], dtype, 5)?, random(&[cols], dtype, 6)?);
    Ok([Norm::layer_norm(weight.clone(), Some(bias), 1e-5), Norm::rms_norm(weight, 1e-5)])
}

#[test]
fn it_is_dropout_add_and_then_the_norm_bit_for_bit() -> Result<()> {
    for dtype in DTYPES {
        for dims in [[3, 5], [70, 257], [2, 20_000]] {
            let args = (0..2).map(|seed| random(&dims, dtype, seed)).collect::<Result<Vec<_>>>()?;
            let bias = random(&[dims[1]], dtype, 3)?;
            for drop in [DropMask::none(), DropMask::new(0.3, MaskKey::new(1))?] {
                for norm in norms(dims[1], dtype)? {
                    for bias in [None, Some(&bias)] {
                        let (x, residual) = (&args[0], &args[1]);
                        let (z, n) = dropout_add_norm(x, Some(residual), bias, &norm, &drop)?;
                        let stream = dropout_add(x, residual, bias, &drop)?;
                        assert_eq!(bits(&z)?, bits(&stream)?, "z in {dtype:?}");
                        assert_eq!(bits(&n)?, bits(&norm.forward(&stream)?)?, "n in {dtype:?}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn either_result_alone_has_its_gradient() -> Result<()> {
    let drop = DropMask::new(0.3, MaskKey::new(1))?;
    let var = |dims: &[usize], seed| Var::from_tensor(&random(dims, DType::F64, seed)?);
    let (x, residual) = (var(&[6, 9], 1)?, var(&[6, 9], 2)?);
    for norm in norms(9, DType::F64)? {
        let fused = dropout_add_norm(&x, Some(&residual), None, &norm, &drop)?;
        let stream = dropout_add(&x, &residual, None, &drop)?;
        let chain = (stream.clone(), norm.forward(&stream)?);
        for (ours, expected) in [(fused.0, chain.0), (fused.1, chain.1)] {
            let (ours, expected) = (ours.sqr()?.backward()?, expected.sqr()?.backward()?);
            for var in [&x, &residual] {
                assert_eq!(bits(ours.get(var).unwrap())?, bits(expected.get(var).unwrap())?);
            }
        }
    }
    Ok(())
}

/// Narrow and wide rows, few and many; means up to 1e6 and constant rows.
fn far() -> impl Strategy<Value = Far> {
    let sizes = prop_oneof![
        4 => (1usize..2000, 1usize..9),
        2 => (1usize..70, 1usize..3000),
        1 => (1usize..40_000, 1usize..3),
        1 => (1usize..4, 1usize..30_000),
    ];
    let mean = prop_oneof![Just(0.), (-2f64..6.).prop_map(|power| 10f64.powf(power))];
    let deviation =
        prop_oneof![1 => Just(0.), 3 => (-4f64..0.).prop_map(|power| 10f64.powf(power))];
    let eps = prop_oneof![Just(1e-5f32), Just(1e-12)];
    (sizes, mean, deviation, eps, any::<u64>()).prop_map(
        |((cols, rows), mean, deviation, eps, seed)| Far { rows, cols, mean, deviation, eps, seed },
    )
}

/// Output and gradients, of the norm alone or of a residual stream without a branch.
fn results_far_from_0(far: &Far, fused: bool) -> Result<[Vec<f32>; 4]> {
    let (rows, cols, tensors) = (far.rows, far.cols, far.tensors());
    let var =
        |x: Vec<f32>, dims: &[usize]| Var::from_tensor(&Tensor::from_vec(x, dims, &Device::Cpu)?);
    let dy = Tensor::from_vec(tensors.dy, (rows, cols), &Device::Cpu)?;
    let x = var(tensors.x, &[rows, cols])?;
    let (weight, bias) = (var(tensors.weight, &[cols])?, var(tensors.bias, &[cols])?);
    let of_bias = Some(bias.as_tensor().clone());
    let norm = Norm::layer_norm(weight.as_tensor().clone(), of_bias, far.eps.into());
    let y = if fused {
        let drop = DropMask::new(0.5, MaskKey::new(far.seed))?;
        dropout_add_norm(&x.zeros_like()?, Some(&x), None, &norm, &drop)?.1
    } else {
        norm.forward(&x)?
    };
    let grads = (&y * dy)?.backward()?;
    let grads = [&x, &weight, &bias].map(|var| grads.get(var).expect("a gradient"));
    let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
    Ok([values(&y)?, values(grads[0])?, values(grads[1])?, values(grads[2])?])
}

#[test]
fn rows_far_from_0_keep_their_digits_forward_and_backward() {
    let judged = Cell::new([0; 4]);
    let config = ProptestConfig { cases: 384, failure_persistence: None, ..Default::default() };
    let outcome = TestRunner::new(config).run(&(far(), any::<bool>()), |(far, fused)| {
        let (got, exact) = (results_far_from_0(&far, fused).unwrap(), far.tensors().exact(far.eps));
        for (at, (got, exact)) in got.iter().zip(&exact).enumerate() {
            if !exact.is_known() {
                continue;
            }
            let (error, what) = (exact.error(got), ["y", "dx", "dweight", "dbias"][at]);
            prop_assert!(
                error <= TOLERANCE,
                "{} is off by {:e} of its largest element",
                what,
                error
            );
            let mut count = judged.get();
            count[at] += 1;
            judged.set(count);
        }
        Ok(())
    });
    outcome.unwrap();
    // No more than a few are left out.
    assert!(judged.get().into_iter().all(|count| count > 300), "{:?}", judged.get());
}

#[test]
fn of_a_constant_row_exactly_the_bias_is_left() -> Result<()> {
    for dtype in DTYPES {
        for value in [1972.7168f64, 1.59e5, -1e6, 3e12, 1e38] {
            for cols in [1, 3, 768, 1031, 20_000] {
                let x = Tensor::full(value, (2, cols), &Device::Cpu)?.to_dtype(dtype)?;
                if dtype == DType::F16 && value.abs() > 6e4 {
                    continue;
                }
                let (weight, bias) = (random(&[cols], dtype, 1)?, random(&[cols], dtype, 2)?);
                let norm = Norm::layer_norm(weight, Some(bias.clone()), 1e-5);
                let y = norm.forward(&x)?;
                assert_eq!(bits(&y.get(1)?)?, bits(&bias)?, "{cols} times {value} in {dtype:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn of_a_constant_gradient_nothing_is_left() -> Result<()> {
    for value in [1f32, 0.1, 1.59e5, 1e38] {
        for cols in [1, 3, 768, 1031] {
            let x = Var::from_tensor(&random(&[4, cols], DType::F32, 1)?)?;
            let norm = Norm::layer_norm(Tensor::full(value, cols, &Device::Cpu)?, None, 1e-5);
            let grads = norm.forward(&x)?.backward()?;
            let dx = grads.get(&x).expect("a gradient").abs()?.max_all()?.to_scalar::<f32>()?;
            assert_eq!(dx, 0., "{cols} times {value}");
        }
    }
    Ok(())
}

/// In f64 the mean is rounded, too.
#[test]
fn rows_of_f64_far_from_0_keep_their_digits() -> Result<()> {
    let near = (random(&[4, 768], DType::F64, 1)? * 1024.)?.round()?;
    let norm = |dtype| {
        Ok::<_, candle_core::Error>(Norm::layer_norm(
            Tensor::ones(768, dtype, &Device::Cpu)?,
            None,
            1e-5,
        ))
    };
    // Whole numbers, of which the sums are exact.
    let far = (&near + 1e15)?;
    let [near, far] = [near, far].map(|x| norm(DType::F64)?.forward(&x));
    assert!((near? - far?)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-14);
    Ok(())
}

/// The linear layer, behind which lies a norm, of a model that learns to double its input.
fn trained(norm: impl Fn(VarBuilder) -> Result<Box<dyn Module>>) -> Result<(Tensor, Tensor)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let weight = Var::from_tensor(&random(&[6, 6], DType::F32, 1)?)?;
    let first = Linear::new(weight.as_tensor().clone(), None);
    let (norm, before) = (norm(vb)?, weight.as_tensor().copy()?);
    let mut all = vars.all_vars();
    all.push(weight.clone());
    let mut sgd = SGD::new(all, 0.05)?;
    let x = random(&[32, 6], DType::F32, 2)?;
    for _ in 0..5 {
        let y = norm.forward(&first.forward(&x)?)?;
        sgd.backward_step(&(y - (&x * 2.)?)?.sqr()?.mean_all()?)?;
    }
    Ok((before, weight.as_tensor().copy()?))
}

#[test]
fn what_lies_before_candles_norm_is_frozen_and_before_ours_learns() -> Result<()> {
    let (before, after) = trained(|vb| Ok(Box::new(candle_nn::layer_norm(6, 1e-5, vb)?)))?;
    assert_eq!(bits(&before)?, bits(&after)?, "candle's LayerNorm passes gradients on by now");
    let (before, after) = trained(|vb| Ok(Box::new(candle_nn::rms_norm(6, 1e-5, vb)?)))?;
    assert_eq!(bits(&before)?, bits(&after)?, "candle's RmsNorm passes gradients on by now");

    let (before, after) = trained(|vb| Ok(Box::new(layer_norm(6, 1e-5, vb)?)))?;
    assert_ne!(bits(&before)?, bits(&after)?);
    let (before, after) = trained(|vb| Ok(Box::new(rms_norm(6, 1e-5, vb)?)))?;
    assert_ne!(bits(&before)?, bits(&after)?);
    Ok(())
}

#[test]
fn layers_and_functions_compute_what_candles_do() -> Result<()> {
    let vars = VarMap::new();
    let vb = |name| VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).pp(name);
    let x = random(&[3, 7], DType::F32, 1)?;
    let close = |ours: Tensor, candles: Tensor| -> Result<()> {
        assert!((ours - candles)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5);
        Ok(())
    };
    let ours = layer_norm(7, 1e-5, vb("a"))?;
    assert!(ours.bias().is_some() && ours.remove_mean() && ours.eps() == 1e-5);
    let candles = candle_nn::layer_norm(7, 1e-5, vb("a"))?;
    close(ours.forward(&x)?, candles.forward(&x)?)?;
    let (ours, candles) =
        (layer_norm_no_bias(7, 1e-5, vb("b"))?, candle_nn::layer_norm_no_bias(7, 1e-5, vb("b"))?);
    close(ours.forward(&x)?, candles.forward(&x)?)?;
    let (ours, candles) = (rms_norm(7, 1e-5, vb("c"))?, candle_nn::rms_norm(7, 1e-5, vb("c"))?);
    close(ours.forward(&x)?, candles.forward(&x)?)?;
    assert_eq!(vars.all_vars().len(), 4);

    let (weight, bias) = (random(&[7], DType::F32, 2)?, random(&[7], DType::F32, 3)?);
    let candles = candle_nn::ops::layer_norm(&x, &weight, &bias, 1e-5)?;
    close(functional::layer_norm(&x, &weight, &bias, 1e-5)?, candles)?;
    let candles = candle_nn::ops::rms_norm(&x, &weight, 1e-5)?;
    close(functional::rms_norm(&x, &weight, 1e-5)?, candles)?;
    let layer = LayerNorm::new(weight.clone(), bias, 1e-5);
    assert_eq!(bits(layer.weight())?, bits(&weight)?);
    Ok(())
}

#[test]
fn old_parameter_names_are_found() -> Result<()> {
    let tensors = [("gamma", 2f32), ("beta", 3.)]
        .map(|(name, value)| (name.to_string(), Tensor::new(&[value; 2], &Device::Cpu).unwrap()));
    let vb = VarBuilder::from_tensors(tensors.into(), DType::F32, &Device::Cpu);
    let n = layer_norm(2, 0., vb)?.forward(&Tensor::new(&[[1f32, 3.]], &Device::Cpu)?)?;
    assert_eq!(n.to_vec2::<f32>()?, [[1., 5.]]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let (x, drop) = (random(&[3, 4], DType::F32, 1)?, DropMask::none());
    let one = |cols| Tensor::ones(cols, DType::F32, &Device::Cpu);
    let error = |x: &Tensor, residual: Option<&Tensor>, bias: Option<&Tensor>, norm: &Norm| {
        dropout_add_norm(x, residual, bias, norm, &drop).unwrap_err().to_string()
    };
    let fits = Norm::rms_norm(one(4)?, 1e-5);
    for (message, expected) in [
        (error(&x.to_dtype(DType::U8)?, None, None, &fits), "dropout_add_norm: x: expected dtype"),
        (
            error(&x, Some(&one(4)?), None, &fits),
            "dropout_add_norm: residual: expected shape [3, 4]",
        ),
        (error(&x, None, Some(&one(3)?), &fits), "dropout_add_norm: bias: expected shape [4]"),
        (
            error(&x, None, None, &Norm::rms_norm(one(5)?, 1e-5)),
            "dropout_add_norm: norm.weight: expected shape [4]",
        ),
        (
            error(&x, None, None, &Norm::layer_norm(one(4)?, Some(one(3)?), 1e-5)),
            "dropout_add_norm: norm.bias: expected shape [4]",
        ),
        (
            error(&x, None, None, &Norm::rms_norm(one(4)?.to_dtype(DType::F64)?, 1e-5)),
            "dropout_add_norm: norm.weight: expected dtype F32",
        ),
        (
            error(&x, None, None, &Norm::rms_norm(one(4)?, -1.)),
            "dropout_add_norm: norm.eps: expected a finite number of at least 0, got -1",
        ),
    ] {
        assert!(message.starts_with(expected), "{message}");
    }
    assert!(fits.forward(&x.narrow(1, 0, 3)?).unwrap_err().to_string().starts_with("norm: norm."));
    Ok(())
}
