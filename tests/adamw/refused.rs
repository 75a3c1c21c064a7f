//! What is refused, before any variable has changed.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::training::{AdamW, LossScale, Optimizer, ParamGroup};

use super::*;

#[track_caller]
fn assert_refused<T>(result: Result<T>, expected: &str) {
    let Err(error) = result else { panic!("expected: {expected}") };
    let error = error.to_string();
    assert!(error.starts_with("adamw: ") && error.contains(expected), "{error}, not {expected}");
}

#[test]
fn variables_and_names_come_once() -> Result<()> {
    let vars = vars(&[vec![2], vec![3]], DType::F32, 1)?;
    let twice = vec![vars[0].clone(), vars[1].clone(), vars[0].clone()];
    assert_refused(AdamW::new_lr(twice, 0.1), "variable 2: expected each variable once");
    let group = |name: &str, var: &Var| ParamGroup {
        vars: vec![(name.into(), var.clone())],
        weight_decay: None,
        lr_scale: 1.,
    };
    let of_one = vec![group("w", &vars[0]), group("w", &vars[1])];
    assert_refused(AdamW::from_groups(of_one, params(0.1)), "variable w: expected each name once");
    let of_one = vec![group("w", &vars[0]), group("u", &vars[0])];
    assert_refused(
        AdamW::from_groups(of_one, params(0.1)),
        "variable u: expected each variable once",
    );
    Ok(())
}

#[test]
fn impossible_settings_are_named() -> Result<()> {
    let adamw = || AdamW::new_lr(vars(&[vec![2]], DType::F32, 1)?, 0.1);
    for max_norm in [0., -1., f64::NAN] {
        assert_refused(adamw()?.with_clip_norm(max_norm), "max_norm: expected a number above 0");
    }
    for initial in [0., -1., f64::NAN, f64::INFINITY, 1e9] {
        let scale = LossScale { initial, ..LossScale::dynamic() };
        assert_refused(adamw()?.with_loss_scale(scale), "loss_scale: expected 5.96");
    }
    let scale = LossScale { growth_interval: 0, ..LossScale::dynamic() };
    assert_refused(adamw()?.with_loss_scale(scale), "loss_scale: expected at least 1 step");
    Ok(())
}

#[test]
fn a_gradient_that_does_not_fit_changes_no_variable() -> Result<()> {
    let vars = vars(&[vec![2], vec![2, 3], vec![4]], DType::F32, 1)?;
    let mut adamw = AdamW::new_lr(vars.clone(), 0.1)?.with_clip_norm(1.)?;
    let before = exact_bits(&vars)?;
    let mut grads = gradients(&vars, 1)?;
    grads[1] = grads[1].t()?;
    assert_refused(
        adamw.step(&store(&vars, &grads)),
        "gradient of 1: expected shape [2, 3] like the variable, got [3, 2]",
    );
    grads[1] = Tensor::zeros((2, 3), DType::U32, &Device::Cpu)?;
    assert_refused(adamw.step(&store(&vars, &grads)), "gradient of 1: expected dtype");
    assert_eq!(exact_bits(&vars)?, before);
    assert_eq!(adamw.state()?["step"].to_scalar::<i64>()?, 0);
    Ok(())
}
