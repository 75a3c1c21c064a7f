//! The gated forms of `activation_dropout`, whose output is no shape of its input, also of two tensors, and what
//! they refuse.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{Activation, activation_dropout, glu_dropout};
use candle_dropout::{DropMask, MaskKey, compose};
use cases::activation_dropout::{GATED, PLAIN};
use cases::{DTYPES, bits, random};

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
            for activation in GATED {
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
                        // A square more: what is rounded is four times as large as of the others.
                        let size = if activation == Activation::Relu2Glu { 4. } else { 1. };
                        assert!(
                            error < size * bound,
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
    for composed in [false, true] {
        let _composed = composed.then(compose);
        let drop = DropMask::new(1., MaskKey::new(1))?;
        let x = Var::new(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.], &Device::Cpu)?;
        for activation in PLAIN.into_iter().chain(GATED) {
            let y = activation_dropout(&x, None, activation, &drop)?;
            assert!(bits(&y)?.iter().all(|y| *y == 0), "{activation:?}");
            assert!(
                bits(y.backward()?.get(&x).unwrap())?.iter().all(|dx| *dx == 0),
                "{activation:?}"
            );
        }
        let up = Var::new(&[1f32, f32::NAN, 2., f32::INFINITY], &Device::Cpu)?;
        for activation in GATED {
            let y = glu_dropout(&x, &up, activation, &drop)?;
            let grads = y.backward()?;
            for zeros in [&y, grads.get(&x).unwrap(), grads.get(&up).unwrap()] {
                assert!(bits(zeros)?.iter().all(|zero| *zero == 0), "{activation:?}");
            }
        }
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
        // As steep as the input at its end, or flat.
        let identities =
            [Activation::GeluTanh, Activation::GeluErf, Activation::Silu, Activation::QuickGelu];
        for activation in identities.into_iter().chain([Activation::Relu]) {
            let x = sizes.into_iter().flat_map(|x| [x, -x]).collect::<Vec<f64>>();
            let x = Var::from_tensor(&Tensor::new(x, &Device::Cpu)?.to_dtype(dtype)?)?;
            let y = activation_dropout(&x, None, activation, &DropMask::none())?;
            let dx = y.backward()?.get(&x).unwrap().to_dtype(DType::F64)?.to_vec1::<f64>()?;
            assert_eq!(dx, [1., 0., 1., 0., 1., 0., 1., 0.], "{activation:?} in {dtype:?}");
        }
        for activation in [Activation::Tanh, Activation::Sigmoid] {
            let x = sizes.into_iter().flat_map(|x| [x, -x]).collect::<Vec<f64>>();
            let x = Var::from_tensor(&Tensor::new(x, &Device::Cpu)?.to_dtype(dtype)?)?;
            let y = activation_dropout(&x, None, activation, &DropMask::none())?;
            let dx = y.backward()?.get(&x).unwrap().to_dtype(DType::F64)?.to_vec1::<f64>()?;
            assert_eq!(dx, [0.; 8], "{activation:?} in {dtype:?}");
        }
        let flat_or_straight = GATED.into_iter().filter(|activation| {
            !matches!(activation, Activation::Relu2Glu | Activation::TanhGlu | Activation::Glu)
        });
        for activation in flat_or_straight {
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

/// How gate and values of shape `[2, 3, cols]` may lie, and the variables that they are parts of.
type Apart = (&'static str, Vec<Var>, [Tensor; 2]);

fn apart(cols: usize, dtype: DType) -> Result<Vec<Apart>> {
    let var = |dims: &[usize], seed| Var::from_tensor(&random(dims, dtype, seed)?);
    let (gate, up, both) =
        (var(&[2, 3, cols], 1)?, var(&[2, 3, cols], 2)?, var(&[2, 3, 2 * cols], 3)?);
    let [left, right] = [both.narrow(2, 0, cols)?, both.narrow(2, cols, cols)?];
    let (wide, swapped, row) =
        (var(&[2, 3, cols + 5], 4)?, var(&[3, 2, cols], 5)?, var(&[cols], 6)?);
    let (rows, columns) = (swapped.transpose(0, 1)?, row.broadcast_as((2, 3, cols))?);
    let parts = [wide.narrow(2, 1, cols)?, wide.narrow(2, 4, cols)?];
    let [gate_and_up, gate_alone] = [vec![gate.clone(), up.clone()], vec![gate.clone()]];
    let (gate, up) = (gate.as_tensor().clone(), up.as_tensor().clone());
    Ok(vec![
        ("contiguous", gate_and_up, [gate.clone(), up.clone()]),
        ("halves of one", vec![both.clone()], [left.clone(), right.clone()]),
        ("halves of one, swapped", vec![both.clone()], [right, left.clone()]),
        ("parts that overlap", vec![wide], parts),
        ("rows at different distances", vec![both], [left, up]),
        ("rows in another order", vec![swapped], [rows, gate.clone()]),
        ("one row again and again", vec![row], [columns.clone(), columns]),
        ("the same", gate_alone, [gate.clone(), gate]),
    ])
}

#[test]
fn gate_and_values_apart_give_the_bits_of_one_tensor() -> Result<()> {
    let drop = DropMask::new(0.3, MaskKey::new(1))?.window(&[4, 5, 40], &[1, 2, 3]);
    for dtype in DTYPES {
        for cols in [1, 8, 13] {
            let dy = random(&[2, 3, cols], dtype, 9)?;
            for (lie, vars, [gate, up]) in apart(cols, dtype)? {
                let x = Tensor::cat(&[&gate, &up], D::Minus1)?;
                for activation in GATED {
                    let what = format!("{activation:?} {dtype:?} {cols}, {lie}");
                    let y = glu_dropout(&gate, &up, activation, &drop)?;
                    let expected = activation_dropout(&x, None, activation, &drop)?;
                    assert_eq!(bits(&y)?, bits(&expected)?, "{what}");
                    let [grads, expected] = [(y * &dy)?.backward()?, (expected * &dy)?.backward()?];
                    for var in &vars {
                        let [grad, expected] = [&grads, &expected].map(|of| of.get(var).unwrap());
                        assert_eq!(bits(grad)?, bits(expected)?, "{what}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn glu_dropout_names_what_does_not_fit() -> Result<()> {
    let (drop, x) = (DropMask::none(), random(&[2, 3], DType::F32, 1)?);
    let message = |gate: &Tensor, up: &Tensor, activation| {
        glu_dropout(gate, up, activation, &drop).unwrap_err().to_string()
    };
    for (plain, gated) in PLAIN.into_iter().zip(GATED) {
        assert_eq!([plain.gated(), gated.gated()], [gated; 2]);
        assert_eq!([plain.is_gated(), gated.is_gated()], [false, true]);
        assert!(message(&x, &x, plain).starts_with(&format!(
            "glu_dropout: activation: expected a gated form, got {plain:?}; give it {gated:?}, or gated() of it"
        )));
    }
    let act = Activation::SwiGlu;
    let whole = x.to_dtype(DType::U32)?;
    assert!(message(&whole, &whole, act).starts_with("glu_dropout: gate: expected dtype f32"));
    assert!(message(&x, &x.t()?, act).starts_with(
        "glu_dropout: up: expected shape [2, 3] like gate, got [3, 2]; expand it with broadcast_as"
    ));
    assert!(message(&x, &x.to_dtype(DType::F64)?, act).starts_with(
        "glu_dropout: up: expected dtype F32 like gate, got F64; convert it with to_dtype"
    ));
    let window = drop.window(&[2, 2], &[0, 0]);
    let error = glu_dropout(&x, &x, act, &window).unwrap_err().to_string();
    assert!(error.starts_with("glu_dropout: "), "{error}");
    Ok(())
}
