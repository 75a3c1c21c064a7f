//! Multi-head attention against its formula, of one projection and of three.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::AttentionConfig;
use candle_dropout::{
    DropMask, MaskKey, MaskState, MultiHeadAttention, MultiHeadAttentionConfig, seeded_var_builder,
};
use candle_nn::{VarBuilder, VarMap};
use cases::{bits, random};

use super::generator;

/// Twelve columns, four heads of queries and two of keys and values, in f64.
fn multi_head_config(drop_p: f32) -> MultiHeadAttentionConfig {
    MultiHeadAttentionConfig {
        hidden_size: 12,
        num_heads: 4,
        num_kv_heads: Some(2),
        head_dim: Some(5),
        drop_p,
        ..Default::default()
    }
}

fn multi_head(drop_p: f32, seed: u64) -> Result<(MultiHeadAttention, VarMap)> {
    let vars = VarMap::new();
    let vb = seeded_var_builder(&vars, 1, DType::F64, &Device::Cpu);
    Ok((MultiHeadAttention::new(&multi_head_config(drop_p), generator(seed), vb)?, vars))
}

#[test]
fn multi_head_attention_is_its_formula_and_every_parameter_learns() -> Result<()> {
    let (layer, vars) = multi_head(0.3, 7)?;
    let (b, s, h, kv, d) = (2, 9, 4, 2, 5);
    let xs = random(&[b, s, 12], DType::F64, 1)?;
    let y = layer.forward(&xs, true)?;

    let of = |name: &str| vars.data().lock().unwrap()[name].as_tensor().clone();
    let linear = |x: &Tensor, name: &str| {
        let weight = of(&format!("{name}.weight"));
        x.broadcast_matmul(&weight.t()?)?.broadcast_add(&of(&format!("{name}.bias")))
    };
    let qkv = linear(&xs, "qkv_proj")?.reshape((b, s, h + 2 * kv, d))?.transpose(1, 2)?;
    let part = |from, heads| qkv.narrow(1, from, heads)?.contiguous();
    let (q, k, v) = (part(0, h)?, part(h, kv)?, part(h + kv, kv)?);
    let drop = DropMask::new(0.3, MaskKey::derive(7, 0))?;
    let (keep, scale) = (drop.to_tensor((b, h, s, s), &Device::Cpu)?, drop.rate().scale().into());
    let config = AttentionConfig { causal: true, ..Default::default() };
    let o = cases::attention::formula(&q, &k, &v, &config, &keep, scale)?;
    let expected = linear(&o.transpose(1, 2)?.reshape((b, s, h * d))?, "o_proj")?;
    let error = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.max_all()?.to_scalar::<f64>();
    assert!(error(&y, &expected)? < 1e-12);

    let (grads, exact) = (y.sqr()?.backward()?, expected.sqr()?.backward()?);
    for (name, var) in vars.data().lock().unwrap().iter() {
        let (ours, exact) = (grads.get(var).unwrap(), exact.get(var).unwrap());
        assert!(error(ours, &exact.zeros_like()?)? > 0., "{name}");
        assert!(error(ours, exact)? < 1e-12, "{name}");
    }
    Ok(())
}

#[test]
fn multi_head_attention_draws_one_key_a_call_in_training_and_none_in_evaluation() -> Result<()> {
    let vars = VarMap::new();
    let vb = seeded_var_builder(&vars, 1, DType::F64, &Device::Cpu);
    let keys = generator(3);
    let layer = MultiHeadAttention::new(&multi_head_config(0.), keys.clone(), vb)?;
    let xs = random(&[2, 9, 12], DType::F64, 1)?;
    let (trained, evaluated) = (layer.forward(&xs, true)?, layer.forward(&xs, false)?);
    assert_eq!(bits(&trained)?, bits(&evaluated)?);
    assert_eq!(keys.state(), MaskState { seed: 3, counter: 1 });
    Ok(())
}

#[test]
fn projections_apart_give_what_one_gives_and_every_parameter_learns() -> Result<()> {
    let (joint, vars) = multi_head(0.3, 7)?;
    let of = |name: &str| vars.data().lock().unwrap()[name].as_tensor().clone();
    let mut parts = HashMap::new();
    for kind in ["weight", "bias"] {
        let qkv = of(&format!("qkv_proj.{kind}"));
        for (name, from, rows) in [("query", 0, 20), ("key", 20, 10), ("value", 30, 10)] {
            parts.insert(format!("{name}.{kind}"), Var::from_tensor(&qkv.narrow(0, from, rows)?)?);
        }
        parts.insert(format!("out.{kind}"), Var::from_tensor(&of(&format!("o_proj.{kind}")))?);
    }
    let tensors = parts.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
    let [q, k, v, o] = ["query", "key", "value", "out"].map(|name| vb.pp(name));
    let apart = MultiHeadAttention::from_qkv(&multi_head_config(0.3), generator(7), [q, k, v], o)?;

    let xs = random(&[2, 9, 12], DType::F64, 1)?;
    let (y, expected) = (apart.forward(&xs, true)?, joint.forward(&xs, true)?);
    let error = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.max_all()?.to_scalar::<f64>();
    assert!(error(&y, &expected)? < 1e-12);
    let (grads, exact) = (y.sqr()?.backward()?, expected.sqr()?.backward()?);
    let of_joint = |name: &str| -> Tensor {
        exact.get(vars.data().lock().unwrap()[name].as_tensor()).unwrap().clone()
    };
    for kind in ["weight", "bias"] {
        let part = |name: &str| grads.get(&parts[&format!("{name}.{kind}")]).unwrap();
        let qkv = Tensor::cat(&[part("query"), part("key"), part("value")], 0)?;
        assert!(error(&qkv, &of_joint(&format!("qkv_proj.{kind}")))? < 1e-12, "{kind}");
        assert!(error(part("out"), &of_joint(&format!("o_proj.{kind}")))? < 1e-12, "{kind}");
    }
    Ok(())
}

