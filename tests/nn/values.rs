//! What `nn` replaces computes what candle's computes, with the gradients of candle's operations.

use candle_core::{D, DType, Device, Module, Result, Tensor, Var};
use candle_dropout::{functional, nn, set_seed};
use cases::{DTYPES, View, bits, epsilon, error, largest, random};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::agrees::{Call, VIEWS, agrees, agrees_in_all};
use crate::fails;
use crate::rotations::rotations_agree;

#[test]
fn softmax_over_any_dimension() -> Result<()> {
    for dims in [
        vec![1],
        vec![7],
        vec![5, 3],
        vec![1, 33],
        vec![2, 3, 17],
        vec![2, 3, 4, 5],
        vec![3, 1, 1031],
    ] {
        for dim in 0..dims.len() {
            let (ours, candles): (Box<Call>, Box<Call>) = (
                Box::new(move |x| nn::ops::softmax(&x[0], dim)),
                Box::new(move |x| candle_nn::ops::softmax(&x[0], dim)),
            );
            agrees_in_all(
                &format!("softmax({dim})"),
                std::slice::from_ref(&dims),
                1,
                &ours,
                &candles,
            )?;
            let (ours, candles): (Box<Call>, Box<Call>) = (
                Box::new(move |x| nn::ops::log_softmax(&x[0], dim)),
                Box::new(move |x| candle_nn::ops::log_softmax(&x[0], dim)),
            );
            agrees_in_all(
                &format!("log_softmax({dim})"),
                std::slice::from_ref(&dims),
                2,
                &ours,
                &candles,
            )?;
        }
        let (ours, candles): (&Call, &Call) =
            (&|x| nn::ops::softmax_last_dim(&x[0]), &|x| candle_nn::ops::softmax(&x[0], D::Minus1));
        agrees_in_all("softmax_last_dim", &[dims], 1, ours, candles)?;
    }
    Ok(())
}

#[test]
fn softmax_takes_candles_forms_of_a_dimension_and_refuses_none() -> Result<()> {
    let x = random(&[2, 3], DType::F32, 1)?;
    assert_eq!(bits(&nn::ops::softmax(&x, D::Minus2)?)?, bits(&nn::ops::softmax(&x, 0)?)?);
    let scalar = Tensor::new(1f32, &Device::Cpu)?;
    assert!(nn::ops::softmax(&scalar, 0).is_err());
    assert!(nn::ops::softmax_last_dim(&scalar).is_err());
    assert!(nn::ops::log_softmax(&scalar, D::Minus1).is_err());
    assert!(nn::ops::softmax(&x, 2).is_err());
    // A row that sees nothing.
    let none = Tensor::full(f32::NEG_INFINITY, (2, 3), &Device::Cpu)?;
    assert_eq!(nn::ops::softmax(&none, 0)?.to_vec2::<f32>()?, [[0f32; 3]; 2]);
    // 100,000 classes alike, whose exponentials f16 cannot add up.
    let x = Tensor::zeros(100_000, DType::F16, &Device::Cpu)?;
    let y = nn::ops::log_softmax(&x, 0)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    let expected = half::f16::from_f64(-(1e5f64).ln()).to_f32();
    assert!(y.iter().all(|y| *y == expected), "{} and {expected}", y[0]);
    Ok(())
}

