//! Saved and restored, it goes on bit for bit.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Result, Tensor, Var, safetensors};
use candle_dropout::training::{AdamW, LossScale, Optimizer, ParamGroup};

use super::*;

type State = BTreeMap<String, Tensor>;

/// All that can be asked for, on variables of several dtypes.
fn everything(vars: &[Var]) -> Result<AdamW> {
    AdamW::new_lr(vars.to_vec(), 0.01)?
        .with_clip_norm(3.)?
        .with_master_weights()?
        .with_loss_scale(LossScale { growth_interval: 3, ..LossScale::dynamic() })
}

fn mixed() -> Result<Vec<Var>> {
    let mut mixed = vars(&[vec![3, 4]], DType::F16, 1)?;
    mixed.extend(vars(&[vec![20_000]], DType::BF16, 2)?);
    mixed.extend(vars(&[vec![], vec![0, 2]], DType::F32, 3)?);
    mixed.extend(vars(&[vec![5]], DType::F64, 5)?);
    Ok(mixed)
}

fn through_a_file(state: State) -> Result<State> {
    let path = std::env::temp_dir().join(format!("adamw-{}.safetensors", std::process::id()));
    safetensors::save(&HashMap::from_iter(state), &path)?;
    let loaded = safetensors::load(&path, &Device::Cpu)?;
    std::fs::remove_file(path)?;
    Ok(loaded.into_iter().collect())
}

#[test]
fn it_goes_on_bit_for_bit_after_a_file() -> Result<()> {
    let vars = mixed()?;
    let mut adamw = everything(&vars)?;
    for step in 0..5 {
        adamw.step(&store(&vars, &gradients(&vars, step)?))?;
    }
    let later = copies(&vars)?;
    let state = through_a_file(adamw.state()?)?;
    let mut restored = everything(&later)?;
    restored.restore(&state)?;
    assert_eq!(restored.last_grad_norm()?, None);
    for step in 5..12 {
        let mut grads = gradients(&vars, step)?;
        if step == 8 {
            grads[0] = (&grads[0] * f64::INFINITY)?;
        }
        adamw.step(&store(&vars, &grads))?;
        restored.step(&store(&later, &grads))?;
        assert_eq!(exact_bits(&vars)?, exact_bits(&later)?, "step {step}");
        assert_eq!(adamw.loss_scale()?, restored.loss_scale()?);
    }
    let states = [adamw.state()?, restored.state()?];
    assert!(states[0].keys().eq(states[1].keys()));
    for (name, tensor) in &states[0] {
        assert_eq!(bytes(tensor)?, bytes(&states[1][name])?, "{name}");
    }
    assert_eq!(states[0]["step"].to_scalar::<i64>()?, 11);
    Ok(())
}

#[test]
fn a_state_is_a_copy_and_so_is_what_is_restored() -> Result<()> {
    let vars = mixed()?;
    let mut adamw = everything(&vars)?;
    let step = |adamw: &mut AdamW, seed| adamw.step(&store(&vars, &gradients(&vars, seed)?));
    step(&mut adamw, 1)?;
    let state = adamw.state()?;
    let before = state["first_moment.1"].to_vec1::<f32>()?;
    step(&mut adamw, 2)?;
    assert_eq!(state["first_moment.1"].to_vec1::<f32>()?, before);
    adamw.restore(&state)?;
    step(&mut adamw, 3)?;
    assert_eq!(state["first_moment.1"].to_vec1::<f32>()?, before);
    Ok(())
}

#[test]
fn names_are_those_of_the_groups() -> Result<()> {
    let vars = vars(&[vec![2], vec![3]], DType::BF16, 1)?;
    let named = vec![("wte.weight".into(), vars[0].clone()), ("ln.bias".into(), vars[1].clone())];
    let groups = vec![ParamGroup { vars: named, weight_decay: None, lr_scale: 1. }];
    let adamw = AdamW::from_groups(groups, params(0.1))?.with_master_weights()?;
    let names: Vec<_> = adamw.state()?.into_keys().collect();
    let expected = [
        "first_moment.ln.bias",
        "first_moment.wte.weight",
        "master_weight.ln.bias",
        "master_weight.wte.weight",
        "second_moment.ln.bias",
        "second_moment.wte.weight",
        "step",
    ];
    assert_eq!(names, expected);
    Ok(())
}

