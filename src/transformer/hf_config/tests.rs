use candle_core::{Result, bail};

use super::super::TransformerConfig;
use crate::functional::Activation;
use crate::layers::RopeScaling;

fn error(json: &str) -> String {
    TransformerConfig::from_hf_config(json).unwrap_err().to_string()
}

#[test]
fn published_configurations_are_read() -> Result<()> {
    // openai-community/gpt2, its fields that are no token ids.
    let gpt2 = r#"{
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "embd_pdrop": 0.1, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_type": "cls_index", "vocab_size": 50257
    }"#;
    assert_eq!(TransformerConfig::from_hf_config(gpt2)?, TransformerConfig::gpt2());
    // meta-llama/Llama-3.2-1B.
    let llama = r#"{
        "attention_bias": false, "attention_dropout": 0.0, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": { "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3" },
        "rope_theta": 500000.0, "tie_word_embeddings": true, "vocab_size": 128256
    }"#;
    let expected = TransformerConfig { head_dim: Some(64), ..TransformerConfig::llama() };
    assert_eq!(TransformerConfig::from_hf_config(llama)?, expected);
    Ok(())
}

#[test]
fn absent_fields_have_the_defaults_of_hugging_face() -> Result<()> {
    // Nor does Hugging Face look at `n_ctx`.
    let gpt2 = TransformerConfig::from_hf_config(r#"{ "model_type": "gpt2", "n_ctx": 64 }"#)?;
    assert_eq!(gpt2, TransformerConfig::gpt2());
    let json = r#"{ "model_type": "llama", "num_key_value_heads": null, "rope_scaling":
        { "type": "linear", "factor": 2 }, "attention_dropout": 0.25 }"#;
    let llama = TransformerConfig::from_hf_config(json)?;
    assert_eq!((llama.hidden_size, llama.kv_heads(), llama.head_size()), (4096, 32, 128));
    assert_eq!(llama.intermediate_size, Some(11_008));
    assert_eq!((llama.norm_eps, llama.rope_theta), (1e-6, 1e4));
    assert_eq!(llama.rope_scaling, RopeScaling::Linear { factor: 2. });
    assert!(!llama.tie_word_embeddings);
    let rates = (llama.embd_pdrop, llama.attn_pdrop, llama.resid_pdrop);
    assert_eq!(rates, (0., 0.25, 0.));
    Ok(())
}

/// As `GPT2Config.from_dict` of transformers 5.23 reads them.
#[test]
fn gpt2_answers_to_the_names_that_all_models_share() -> Result<()> {
    let sizes = |json| -> Result<[usize; 4]> {
        let c = TransformerConfig::from_hf_config(json)?;
        let (heads, positions) = (c.num_attention_heads, c.max_position_embeddings);
        Ok([c.hidden_size, c.num_hidden_layers, heads, positions])
    };
    let shared = r#"{ "model_type": "gpt2", "hidden_size": 48, "num_hidden_layers": 5,
        "num_attention_heads": 4, "max_position_embeddings": 20 }"#;
    assert_eq!(sizes(shared)?, [48, 5, 4, 20]);
    let both = r#"{ "model_type": "gpt2", "n_embd": 96, "hidden_size": 48, "n_head": 6,
        "n_positions": 10, "max_position_embeddings": 20, "n_layer": 3 }"#;
    assert_eq!(sizes(both)?, [48, 3, 6, 20]);
    Ok(())
}