#[test]
fn norms() -> Result<()> {
    let eps = 0.1; // no row of random numbers is ill-conditioned
    for dims in [vec![1], vec![3, 7], vec![2, 3, 17], vec![2, 2, 3, 32]] {
        let cols = *dims.last().expect("a dimension");
        let args = [dims, vec![cols], vec![cols]];
        let candles: &Call = &|x| candle_nn::ops::layer_norm_slow(&x[0], &x[1], &x[2], eps as f32);
        let forms: [(&str, &Call); 2] = [
            ("ops::layer_norm", &|x| nn::ops::layer_norm(&x[0], &x[1], &x[2], eps as f32)),
            ("LayerNorm", &|x| {
                nn::LayerNorm::new(x[1].clone(), x[2].clone(), f64::from(eps as f32)).forward(&x[0])
            }),
        ];
        for (name, ours) in forms {
            agrees_in_all(name, &args, 4, ours, candles)?;
        }
        let candles: &Call = &|x| candle_nn::ops::rms_norm_slow(&x[0], &x[1], eps as f32);
        let forms: [(&str, &Call); 4] = [
            ("ops::rms_norm", &|x| nn::ops::rms_norm(&x[0], &x[1], eps as f32)),
            ("RmsNorm", &|x| nn::RmsNorm::new(x[1].clone(), f64::from(eps as f32)).forward(&x[0])),
            ("forward_diff", &|x| {
                nn::RmsNorm::new(x[1].clone(), f64::from(eps as f32)).forward_diff(&x[0])
            }),
            ("into_inner", &|x| {
                let norm = nn::RmsNorm::new(x[1].clone(), f64::from(eps as f32)).into_inner();
                x[0].apply(&norm)
            }),
        ];
        for (name, ours) in forms {
            agrees_in_all(name, &args[..2], 4, ours, candles)?;
        }
    }
    Ok(())
}