#[test]
fn what_does_not_fit_is_named_and_nothing_changes() -> Result<()> {
    let vars = mixed()?;
    let mut adamw = everything(&vars)?;
    adamw.step(&store(&vars, &gradients(&vars, 1)?))?;
    let ours = adamw.state()?;
    let other = {
        let vars = mixed()?;
        let mut other = everything(&vars)?;
        for seed in [2, 3] {
            other.step(&store(&vars, &gradients(&vars, seed)?))?;
        }
        other.state()?
    };
    let cpu = &Device::Cpu;
    type Edit = Box<dyn Fn(&mut State) -> Result<()>>;
    let set = |name: &'static str, tensor: Tensor| -> Edit {
        Box::new(move |state| {
            state.insert(name.into(), tensor.clone());
            Ok(())
        })
    };
    let remove = |name: &'static str| -> Edit {
        Box::new(move |state| {
            state.remove(name).expect("it is there");
            Ok(())
        })
    };
    let edits: Vec<(Edit, &str)> = vec![
        (remove("step"), "step: expected this name, got none"),
        (remove("loss_scale"), "loss_scale: expected this name, got none"),
        (remove("good_steps"), "good_steps: expected this name"),
        (remove("second_moment.4"), "second_moment.4: expected this name"),
        (remove("master_weight.1"), "master_weight.1: expected this name"),
        (set("first_moment.9", tensor(&[1.])?), "first_moment.9: expected names of this"),
        (set("master_weight.2", tensor(&[1.])?), "master_weight.2: expected names of this"),
        (
            set("first_moment.4", tensor(&[1.])?),
            "first_moment.4: expected shape [5] of F64, got [1] of F32",
        ),
        (
            set("second_moment.0", Tensor::zeros((3, 4), DType::F16, cpu)?),
            "second_moment.0: expected shape [3, 4] of F32, got [3, 4] of F16",
        ),
        (
            set("second_moment.0", Tensor::zeros((4, 3), DType::F32, cpu)?),
            "second_moment.0: expected shape [3, 4] of F32, got [4, 3] of F32",
        ),
        (set("step", Tensor::new(-1i64, cpu)?), "step: expected 0 to 2^53, got -1"),
        (set("step", Tensor::new(1f32, cpu)?), "step: expected one number of I64"),
        (set("step", Tensor::new(&[1i64, 2], cpu)?), "step: expected one number of I64"),
        (set("loss_scale", Tensor::new(f64::NAN, cpu)?), "loss_scale: expected"),
        (set("loss_scale", Tensor::new(0f64, cpu)?), "loss_scale: expected"),
    ];
    for (edit, expected) in edits {
        let mut state = other.clone();
        edit(&mut state)?;
        let error = adamw.restore(&state).expect_err(expected).to_string();
        assert!(error.contains("adamw: restore: ") && error.contains(expected), "{error}");
        for (name, tensor) in adamw.state()? {
            assert_eq!(bytes(&tensor)?, bytes(&ours[&name])?, "{name} after {error}");
        }
    }
    let mut plain = AdamW::new(vars.clone(), params(0.1))?;
    let error = plain.restore(&other).expect_err("it has no loss scale").to_string();
    assert!(error.contains("built with a loss scale or with master weights"), "{error}");
    for name in ["step", "good_steps", "first_moment.1"] {
        assert_ne!(bytes(&ours[name])?, bytes(&other[name])?, "{name}");
    }
    adamw.restore(&other)?;
    for (name, tensor) in adamw.state()? {
        assert_eq!(bytes(&tensor)?, bytes(&other[&name])?, "{name}");
    }
    Ok(())
}
