//! What `dropout_add_norm` and the norms promise beyond their formula, which `ops.rs` checks.

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_dropout::{
    DropMask, LayerNorm, MaskKey, Norm, dropout_add, dropout_add_norm, layer_norm,
    layer_norm_no_bias, ops, rms_norm,
};
use candle_nn::{Linear, Optimizer, SGD, VarBuilder, VarMap};
use cases::{bits, random};

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

#[test]
fn a_large_mean_does_not_hurt_the_variance() -> Result<()> {
    let z = (random(&[4, 1000], DType::F32, 1)? + 3e4)?;
    let norm = Norm::layer_norm(Tensor::ones(1000, DType::F32, &Device::Cpu)?, None, 0.);
    let exact = cases::norm::formula(
        &z.to_dtype(DType::F64)?,
        &Norm::layer_norm(Tensor::ones(1000, DType::F64, &Device::Cpu)?, None, 0.),
    )?;
    let error = (norm.forward(&z)?.to_dtype(DType::F64)? - exact)?.abs()?.max_all()?;
    // The mean is known to a few units in the last place of 3e4, which are 2e-3 each.
    assert!(error.to_scalar::<f64>()? < 2e-2, "{error}");
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
    close(ops::layer_norm(&x, &weight, &bias, 1e-5)?, candles)?;
    let candles = candle_nn::ops::rms_norm(&x, &weight, 1e-5)?;
    close(ops::rms_norm(&x, &weight, 1e-5)?, candles)?;
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
