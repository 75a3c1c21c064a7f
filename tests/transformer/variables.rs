//! The variables of a model: names, layout, saving, and none for a configuration that is refused.

use std::sync::Arc;

use candle_core::{DType, Device, Result};
use candle_dropout::functional::Activation;
use candle_dropout::{
    MaskGenerator, RopeScaling, Transformer, TransformerConfig, seeded_var_builder,
};
use candle_nn::{VarBuilder, VarMap};

use super::{ids, new_model, tiny, tiny_llama, tiny_qwen};

#[test]
fn saved_weights_load_into_an_equal_model() -> Result<()> {
    let path =
        std::env::temp_dir().join(format!("candle-dropout-gpt-{}.safetensors", std::process::id()));
    let (model, vars) = new_model(&tiny(), 1)?;
    vars.save(&path)?;

    let logits = |model: &Transformer| -> Result<Vec<f32>> {
        model.forward(&ids(2, 9, 0)?, false)?.flatten_all()?.to_vec1()
    };
    let (other, mut other_vars) = new_model(&tiny(), 2)?;
    assert_ne!(logits(&model)?, logits(&other)?);
    other_vars.load(&path)?;
    assert_eq!(logits(&model)?, logits(&other)?);

    // For use without training, the file itself can back the model.
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    assert_eq!(
        logits(&model)?,
        logits(&Transformer::new(&tiny(), Arc::new(MaskGenerator::new(0)), vb)?)?
    );
    std::fs::remove_file(path)?;
    Ok(())
}

#[test]
fn parameter_names_and_layout_are_those_of_gpt2() -> Result<()> {
    let (_, vars) = new_model(&tiny(), 1)?;
    let vars = vars.data().lock().unwrap();
    let dims = |name: &str| vars.get(name).unwrap_or_else(|| panic!("no {name}")).dims().to_vec();
    assert_eq!(vars.len(), 4 + 2 * 12);
    assert_eq!(dims("wte.weight"), [17, 16]);
    assert_eq!(dims("wpe.weight"), [12, 16]);
    assert_eq!(dims("h.0.ln_1.weight"), [16]);
    assert_eq!(dims("h.0.attn.c_attn.weight"), [16, 48]);
    assert_eq!(dims("h.1.attn.c_proj.bias"), [16]);
    assert_eq!(dims("h.1.mlp.c_fc.weight"), [16, 64]);
    assert_eq!(dims("h.1.mlp.c_proj.weight"), [64, 16]);
    assert_eq!(dims("ln_f.bias"), [16]);
    Ok(())
}

#[test]
fn parameter_names_and_layout_are_those_of_llama() -> Result<()> {
    let config = TransformerConfig { attention_bias: true, mlp_bias: true, ..tiny_llama() };
    let (_, vars) = new_model(&TransformerConfig { head_dim: Some(6), ..config }, 1)?;
    let vars = vars.data().lock().unwrap();
    let dims = |name: &str| vars.get(name).unwrap_or_else(|| panic!("no {name}")).dims().to_vec();
    assert_eq!(vars.len(), 3 + 2 * 16);
    assert_eq!(dims("model.embed_tokens.weight"), [17, 16]);
    assert_eq!(dims("model.layers.0.input_layernorm.weight"), [16]);
    assert_eq!(dims("model.layers.0.self_attn.q_proj.weight"), [24, 16]);
    assert_eq!(dims("model.layers.0.self_attn.k_proj.weight"), [12, 16]);
    assert_eq!(dims("model.layers.1.self_attn.v_proj.bias"), [12]);
    assert_eq!(dims("model.layers.1.self_attn.o_proj.weight"), [16, 24]);
    assert_eq!(dims("model.layers.1.post_attention_layernorm.weight"), [16]);
    assert_eq!(dims("model.layers.1.mlp.gate_proj.weight"), [24, 16]);
    assert_eq!(dims("model.layers.1.mlp.up_proj.bias"), [24]);
    assert_eq!(dims("model.layers.1.mlp.down_proj.weight"), [16, 24]);
    assert_eq!(dims("model.norm.weight"), [16]);
    assert_eq!(dims("lm_head.weight"), [17, 16]);
    Ok(())
}

