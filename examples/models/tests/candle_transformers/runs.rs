// What is built and run of each model, included by main.rs for either module `models` and the `nn` that it is
// compiled with.

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarBuilder;

use crate::Run;

pub const ALL: [(&str, Run); 13] = [
    ("bert", bert),
    ("bigcode", bigcode),
    ("convnext", convnext),
    ("dinov2", dinov2),
    ("distilbert", distilbert),
    ("gemma", gemma),
    ("llama", llama),
    ("llama2_c", llama2_c),
    ("mistral", mistral),
    ("phi", phi),
    ("qwen2", qwen2),
    ("t5", t5),
    ("vit", vit),
];

/// Two sentences of six tokens below 11.
fn ids() -> Result<Tensor> {
    Tensor::new(&[[1u32, 5, 2, 9, 7, 3], [8, 4, 10, 6, 0, 2]], &Device::Cpu)
}

fn images(b: usize, size: usize) -> Result<Tensor> {
    let pixels = (0..b * 3 * size * size).map(|at| (0.37 * at as f32).sin());
    Tensor::from_iter(pixels, &Device::Cpu)?.reshape((b, 3, size, size))
}

/// A configuration, by the names of its `config.json`; many have no public fields.
fn config<T: serde::de::DeserializeOwned>(json: serde_json::Value) -> Result<T> {
    serde_json::from_value(json).map_err(candle_core::Error::wrap)
}

fn bert(vb: VarBuilder) -> Result<Tensor> {
    let config = config(serde_json::json!({
        "vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "max_position_embeddings": 8, "type_vocab_size": 2, "initializer_range": 0.02,
        "layer_norm_eps": 1e-12, "pad_token_id": 0, "model_type": "bert",
    }))?;
    let ids = ids()?;
    models::bert::BertForMaskedLM::load(vb, &config)?.forward(&ids, &ids.zeros_like()?, None)
}

fn bigcode(vb: VarBuilder) -> Result<Tensor> {
    let config = models::bigcode::Config {
        vocab_size: 11,
        max_position_embeddings: 8,
        num_hidden_layers: 2,
        hidden_size: 16,
        layer_norm_epsilon: 1e-5,
        n_inner: Some(32),
        num_attention_heads: 2,
        multi_query: true,
        use_cache: false,
    };
    models::bigcode::GPTBigCode::load(vb, config)?.forward(&ids()?, 0)
}

fn convnext(vb: VarBuilder) -> Result<Tensor> {
    let config = models::convnext::Config::atto();
    models::convnext::convnext(&config, 10, vb)?.forward(&images(1, 64)?)
}

fn dinov2(vb: VarBuilder) -> Result<Tensor> {
    // The size of the images is fixed in its file.
    models::dinov2::DinoVisionTransformer::new(vb, 2, 16, 2)?.forward(&images(1, 518)?)
}

fn distilbert(vb: VarBuilder) -> Result<Tensor> {
    let config = config(serde_json::json!({
        "vocab_size": 11, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32,
        "activation": "gelu", "max_position_embeddings": 8, "initializer_range": 0.02,
        "pad_token_id": 0, "model_type": "distilbert",
    }))?;
    let visible = Tensor::zeros((6, 6), DType::U8, &Device::Cpu)?;
    models::distilbert::DistilBertForMaskedLM::load(vb, &config)?.forward(&ids()?, &visible)
}

fn gemma(vb: VarBuilder) -> Result<Tensor> {
    let config = config(serde_json::json!({
        "attention_bias": false, "head_dim": 8, "hidden_act": "gelu", "hidden_size": 16,
        "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "vocab_size": 11,
    }))?;
    models::gemma::Model::new(false, &config, vb)?.forward(&ids()?, 0)
}

fn llama(vb: VarBuilder) -> Result<Tensor> {
    let config: models::llama::LlamaConfig = config(serde_json::json!({
        "hidden_size": 16, "intermediate_size": 32, "vocab_size": 11, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8,
    }))?;
    let config = config.into_config(false);
    let mut cache = models::llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
    models::llama::Llama::load(vb, &config)?.forward(&ids()?, 0, &mut cache)
}

fn llama2_c(vb: VarBuilder) -> Result<Tensor> {
    let config = models::llama2_c::Config {
        dim: 16,
        hidden_dim: 32,
        n_layers: 2,
        n_heads: 2,
        n_kv_heads: 1,
        vocab_size: 11,
        seq_len: 8,
        norm_eps: 1e-5,
    };
    // No tensor is in it, so the tables of the rotary embedding are computed.
    let no_tables = VarBuilder::from_tensors(Default::default(), DType::F32, &Device::Cpu);
    let mut cache = models::llama2_c::Cache::new(false, &config, no_tables)?;
    models::llama2_c::Llama::load(vb, config)?.forward(&ids()?, 0, &mut cache)
}

fn mistral(vb: VarBuilder) -> Result<Tensor> {
    let config = config(serde_json::json!({
        "vocab_size": 11, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu",
        "max_position_embeddings": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 4,
    }))?;
    models::mistral::Model::new(&config, vb)?.forward(&ids()?, 0)
}

fn phi(vb: VarBuilder) -> Result<Tensor> {
    let config = config(serde_json::json!({
        "vocab_size": 11, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "hidden_act": "gelu_new", "max_position_embeddings": 8,
        "layer_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 1e4,
        "partial_rotary_factor": 0.5, "qk_layernorm": false,
    }))?;
    models::phi::Model::new(&config, vb)?.forward(&ids()?)
}

fn qwen2(vb: VarBuilder) -> Result<Tensor> {
    let config = config(serde_json::json!({
        "vocab_size": 11, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8,
        "sliding_window": 8, "max_window_layers": 2, "tie_word_embeddings": true, "rope_theta": 1e4,
        "rms_norm_eps": 1e-6, "use_sliding_window": false, "hidden_act": "silu",
    }))?;
    models::qwen2::ModelForCausalLM::new(&config, vb)?.forward(&ids()?, 0)
}

fn t5(vb: VarBuilder) -> Result<Tensor> {
    let config = models::t5::Config {
        vocab_size: 11,
        d_model: 16,
        d_kv: 8,
        d_ff: 32,
        num_layers: 2,
        num_heads: 2,
        relative_attention_num_buckets: 8,
        ..Default::default()
    };
    let ids = ids()?;
    models::t5::T5ForConditionalGeneration::load(vb, &config)?.forward(&ids, &ids)
}

fn vit(vb: VarBuilder) -> Result<Tensor> {
    let config = models::vit::Config {
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 32,
        hidden_act: nn::Activation::Gelu,
        layer_norm_eps: 1e-12,
        image_size: 16,
        patch_size: 4,
        num_channels: 3,
        qkv_bias: true,
    };
    models::vit::Model::new(&config, 10, vb)?.forward(&images(2, 16)?)
}