/// As `LlamaForCausalLM` of transformers 5.23 reads them.
#[test]
fn rope_scaling_goes_before_rope_parameters() -> Result<()> {
    let read = |json: &str| -> Result<(f64, RopeScaling)> {
        let json = format!(r#"{{ "model_type": "llama", "rope_theta": 5, {json} }}"#);
        let config = TransformerConfig::from_hf_config(&json)?;
        Ok((config.rope_theta, config.rope_scaling))
    };
    let linear = |factor| RopeScaling::Linear { factor };
    let parameters = r#""rope_parameters":
        { "rope_type": "linear", "factor": 3, "rope_theta": 7 }"#;
    let scaling = r#""rope_scaling": { "rope_type": "linear", "factor": 2 }"#;
    assert_eq!(read(&format!("{scaling}, {parameters}"))?, (5., linear(2.)));
    assert_eq!(read(&format!(r#""rope_scaling": {{}}, {parameters}"#))?, (7., linear(3.)));
    assert_eq!(read(&format!(r#""rope_scaling": null, {parameters}"#))?, (7., linear(3.)));

    let llama3 = |inner: &str, outer: &str| -> Result<usize> {
        let scaling = r#""rope_type": "llama3", "factor": 8, "low_freq_factor": 1"#;
        let json =
            format!(r#""rope_scaling": {{ {scaling}, "high_freq_factor": 4 {inner} }} {outer}"#);
        match read(&json)?.1 {
            RopeScaling::Llama3 { original_max_positions, .. } => Ok(original_max_positions),
            other => bail!("{other:?}"),
        }
    };
    let inner = r#", "original_max_position_embeddings": 100"#;
    let outer = r#", "original_max_position_embeddings": 300"#;
    assert_eq!(llama3(inner, outer)?, 300);
    assert_eq!(llama3("", outer)?, 300);
    assert_eq!(llama3(inner, "")?, 100);
    assert_eq!(llama3("", r#", "max_position_embeddings": 1000"#)?, 1000);
    Ok(())
}

#[test]
fn what_the_model_does_not_have_is_refused_by_name() {
    for (json, expected) in [
        ("[]", "config.json: expected a JSON object: "),
        ("{}", "config.json: model_type: expected gpt2, llama, mistral, qwen2 or qwen3, got \"\""),
        (r#"{"model_type": "bert"}"#, "mistral, qwen2 or qwen3, got \"bert\""),
        (
            r#"{"model_type": "gpt2", "n_embd": "wide"}"#,
            "config.json: n_embd: invalid type: string \"wide\", expected usize",
        ),
        (r#"{"model_type": "gpt2", "n_layer": -1}"#, "config.json: n_layer: invalid value:"),
        (
            r#"{"model_type": "gpt2", "activation_function": "mish"}"#,
            "activation_function: expected gelu_new, ",
        ),
        (
            r#"{"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": true}"#,
            "scale_attn_by_inverse_layer_idx: expected false, got \"true\"",
        ),
        (
            r#"{"model_type": "gpt2", "n_head": 7}"#,
            "hidden_size: expected a multiple of num_attention_heads = 7, got 768",
        ),
        (r#"{"model_type": "llama", "hidden_act": "mish"}"#, "hidden_act: expected gelu_new, "),
        (
            r#"{"model_type": "llama", "rope_scaling": {"rope_type": "longrope", "factor": 4}}"#,
            "rope_scaling.rope_type: expected default, linear, dynamic, llama3 or yarn, got \"longrope\"",
        ),
        (
            r#"{"model_type": "llama", "rope_parameters": {"rope_type": "linear"}}"#,
            "rope_parameters.factor: expected a number, got none",
        ),
        (
            r#"{"model_type": "llama", "attention_dropout": 1.5}"#,
            "config.json: attention_dropout: expected a probability from 0 to 1, got 1.5",
        ),
        (
            r#"{"model_type": "llama", "rms_norm_eps": 0.0}"#,
            "config.json: rms_norm_eps: expected a positive number with a fraction or exponent, got 0",
        ),
        (
            r#"{"model_type": "gpt2", "layer_norm_epsilon": 1}"#,
            "layer_norm_epsilon: expected a positive",
        ),
        (r#"{"model_type": "gpt2", "n_head": null}"#, "n_head: expected a value, got null"),
        (
            r#"{"model_type": "gpt2", "n_inner": 0}"#,
            "config.json: n_inner: expected a width from 1",
        ),
        (r#"{"model_type": "qwen3", "max_window_layers": "1"}"#, "max_window_layers: invalid type"),
        (r#"{"model_type": "qwen2", "sliding_window": "3"}"#, "sliding_window: invalid type"),
        (
            r#"{"model_type": "llama", "head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}}"#,
            "rope_scaling.rope_type: expected another scaling with head_dim = 2",
        ),
        (
            r#"{"model_type": "gpt2", "is_causal": false}"#,
            "is_causal: expected true, got \"false\"",
        ),
        (r#"{"model_type": "llama", "is_causal": null}"#, "is_causal: expected a value, got null"),
        (
            r#"{"model_type": "gpt2", "quantization_config": {}}"#,
            "quantization_config: expected none",
        ),
        (
            r#"{"model_type": "llama", "per_layer_config": {"0": {}}}"#,
            "per_layer_config: expected none",
        ),
        (r#"{"model_type": "llama", "sliding_window": 8}"#, "sliding_window: expected none"),
        (
            r#"{"model_type": "gpt2", "attention_chunk_size": 8}"#,
            "attention_chunk_size: expected none",
        ),
        (
            r#"{"model_type": "llama", "partial_rotary_factor": 0.5}"#,
            "rope_parameters.partial_rotary_factor: expected 1",
        ),
        (
            r#"{"model_type": "llama", "rope_parameters": {"rope_type": null}}"#,
            "config.json: rope_type: expected a value, got null",
        ),
        (
            r#"{"model_type": "llama", "rope_scaling": {"type": "linear"}, "rope_parameters": 2.0}"#,
            "config.json: rope_parameters: invalid type",
        ),
        (
            r#"{"model_type": "qwen2", "rope_parameters": {"full_attention": {"rope_theta": 5.0}}}"#,
            "rope_parameters.full_attention: expected one kind for all layers",
        ),
        (
            r#"{"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 1e17}}"#,
            "rope_scaling.factor: expected a factor of some thousands at most",
        ),
        (
            r#"{"model_type": "mistral", "sliding_window": 0}"#,
            "sliding_window: expected at least 1",
        ),
        (
            r#"{"model_type": "mistral", "num_hidden_layers": 1, "layer_types": ["full_attention"]}"#,
            "layer_types: expected what sliding_window says",
        ),
        (
            r#"{"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": ["full_attention"]}"#,
            "layer_types: expected one for each of num_hidden_layers = 2, got 1",
        ),
        (
            r#"{"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}"#,
            "layer_types: expected full_attention without use_sliding_window",
        ),
        (
            r#"{"model_type": "qwen3", "num_hidden_layers": 2, "use_sliding_window": true,
                "layer_types": ["sliding_attention", "full_attention"]}"#,
            "layer_types: expected full_attention, and sliding_attention from some layer to the last",
        ),
        (
            r#"{"model_type": "llama", "num_key_value_heads": 5}"#,
            "num_key_value_heads: expected a divisor of num_attention_heads = 32, got 5",
        ),
    ] {
        assert!(error(json).contains(expected), "{}", error(json));
    }
}

/// As `MistralConfig`, `Qwen2Config` and `Qwen3Config` of transformers 5.24 read them.
#[test]
fn the_kin_of_llama_have_defaults_of_their_own() -> Result<()> {
    let read = |json: &str| TransformerConfig::from_hf_config(json);
    let mistral = read(r#"{ "model_type": "mistral" }"#)?;
    assert_eq!((mistral.intermediate_size, mistral.kv_heads()), (Some(14_336), 8));
    assert_eq!((mistral.sliding_window, mistral.window(0)), (Some(4096), Some(4096)));
    let json = r#"{ "model_type": "mistral", "sliding_window": null }"#;
    assert_eq!(read(json)?.sliding_window, None);
    let json =
        r#"{ "model_type": "qwen2", "num_key_value_heads": null, "num_attention_heads": 16 }"#;
    assert_eq!(read(json)?.kv_heads(), 16);
    let qwen2 = read(r#"{ "model_type": "qwen2", "sliding_window": 9 }"#)?;
    assert_eq!((qwen2.vocab_size, qwen2.sliding_window, qwen2.head_size()), (151_936, None, 128));
    let biases = (qwen2.attention_bias, qwen2.attention_out_bias, qwen2.mlp_bias);
    assert_eq!(biases, (true, Some(false), false));
    let qwen3 =
        read(r#"{ "model_type": "qwen3", "hidden_size": 64, "use_sliding_window": true }"#)?;
    assert_eq!((qwen3.head_size(), qwen3.qk_norm, qwen3.attention_bias), (128, true, false));
    assert_eq!((qwen3.window(27), qwen3.window(28)), (None, Some(4096)));
    Ok(())
}

#[test]
fn yarn_has_the_defaults_of_hugging_face() -> Result<()> {
    let yarn = |more: &str| -> Result<RopeScaling> {
        let json = format!(
            r#"{{ "model_type": "qwen3", "max_position_embeddings": 500,
                "rope_scaling": {{ "rope_type": "yarn", "factor": 4 {more} }} }}"#
        );
        Ok(TransformerConfig::from_hf_config(&json)?.rope_scaling)
    };
    let usual = |attention_factor| RopeScaling::Yarn {
        factor: 4.,
        attention_factor,
        beta_fast: 32.,
        beta_slow: 1.,
        original_max_positions: 500,
        truncate: true,
    };
    assert_eq!(yarn("")?, usual(0.1 * 4f64.ln() + 1.));
    assert_eq!(yarn(r#", "beta_fast": null, "beta_slow": 0, "mscale": 2"#)?, yarn("")?);
    assert_eq!(yarn(r#", "attention_factor": 1.25"#)?, usual(1.25));
    let (one, two) = (0.1 * 4f64.ln() + 1., 0.1 * 2. * 4f64.ln() + 1.);
    assert_eq!(yarn(r#", "mscale": 1.0, "mscale_all_dim": 2.0"#)?, usual(one / two));
    let own = RopeScaling::Yarn {
        factor: 4.,
        attention_factor: one,
        beta_fast: 16.,
        beta_slow: 2.,
        original_max_positions: 40,
        truncate: false,
    };
    let more = r#", "beta_fast": 16, "beta_slow": 2.0, "truncate": null,
        "original_max_position_embeddings": 40"#;
    assert_eq!(yarn(more)?, own);
    Ok(())
}

#[test]
fn every_activation_has_its_name() -> Result<()> {
    use Activation::*;
    for (name, plain, gated) in [
        ("gelu_new", GeluTanh, GeGlu),
        ("gelu_pytorch_tanh", GeluTanh, GeGlu),
        ("gelu", GeluErf, GeGluErf),
        ("quick_gelu", QuickGelu, QuickGeGlu),
        ("silu", Silu, SwiGlu),
        ("swish", Silu, SwiGlu),
        ("relu", Relu, ReGlu),
        ("relu2", Relu2, Relu2Glu),
        ("sigmoid", Sigmoid, Glu),
        ("tanh", Tanh, TanhGlu),
    ] {
        let read = |model: &str, field: &str| {
            let json = format!(r#"{{ "model_type": "{model}", "{field}": "{name}" }}"#);
            TransformerConfig::from_hf_config(&json).map(|config| config.hidden_act)
        };
        assert_eq!(read("gpt2", "activation_function")?, plain);
        assert_eq!(read("qwen2", "hidden_act")?, gated);
    }
    Ok(())
}
