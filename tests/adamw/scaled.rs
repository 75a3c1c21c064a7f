//! Clipping by the norm of all gradients, and the loss scale.

use candle_core::{DType, Device, Result, Var};
use candle_dropout::training::{AdamW, LossScale, Optimizer};

use super::*;

/// Of all gradients, in f64.
fn norm(grads: &[Tensor]) -> Result<f64> {
    let mut sum = 0.;
    for grad in grads {
        sum += grad.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
    }
    Ok(sum.sqrt())
}

#[test]
fn clipped_steps_are_those_of_gradients_times_a_factor() -> Result<()> {
    for max_norm in [0.25, 1e3] {
        let ours = vars(&[vec![40, 50], vec![7], vec![33_000]], DType::F32, 1)?;
        let theirs = copies(&ours)?;
        let mut adamw = AdamW::new_lr(ours.clone(), 0.1)?.with_clip_norm(max_norm)?;
        let mut candle = candle_nn::AdamW::new_lr(theirs.clone(), 0.1)?;
        assert_eq!(adamw.last_grad_norm()?, None);
        for step in 0..5 {
            let grads = gradients(&ours, step)?;
            let expected = norm(&grads)?;
            adamw.step(&store(&ours, &grads))?;
            let got = adamw.last_grad_norm()?.expect("it clips");
            // Sums in f64, in another order.
            assert!((got / expected - 1.).abs() < 1e-12, "{got}, not {expected}");
            let factor = if got > max_norm { max_norm / got } else { 1. };
            let grads = grads.iter().map(|grad| grad * factor).collect::<Result<Vec<_>>>()?;
            candle.step(&store(&theirs, &grads))?;
        }
        assert_eq!(all_bits(&ours)?, all_bits(&theirs)?, "max_norm {max_norm}");
    }
    Ok(())
}

#[test]
fn squares_that_overflow_their_dtype_have_a_norm() -> Result<()> {
    for (dtype, size) in [(DType::F16, 6e4), (DType::BF16, 1e30), (DType::F32, 1e30)] {
        let vars = vars(&[vec![1000]], dtype, 1)?;
        let mut adamw = AdamW::new_lr(vars.clone(), 0.1)?.with_clip_norm(1.)?;
        let grads = [Tensor::full(size as f32, 1000, &Device::Cpu)?.to_dtype(dtype)?];
        adamw.step(&store(&vars, &grads))?;
        let got = adamw.last_grad_norm()?.expect("it clips");
        let expected = norm(&grads)?;
        assert!(expected.is_finite() && (got / expected - 1.).abs() < 1e-12, "{dtype:?}: {got}");
    }
    Ok(())
}

#[test]
fn a_norm_is_known_without_clipping() -> Result<()> {
    let vars = vars(&[vec![3]], DType::F32, 1)?;
    let mut adamw = AdamW::new_lr(vars.clone(), 0.1)?;
    adamw.step(&store(&vars, &gradients(&vars, 1)?))?;
    assert_eq!(adamw.last_grad_norm()?, None);
    let mut adamw = AdamW::new_lr(vars.clone(), 0.1)?.with_clip_norm(f64::INFINITY)?;
    let grads = [tensor(&[2., 3., 6.])?];
    adamw.step(&store(&vars, &grads))?;
    assert_eq!(adamw.last_grad_norm()?, Some(7.));
    Ok(())
}

fn scale(initial: f64, growth_interval: u32) -> LossScale {
    LossScale { initial, growth_interval }
}

#[test]
fn a_scale_of_a_power_of_two_changes_no_bit() -> Result<()> {
    let loss = |var: &Var| (var.sqr()? * 3.)?.sum_all();
    let ours = vars(&[vec![50]], DType::F32, 1)?;
    let theirs = copies(&ours)?;
    let mut scaled = AdamW::new_lr(ours.clone(), 0.1)?
        .with_clip_norm(2.)?
        .with_loss_scale(LossScale { growth_interval: 4, ..LossScale::dynamic() })?;
    let mut plain = AdamW::new_lr(theirs.clone(), 0.1)?.with_clip_norm(2.)?;
    for step in 0..10 {
        scaled.backward_step(&loss(&ours[0])?)?;
        plain.backward_step(&loss(&theirs[0])?)?;
        assert_eq!(all_bits(&ours)?, all_bits(&theirs)?, "step {step}");
        assert_eq!(scaled.last_grad_norm()?, plain.last_grad_norm()?, "step {step}");
        assert_eq!(scaled.loss_scale()?, 65_536. * 2f64.powi((step + 1) / 4));
        assert_eq!(plain.loss_scale()?, 1.);
    }
    Ok(())
}