#[test]
fn parameter_names_and_layout_are_those_of_qwen() -> Result<()> {
    let (_, vars) = new_model(&tiny_qwen(), 1)?;
    let vars = vars.data().lock().unwrap();
    let dims = |name: &str| vars.get(name).unwrap_or_else(|| panic!("no {name}")).dims().to_vec();
    assert_eq!(vars.len(), 3 + 2 * 14);
    assert_eq!(dims("model.layers.0.self_attn.q_norm.weight"), [4]);
    assert_eq!(dims("model.layers.1.self_attn.k_norm.weight"), [4]);
    assert_eq!(dims("model.layers.1.self_attn.q_proj.bias"), [16]);
    assert_eq!(dims("model.layers.1.self_attn.v_proj.bias"), [8]);
    assert!(!vars.contains_key("model.layers.1.self_attn.o_proj.bias"));
    Ok(())
}

#[test]
fn bad_configurations_are_refused_before_any_variable_is_made() {
    let cases = [
        (
            TransformerConfig { num_key_value_heads: Some(3), ..tiny_llama() },
            "transformer: num_key_value_heads: expected a divisor of num_attention_heads = 4, got 3",
        ),
        (
            TransformerConfig { head_dim: Some(5), ..tiny_llama() },
            "transformer: head_dim: expected an even number for rotary positions, got 5",
        ),
        (
            TransformerConfig { hidden_act: Activation::Silu, ..tiny_llama() },
            "transformer: hidden_act: expected a gated activation for Llama, got Silu",
        ),
        (
            TransformerConfig { hidden_act: Activation::SwiGlu, ..tiny() },
            "transformer: hidden_act: expected an activation without a gate for Gpt2, got SwiGlu",
        ),
        (
            TransformerConfig { qk_norm: true, ..tiny() },
            "transformer: qk_norm: expected false for Gpt2, got true",
        ),
        (
            TransformerConfig { sliding_window: Some(0), ..tiny_llama() },
            "transformer: sliding_window: expected at least 1, got 0",
        ),
        (
            TransformerConfig { vocab_size: 1 << 60, ..tiny() },
            "transformer: vocab_size: expected a weight of fewer than 2^60 elements",
        ),
        (
            TransformerConfig { max_position_embeddings: usize::MAX, ..tiny() },
            "transformer: max_position_embeddings: expected a weight of fewer than 2^60 elements",
        ),
        (
            TransformerConfig { head_dim: Some(1 << 62), ..tiny_llama() },
            "transformer: num_attention_heads or head_dim: expected a weight of fewer than 2^60 elements",
        ),
        (
            TransformerConfig { intermediate_size: Some(1 << 63), ..tiny_llama() },
            "transformer: intermediate_size: expected a weight of fewer than 2^60 elements",
        ),
        (
            TransformerConfig { rope_theta: 0., ..tiny_llama() },
            "transformer: rope_theta: expected a positive number, got 0",
        ),
        (
            TransformerConfig { rope_scaling: RopeScaling::Linear { factor: 0. }, ..tiny_llama() },
            "rope: scaling.factor: expected a positive number, got 0",
        ),
        (
            TransformerConfig { num_attention_heads: 3, ..tiny() },
            "transformer: hidden_size: expected a multiple of num_attention_heads = 3, got 16",
        ),
        (
            TransformerConfig { num_hidden_layers: 0, ..tiny() },
            "transformer: num_hidden_layers: expected at least 1, got 0",
        ),
        (
            TransformerConfig { attn_pdrop: 1.5, ..tiny() },
            "transformer: attn_pdrop: expected a probability from 0 to 1, got 1.5",
        ),
        (
            TransformerConfig { resid_pdrop: f32::NAN, ..tiny() },
            "transformer: resid_pdrop: expected a probability from 0 to 1, got NaN",
        ),
        (
            TransformerConfig { drop_path_rate: -0.1, ..tiny() },
            "transformer: drop_path_rate: expected a probability from 0 to 1",
        ),
        (
            TransformerConfig { initializer_range: 0.0, ..tiny() },
            "transformer: initializer_range: expected a positive number, got 0",
        ),
    ];
    for (config, expected) in cases {
        let vars = VarMap::new();
        let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
        let error =
            Transformer::new(&config, Arc::new(MaskGenerator::new(1)), vb).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(vars.all_vars().is_empty());
    }
}