#[test]
fn linear_layers() -> Result<()> {
    for (leading, inputs, outputs) in [
        (vec![1], 1, 1),
        (vec![5], 3, 7),
        (vec![2, 3], 17, 4),
        (vec![2, 3, 4], 8, 33),
        (vec![2, 1, 3, 2], 5, 6),
    ] {
        let x = [leading, vec![inputs]].concat();
        let args = [x.clone(), vec![outputs, inputs], vec![outputs]];
        let (ours, candles): (&Call, &Call) = (
            &|x| x[0].apply(&nn::Linear::new(x[1].clone(), Some(x[2].clone()))),
            // candle's layer, for any rank.
            &|x| x[0].contiguous()?.broadcast_matmul(&x[1].t()?)?.broadcast_add(&x[2]),
        );
        agrees_in_all("Linear", &args, inputs.max(48), ours, candles)?;
        let (ours, candles): (&Call, &Call) =
            (&|x| x[0].apply(&nn::Linear::new(x[1].clone(), None)), &|x| {
                x[0].contiguous()?.broadcast_matmul(&x[1].t()?)
            });
        agrees_in_all("Linear without a bias", &args[..2], inputs.max(48), ours, candles)?;
        // A bias of another shape that broadcasts.
        for bias in [vec![1], vec![1, outputs], vec![]] {
            let args = [x.clone(), vec![outputs, inputs], bias];
            let (ours, candles): (&Call, &Call) =
                (&|x| x[0].apply(&nn::Linear::new(x[1].clone(), Some(x[2].clone()))), &|x| {
                    x[0].contiguous()?.broadcast_matmul(&x[1].t()?)?.broadcast_add(&x[2])
                });
            for dtype in DTYPES {
                let terms = (inputs.max(48)) * outputs;
                agrees("Linear", &args, (View::Contiguous, dtype), terms, ours, candles)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_linear_layer_takes_every_rank_empty_or_not_and_says_what_does_not_fit() -> Result<()> {
    let weight = random(&[3, 4], DType::F32, 1)?;
    let layer = nn::Linear::new(weight.clone(), None);
    assert_eq!(layer.forward(&random(&[4], DType::F32, 2)?)?.dims(), [3]);
    // Candle's fails here.
    assert_eq!(layer.forward(&random(&[0, 4], DType::F32, 2)?)?.dims(), [0, 3]);
    assert_eq!(layer.forward(&random(&[2, 0, 4], DType::F32, 2)?)?.dims(), [2, 0, 3]);
    let x = random(&[2, 3], DType::F32, 2)?;
    fails(layer.forward(&x), &["linear: x: expected [.., 4] for a weight of [3, 4], got [2, 3]"]);
    let rank_3 = nn::Linear::new(weight.unsqueeze(0)?, None);
    fails(rank_3.forward(&x), &["linear: weight: expected a matrix [out, in], got [1, 3, 4]"]);
    // There and back.
    let theirs = candle_nn::Linear::from(layer);
    assert_eq!(bits(nn::Linear::from(theirs).weight())?, bits(&weight)?);
    Ok(())
}

#[test]
fn losses() -> Result<()> {
    for (n, c) in [(1, 1), (5, 3), (17, 65), (2, 1031)] {
        let classes: Vec<u32> = (0..n as u32).map(|row| row * 7 % c as u32).collect();
        for target_dtype in [DType::U32, DType::I64, DType::U8] {
            let targets = Tensor::new(classes.as_slice(), &Device::Cpu)?.to_dtype(target_dtype)?;
            let (ours, candles): (&Call, &Call) =
                (&|x| nn::loss::cross_entropy(&x[0], &targets), &|x| {
                    candle_nn::loss::cross_entropy(&x[0], &targets)
                });
            agrees_in_all("cross_entropy", &[vec![n, c]], 8, ours, candles)?;
        }
    }
    for dims in [vec![1], vec![5, 3], vec![2, 3, 17]] {
        let (ours, candles): (&Call, &Call) =
            (&|x| nn::loss::binary_cross_entropy_with_logit(&x[0], &x[1]), &|x| {
                candle_nn::loss::binary_cross_entropy_with_logit(&x[0], &x[1])
            });
        let args = [dims.clone(), dims];
        agrees_in_all("binary_cross_entropy_with_logit", &args, 8, ours, candles)?;
    }
    let logits = random(&[2, 3], DType::F32, 1)?;
    let targets = Tensor::new(&[0u32, 3], &Device::Cpu)?;
    assert!(nn::loss::cross_entropy(&logits, &targets).is_err(), "3 is no class");
    fails(
        nn::loss::cross_entropy(&logits.get(0)?, &targets),
        &["cross_entropy: inp: expected [N, C], got [3]"],
    );
    let floats = Tensor::new(&[0f32, 1.], &Device::Cpu)?;
    fails(
        nn::loss::cross_entropy(&logits, &floats),
        &["cross_entropy: targets: expected dtype u32 or i64"],
    );
    let bce = nn::loss::binary_cross_entropy_with_logit(&logits, &floats);
    fails(
        bce,
        &[
            "binary_cross_entropy_with_logit: target: expected [2, 3] of F32 like inp, got [2] of F32",
        ],
    );
    Ok(())
}

#[test]
fn dropout_draws_from_the_process_wide_generator() -> Result<()> {
    let _alone = crate::process_wide_generator();
    let x = Var::from_tensor(&random(&[256, 256], DType::F32, 1)?.affine(1., 3.)?)?;
    set_seed(7);
    let first = nn::ops::dropout(&x, 0.25)?;
    let second = nn::ops::dropout(&x, 0.25)?;
    set_seed(7);
    assert_eq!(bits(&nn::Dropout::new(0.25f32).forward(&x, true)?)?, bits(&first)?);
    assert_eq!(bits(&nn::ops::Dropout::new(0.25).forward(&x, true)?)?, bits(&second)?);
    assert_ne!(bits(&first)?, bits(&second)?);
    // Kept or dropped, by an exact rate within five standard deviations, and the gradient knows which.
    let kept = first.ne(0.)?.to_dtype(DType::F64)?.mean_all()?.to_scalar::<f64>()?;
    assert!((kept - 0.75).abs() < 5. * (0.75f64 * 0.25 / 65_536.).sqrt(), "{kept}");
    let grads = first.sum_all()?.backward()?;
    let slope = (first.to_dtype(DType::F64)? / x.to_dtype(DType::F64)?)?;
    let off = error(&grads.get(&x).expect("a gradient").to_dtype(DType::F64)?, &slope)?;
    assert!(off <= 2. * epsilon(DType::F32), "{off}");
    assert_eq!(largest(&nn::ops::dropout(&x, 1.)?.to_dtype(DType::F64)?)?, 0.);
    assert_eq!(bits(&nn::Dropout::new(0.25).forward(&x, false)?)?, bits(&x)?);
    fails(nn::ops::dropout(&x, 1.5), &["dropout: ", "1.5"]);
    Ok(())
}

/// Shapes, dimensions and dtypes as they come.
#[test]
fn any_shape_and_dtype_agrees() {
    let dtype = (0..4usize).prop_map(|at| DTYPES[at]);
    let view = (0..VIEWS.len()).prop_map(|at| VIEWS[at]);
    let shape = prop::collection::vec(1..9usize, 1..5);
    let case = (shape, dtype, view, any::<prop::sample::Index>(), 1..6usize, 0..4usize);
    let mut runner = TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(48)
    });
    let outcome = runner.run(&case, |(dims, dtype, view, at, size, more)| {
        let (dim, cols) = (at.index(dims.len()), *dims.last().expect("one"));
        let given = (view, dtype);
        // Gradients of what all rows share are sums over them: a rounding each, but in f32 for halves.
        let rows = match dtype {
            DType::F16 | DType::BF16 => 0,
            _ => dims.iter().product::<usize>() / cols,
        };
        let (a, b): (&Call, &Call) =
            (&|x| nn::ops::softmax(&x[0], dim), &|x| candle_nn::ops::softmax(&x[0], dim));
        let mut done = agrees("softmax", std::slice::from_ref(&dims), given, 1, a, b);
        let (a, b): (&Call, &Call) = (&|x| nn::ops::layer_norm(&x[0], &x[1], &x[2], 0.1), &|x| {
            candle_nn::ops::layer_norm_slow(&x[0], &x[1], &x[2], 0.1)
        });
        let args = [dims.clone(), vec![cols], vec![cols]];
        done = done.and_then(|()| agrees("layer_norm", &args, given, 4 + rows, a, b));
        let (a, b): (&Call, &Call) = (&|x| nn::ops::rms_norm(&x[0], &x[1], 0.1), &|x| {
            candle_nn::ops::rms_norm_slow(&x[0], &x[1], 0.1)
        });
        done = done.and_then(|()| agrees("rms_norm", &args[..2], given, 4 + rows, a, b));
        let (a, b): (&Call, &Call) =
            (&|x| x[0].apply(&nn::Linear::new(x[1].clone(), Some(x[2].clone()))), &|x| {
                x[0].contiguous()?.broadcast_matmul(&x[1].t()?)?.broadcast_add(&x[2])
            });
        let args = [[vec![2], dims.clone()].concat(), vec![size, cols], vec![size]];
        done = done.and_then(|()| agrees("linear", &args, given, 48 + 2 * rows, a, b));
        let heads = [dims[0], size, cols, 2 * (more + 1)];
        done = done.and_then(|()| rotations_agree(heads, more, given));
        done.map_err(|error| TestCaseError::fail(error.to_string()))
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

/// The op that a fused activation is, and that `nn` has under candle's name.
#[test]
fn ops_of_one_name_are_one() -> Result<()> {
    let (x, w) = (random(&[3, 4], DType::F32, 1)?, random(&[4], DType::F32, 2)?);
    let ours = nn::ops::rms_norm(&x, &w, 1e-5)?;
    assert_eq!(bits(&ours)?, bits(&functional::rms_norm(&x, &w, 1e-5)?)?);
    let ours = nn::ops::layer_norm(&x, &w, &w, 1e-5)?;
    assert_eq!(bits(&ours)?, bits(&functional::layer_norm(&x, &w, &w, 1e-5)?)?);
    Ok(())
}