#[test]
fn an_overflow_skips_the_step_and_halves_the_scale() -> Result<()> {
    for (dtype, bad) in [(DType::F32, f32::NAN), (DType::F16, 1e6), (DType::BF16, f32::INFINITY)] {
        let vars = vars(&[vec![3], vec![20_000]], dtype, 1)?;
        let mut adamw = AdamW::new_lr(vars.clone(), 0.1)?
            .with_master_weights()?
            .with_loss_scale(scale(8., 3))?;
        let good = gradients(&vars, 1)?;
        let bad = [tensor(&[0., bad, 1.])?.to_dtype(dtype)?, good[1].clone()];
        let mut scales = Vec::new();
        for is_good in [true, true, false, true, true, true, false, true] {
            let before = (exact_bits(&vars)?, adamw.state()?);
            adamw.step(&store(&vars, if is_good { &good } else { &bad }))?;
            let after = (exact_bits(&vars)?, adamw.state()?);
            assert_eq!(before.0 == after.0, !is_good);
            for (name, before) in before.1 {
                // Only the scale moves, and what counts towards its growth.
                let of_scale = ["loss_scale", "good_steps"].contains(&name.as_str());
                if !is_good && !of_scale {
                    assert_eq!(bytes(&before)?, bytes(&after.1[&name])?, "{name}");
                }
            }
            scales.push(adamw.loss_scale()?);
            assert_eq!(adamw.last_grad_norm()?.is_some_and(f64::is_finite), is_good);
        }
        // Halved by the third and by the seventh; doubled after three good ones in a row.
        assert_eq!(scales, [8., 8., 4., 4., 4., 8., 4., 4.]);
        assert_eq!(adamw.state()?["step"].to_scalar::<i64>()?, 6);
    }
    Ok(())
}

#[test]
fn a_scale_stays_within_its_bounds() -> Result<()> {
    let vars = vars(&[vec![1]], DType::F32, 1)?;
    let [least, most] = [2f64.powi(-24), 2f64.powi(24)];
    let mut adamw = AdamW::new_lr(vars.clone(), 0.1)?.with_loss_scale(scale(1., 1))?;
    for (grad, bound) in [(1f32, most), (f32::NAN, least)] {
        for _ in 0..60 {
            adamw.step(&store(&vars, &[tensor(&[grad])?]))?;
        }
        assert_eq!(adamw.loss_scale()?, bound);
    }
    Ok(())
}

fn half(dtype: DType) -> Result<Var> {
    Var::from_tensor(&tensor(&[2.])?.to_dtype(dtype)?)
}

#[test]
fn a_scaled_loss_has_scaled_gradients_in_halves() -> Result<()> {
    // In bf16 the whole loss may be, in f16 what is before it.
    let bf16 = half(DType::BF16)?;
    let of_bf16 = (bf16.sum_all()? * 4.)?;
    let f16 = half(DType::F16)?;
    let of_f16 = (f16.to_dtype(DType::F32)?.sum_all()? * 0.25)?;
    for (var, loss, scaled, grad) in
        [(bf16, of_bf16, 524_288., 262_144.), (f16, of_f16, 32_768., 16_384.)]
    {
        let adamw = AdamW::new_lr(vec![var.clone()], 0.1)?.with_loss_scale(LossScale::dynamic())?;
        let loss = adamw.scale_loss(&loss)?;
        assert_eq!((loss.dtype(), loss.to_scalar::<f32>()?), (DType::F32, scaled));
        let grads = loss.backward()?;
        let got = grads.get(&var).expect("it is reached").to_dtype(DType::F32)?;
        assert_eq!(got.to_vec1::<f32>()?, [grad], "{:?}", var.dtype());
    }
    Ok(())
}

#[test]
fn a_loss_in_f16_is_refused_under_a_scale() -> Result<()> {
    let var = half(DType::F16)?;
    let loss = (var.sum_all()? * 0.25)?;
    // What would become of it: the gradient of the loss itself is no number of f16.
    let cast = (loss.to_dtype(DType::F32)? * 65_536.)?;
    let grads = cast.backward()?;
    let grad = grads.get(&var).expect("it is reached").to_dtype(DType::F32)?;
    assert_eq!(grad.to_vec1::<f32>()?, [f32::INFINITY]);

    let mut adamw = AdamW::new_lr(vec![var.clone()], 0.1)?.with_loss_scale(LossScale::dynamic())?;
    let before = (exact_bits(std::slice::from_ref(&var))?, adamw.loss_scale()?);
    for result in [adamw.scale_loss(&loss).map(drop), adamw.backward_step(&loss)] {
        let message = result.expect_err("it is refused").to_string();
        assert!(
            message.starts_with("adamw: loss: expected f32 under a loss scale, got F16, ")
                && message.contains("; take the loss of logits.to_dtype(DType::F32), or "),
            "{message}"
        );
    }
    assert_eq!((exact_bits(std::slice::from_ref(&var))?, adamw.loss_scale()?), before);
    let mut plain = AdamW::new_lr(vec![var.clone()], 0.1)?;
    assert_eq!(plain.scale_loss(&loss)?.dtype(), DType::F16);
    plain.backward_step(&loss)
}
