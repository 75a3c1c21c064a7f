//! The gated forms of `activation_dropout`, whose output is no shape of its input, and what it refuses.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::{Activation, DropMask, MaskKey, activation_dropout};
use cases::{bits, random};

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.max_all()?.to_scalar()
}

#[test]
fn gated_forms_and_their_gradients_agree_with_the_formula() -> Result<()> {
    let drop = DropMask::new(0.3, MaskKey::new(1))?;
    for (dtype, bound) in
        [(DType::F64, 1e-13), (DType::F32, 1e-4), (DType::F16, 0.05), (DType::BF16, 0.4)]
    {
        for (rows, cols) in [(1, 1), (5, 3), (70, 257), (3, 20_000)] {
            for activation in [Activation::SwiGlu, Activation::GeGlu] {
                for has_bias in [false, true] {
                    let x = random(&[rows, 2 * cols], dtype, 1)?;
                    let bias = random(&[2 * cols], dtype, 2)?;
                    let dy = random(&[rows, cols], dtype, 3)?;
                    let run = |dtype: DType, fused: bool| -> Result<Vec<Tensor>> {
                        let x = Var::from_tensor(&x.to_dtype(dtype)?)?;
                        let bias = Var::from_tensor(&bias.to_dtype(dtype)?)?;
                        let biased = has_bias.then_some(bias.as_tensor());
                        let y = if fused {
                            activation_dropout(&x, biased, activation, &drop)?
                        } else {
                            let keep = drop.to_tensor((rows, cols), &Device::Cpu)?;
                            let scale = drop.rate().scale().into();
                            cases::activation_dropout::formula(
                                &x, biased, activation, &keep, scale,
                            )?
                        };
                        let grads = (&y * dy.to_dtype(dtype)?)?.backward()?;
                        let mut results = vec![y, grads.get(&x).unwrap().clone()];
                        results.extend(has_bias.then(|| grads.get(&bias).unwrap().clone()));
                        Ok(results)
                    };
                    for (ours, exact) in run(dtype, true)?.iter().zip(run(DType::F64, false)?) {
                        let error = largest_difference(ours, &exact)?;
                        assert!(
                            error < bound,
                            "{dtype:?} [{rows}, {cols}] {activation:?}: {error}"
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn dropped_infinities_and_nans_vanish() -> Result<()> {
    let drop = DropMask::new(1., MaskKey::new(1))?;
    let x = Var::new(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.], &Device::Cpu)?;
    for activation in [
        Activation::GeluTanh,
        Activation::GeluErf,
        Activation::Silu,
        Activation::Relu,
        Activation::SwiGlu,
        Activation::GeGlu,
    ] {
        let y = activation_dropout(&x, None, activation, &drop)?;
        assert!(bits(&y)?.iter().all(|y| *y == 0), "{activation:?}");
        assert!(bits(y.backward()?.get(&x).unwrap())?.iter().all(|dx| *dx == 0), "{activation:?}");
    }
    Ok(())
}

#[test]
fn gradients_of_large_inputs_are_those_of_the_flat_ends() -> Result<()> {
    for (dtype, sizes) in [
        (DType::F64, [1e3, 6e4, 1e20, 1e200]),
        (DType::F32, [257., 6e4, 1e20, 3e38]),
        (DType::BF16, [257., 6e4, 1e20, 3e38]),
        (DType::F16, [257., 1e3, 1e4, 6e4]),
    ] {
        for activation in
            [Activation::GeluTanh, Activation::GeluErf, Activation::Silu, Activation::Relu]
        {
            let x = sizes.into_iter().flat_map(|x| [x, -x]).collect::<Vec<f64>>();
            let x = Var::from_tensor(&Tensor::new(x, &Device::Cpu)?.to_dtype(dtype)?)?;
            let y = activation_dropout(&x, None, activation, &DropMask::none())?;
            let dx = y.backward()?.get(&x).unwrap().to_dtype(DType::F64)?.to_vec1::<f64>()?;
            assert_eq!(dx, [1., 0., 1., 0., 1., 0., 1., 0.], "{activation:?} in {dtype:?}");
        }
        for activation in [Activation::SwiGlu, Activation::GeGlu] {
            // Gate and value side by side.
            let x: Vec<f64> = sizes.into_iter().flat_map(|x| [x, 0.5, -x, 0.5]).collect();
            let x = Tensor::from_vec(x, (8, 2), &Device::Cpu)?.to_dtype(dtype)?;
            let x = Var::from_tensor(&x)?;
            let y = activation_dropout(&x, None, activation, &DropMask::none())?;
            let dx = y.backward()?.get(&x).unwrap().to_dtype(DType::F64)?.to_vec2::<f64>()?;
            let x = x.to_dtype(DType::F64)?.to_vec2::<f64>()?;
            for (dx, x) in dx.iter().zip(&x) {
                let expected = if x[0] > 0. { [0.5, x[0]] } else { [0., 0.] };
                assert_eq!(*dx, expected, "{activation:?} in {dtype:?} at {}", x[0]);
            }
        }
    }
    Ok(())
}

#[test]
fn an_odd_number_of_columns_is_refused_by_a_gated_form() -> Result<()> {
    let x = random(&[2, 3], DType::F32, 1)?;
    let error = activation_dropout(&x, None, Activation::SwiGlu, &DropMask::none()).unwrap_err();
    assert!(error.to_string().starts_with(
        "activation_dropout: x: expected an even last dimension for SwiGlu, got [2, 3]"
    ));
    Ok(())
}