#[test]
fn a_checkpoint_of_three_projections_is_told_where_it_fits() -> Result<()> {
    let weights = |names: &[&str]| {
        let weight = || Tensor::zeros((20, 12), DType::F64, &Device::Cpu);
        let tensors = names.iter().map(|name| Ok((format!("h.0.{name}.weight"), weight()?)));
        let tensors = tensors.collect::<Result<HashMap<_, _>>>()?;
        let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu).pp("h").pp(0);
        let error = MultiHeadAttention::new(&multi_head_config(0.), generator(1), vb);
        Ok::<_, candle_core::Error>(error.unwrap_err().to_string())
    };
    for (names, got) in
        [(&["q_proj", "k_proj"][..], "got q_proj.weight"), (&["query"][..], "cannot find")]
    {
        let message = weights(names)?;
        assert!(message.starts_with("multi_head_attention h.0: qkv_proj"), "{message}");
        assert!(
            message.contains(got) && message.contains("use MultiHeadAttention::from_qkv"),
            "{message}"
        );
    }
    Ok(())
}

#[test]
fn padding_reaches_no_other_token() -> Result<()> {
    let sees_all =
        MultiHeadAttentionConfig { attention: AttentionConfig::default(), ..multi_head_config(0.) };
    let vb = seeded_var_builder(&VarMap::new(), 1, DType::F64, &Device::Cpu);
    let layer = MultiHeadAttention::new(&sees_all, generator(1), vb)?;
    let xs = random(&[2, 9, 12], DType::F64, 1)?;
    let lengths = Tensor::new(&[6u32, 9], &Device::Cpu)?;
    let y = layer.forward_padded(&xs, &lengths, false)?;
    let nan = (xs.narrow(1, 6, 3)? * f64::NAN)?;
    let bad = Tensor::cat(&[&xs.narrow(1, 0, 6)?, &nan], 1)?.narrow(0, 0, 1)?;
    let bad = Tensor::cat(&[&bad, &xs.narrow(0, 1, 1)?], 0)?;
    let z = layer.forward_padded(&bad, &lengths, false)?;
    for (sample, tokens) in [(0, 6), (1, 9)] {
        let of = |x: &Tensor| x.narrow(0, sample, 1)?.narrow(1, 0, tokens)?.contiguous();
        assert_eq!(bits(&of(&y)?)?, bits(&of(&z)?)?);
    }
    Ok(())
}

#[test]
fn sizes_that_do_not_fit_multi_head_attention_are_refused() -> Result<()> {
    let error = |config: MultiHeadAttentionConfig| {
        let vb = seeded_var_builder(&VarMap::new(), 1, DType::F32, &Device::Cpu);
        MultiHeadAttention::new(&config, generator(1), vb).unwrap_err().to_string()
    };
    let fits = multi_head_config(0.1);
    for (config, expected) in [
        (
            MultiHeadAttentionConfig { num_heads: 0, ..fits.clone() },
            "num_heads: expected at least 1",
        ),
        (
            MultiHeadAttentionConfig { head_dim: None, num_heads: 5, ..fits.clone() },
            "hidden_size: expected a multiple of num_heads = 5, got 12",
        ),
        (
            MultiHeadAttentionConfig { num_kv_heads: Some(3), ..fits.clone() },
            "num_kv_heads: expected a divisor of num_heads = 4, got 3",
        ),
    ] {
        let message = error(config);
        assert!(message.starts_with(&format!("multi_head_attention: {expected}")), "{message}");
    }
    let message = error(MultiHeadAttentionConfig { drop_p: 1.5, ..fits.clone() });
    assert!(message.starts_with("multi_head_attention: drop_p: expected"), "{message}");
    let (layer, _) = multi_head(0., 1)?;
    let message = layer.forward(&random(&[9, 12], DType::F64, 1)?, true).unwrap_err().to_string();
    assert!(message.starts_with("multi_head_attention: xs: expected [B, S, hidden_size]"));
    Ok(())
}
