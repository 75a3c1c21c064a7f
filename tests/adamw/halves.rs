//! Moments, and on request weights, in f32.

use candle_core::{DType, Result, Tensor};
use candle_dropout::training::{AdamW, Optimizer};
use cases::{bits, random};

use super::*;

const HALVES: [DType; 2] = [DType::F16, DType::BF16];

#[test]
fn master_weights_are_those_of_f32_and_variables_their_rounding() -> Result<()> {
    for dtype in HALVES {
        let halves = vars(&[vec![5, 7], vec![20_000], vec![]], dtype, 1)?;
        let wide = halves.iter().map(|var| var.as_detached_tensor().to_dtype(DType::F32));
        let wide = wide.map(|x| Var::from_tensor(&x?)).collect::<Result<Vec<_>>>()?;
        let mut adamw = AdamW::new_lr(halves.clone(), 1e-3)?.with_master_weights()?;
        let mut of_f32 = candle_nn::AdamW::new_lr(wide.clone(), 1e-3)?;
        for step in 0..50 {
            let grads = gradients(&halves, step)?;
            let wide_grads = grads.iter().map(|grad| grad.to_dtype(DType::F32));
            let wide_grads = wide_grads.collect::<Result<Vec<_>>>()?;
            // Gradients that were added up in f32 are taken as they are.
            let given = if step % 2 == 0 { &grads } else { &wide_grads };
            adamw.step(&store(&halves, given))?;
            of_f32.step(&store(&wide, &wide_grads))?;
        }
        let state = adamw.state()?;
        for (at, (half, wide)) in halves.iter().zip(&wide).enumerate() {
            assert_eq!(bits(half)?, bits(&wide.to_dtype(dtype)?)?, "{dtype:?}, variable {at}");
            assert_eq!(bits(&state[&format!("master_weight.{at}")])?, bits(wide)?);
        }
    }
    Ok(())
}

#[test]
fn without_master_weights_a_step_is_that_of_f32_rounded() -> Result<()> {
    for dtype in HALVES {
        let halves = vars(&[vec![33], vec![17_000]], dtype, 1)?;
        let mut adamw = AdamW::new_lr(halves.clone(), 0.1)?;
        let wide = halves.iter().map(|var| var.as_detached_tensor().to_dtype(DType::F32));
        let wide = wide.map(|x| Var::from_tensor(&x?)).collect::<Result<Vec<_>>>()?;
        let mut of_f32 = candle_nn::AdamW::new_lr(wide.clone(), 0.1)?;
        for step in 0..5 {
            let grads = gradients(&halves, step)?;
            let wide_grads = grads.iter().map(|grad| grad.to_dtype(DType::F32));
            let wide_grads = wide_grads.collect::<Result<Vec<_>>>()?;
            adamw.step(&store(&halves, &grads))?;
            of_f32.step(&store(&wide, &wide_grads))?;
            for (half, wide) in halves.iter().zip(&wide) {
                wide.set(&wide.to_dtype(dtype)?.to_dtype(DType::F32)?)?;
                assert_eq!(bits(half)?, bits(&wide.to_dtype(dtype)?)?);
            }
        }
    }
    Ok(())
}

/// What is wrong with moments in f16, in candle's own.
#[test]
fn the_default_eps_makes_no_nan_in_f16() -> Result<()> {
    let ours = vars(&[vec![4]], DType::F16, 1)?;
    let theirs = copies(&ours)?;
    let grads = [Tensor::new(&[0f32, 1e-4, 1., 300.], &candle_core::Device::Cpu)?];
    let grads = grads.map(|grad| grad.to_dtype(DType::F16)).map(|grad| grad.expect("f16"));
    AdamW::new_lr(ours.clone(), 1e-3)?.step(&store(&ours, &grads))?;
    candle_nn::AdamW::new_lr(theirs.clone(), 1e-3)?.step(&store(&theirs, &grads))?;
    let finite = |var: &Var| -> Result<usize> {
        let values = var.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        Ok(values.iter().filter(|x| x.is_finite()).count())
    };
    assert_eq!(finite(&ours[0])?, 4);
    assert!(finite(&theirs[0])? < 4, "candle's eps is 0 no more: {}", theirs[0].as_tensor());
    Ok(())
}

#[test]
fn the_second_moment_follows_gradients_in_bf16() -> Result<()> {
    let vars = vars(&[vec![3]], DType::BF16, 1)?;
    let mut adamw = AdamW::new_lr(vars.clone(), 0.)?;
    for step in 0..3000 {
        // Large at first, then small: what has been large is forgotten.
        let size = if step < 100 { 8. } else { 0.5 };
        let grads = [(random(&[3], DType::BF16, 7)? * 0.)?.affine(1., size)?];
        adamw.step(&store(&vars, &grads))?;
    }
    let (mut expected, mut beta2_t) = (0f64, 1f64);
    for step in 0..3000 {
        let size: f64 = if step < 100 { 8. } else { 0.5 };
        expected = 0.999 * expected + 0.001 * size * size;
        beta2_t *= 0.999;
    }
    let got = adamw.state()?["second_moment.0"].to_vec1::<f32>()?;
    for got in got {
        let error = (f64::from(got) / expected - 1.).abs();
        // 3000 roundings of f32, each by half a unit at most.
        assert!(error < 3000. * f64::from(f32::EPSILON) / 2., "{got}, not {expected}");
    }
    assert!(beta2_t < 0.05);
    Ok(())
}

#[test]
fn f64_variables_have_moments_in_f64() -> Result<()> {
    let vars = vars(&[vec![3]], DType::F64, 1)?;
    let mut adamw = AdamW::new_lr(vars.clone(), 0.1)?.with_master_weights()?;
    // A gradient in f32 is widened.
    let grad = random(&[3], DType::F32, 4)?;
    adamw.step(&store(&vars, std::slice::from_ref(&grad)))?;
    let state = adamw.state()?;
    assert_eq!(state.keys().collect::<Vec<_>>(), ["first_moment.0", "second_moment.0", "step"]);
    let expected = (grad.to_dtype(DType::F64)? * (1. - 0.9))?;
    assert_eq!(bits(&state["first_moment.0"])?, bits(&expected)?);
    Ok(())
}
