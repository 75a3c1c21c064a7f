//! LLaMA and the models that are LLaMA but for a few parts.

use candle_core::Result;

use super::super::TransformerConfig;
use super::fields::{Fields, unsupported};
use super::{activation, rope};

/// The defaults in which the configurations of the family differ.
struct Defaults {
    vocab_size: usize,
    intermediate_size: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
}

const LLAMA: Defaults = Defaults {
    vocab_size: 32_000,
    intermediate_size: 11_008,
    num_key_value_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
};

const MISTRAL: Defaults = Defaults {
    intermediate_size: 14_336,
    num_key_value_heads: Some(8),
    max_position_embeddings: 4096 * 32,
    ..LLAMA
};

const QWEN2: Defaults = Defaults {
    vocab_size: 151_936,
    intermediate_size: 22_016,
    num_key_value_heads: Some(32),
    max_position_embeddings: 32_768,
    ..LLAMA
};

const QWEN3: Defaults = Defaults { head_dim: Some(128), ..QWEN2 };

/// Reads the configuration of a `model_type` of the family.
pub(super) fn read(fields: &Fields, model_type: &str) -> Result<TransformerConfig> {
    let attention_bias = || fields.or("attention_bias", false);
    match model_type {
        "mistral" => {
            let config = shared(fields, &MISTRAL)?;
            let _: usize = fields.or("num_key_value_heads", 8)?; // null, here alone, is no number
            let sliding_window = fields.nullable("sliding_window", Some(4096))?;
            let expected = if sliding_window.is_some() { 0 } else { config.num_hidden_layers };
            match fields.layers_before_windows(config.num_hidden_layers)? {
                Some(before) if before != expected => {
                    let got = format!("full_attention in the first {before} layers");
                    Err(unsupported("layer_types", &got, "what sliding_window says"))
                }
                _ => Ok(TransformerConfig { sliding_window, ..config }),
            }
        }
        "qwen2" => Ok(TransformerConfig {
            attention_bias: true,
            attention_out_bias: Some(false),
            ..with_windows(fields, shared(fields, &QWEN2)?)?
        }),
        "qwen3" => Ok(TransformerConfig {
            attention_bias: attention_bias()?,
            qk_norm: true,
            ..with_windows(fields, shared(fields, &QWEN3)?)?
        }),
        _ => {
            let config = shared(fields, &LLAMA)?;
            fields.expect_full_attention(config.num_hidden_layers)?;
            Ok(TransformerConfig {
                attention_bias: attention_bias()?,
                mlp_bias: fields.or("mlp_bias", false)?,
                ..config
            })
        }
    }
}

fn shared(fields: &Fields, defaults: &Defaults) -> Result<TransformerConfig> {
    let max_position_embeddings =
        fields.or("max_position_embeddings", defaults.max_position_embeddings)?;
    let hidden_size: usize = fields.or("hidden_size", 4096)?;
    let num_attention_heads = fields.or("num_attention_heads", 32)?;
    let head_dim = match defaults.head_dim {
        Some(size) => Some(fields.or("head_dim", size)?),
        None => fields.get("head_dim")?,
    };
    let head_size = head_dim.or(hidden_size.checked_div(num_attention_heads));
    let (rope_theta, rope_scaling) = rope::read(fields, max_position_embeddings, head_size)?;
    let act = fields.or("hidden_act", "silu".to_string())?;
    Ok(TransformerConfig {
        vocab_size: fields.or("vocab_size", defaults.vocab_size)?,
        max_position_embeddings,
        hidden_size,
        intermediate_size: Some(fields.or("intermediate_size", defaults.intermediate_size)?),
        num_hidden_layers: fields.or("num_hidden_layers", 32)?,
        num_attention_heads,
        num_key_value_heads: fields
            .nullable("num_key_value_heads", defaults.num_key_value_heads)?,
        head_dim,
        hidden_act: activation("hidden_act", &act)?.gated(),
        norm_eps: fields.positive("rms_norm_eps", 1e-6)?,
        rope_theta,
        rope_scaling,
        tie_word_embeddings: fields.or("tie_word_embeddings", false)?,
        initializer_range: fields.positive("initializer_range", 0.02)?,
        attn_pdrop: fields.probability("attention_dropout", 0.)?,
        ..TransformerConfig::llama()
    })
}

/// Qwen's windows: of the layers from `max_window_layers` on, or of those that `layer_types` names.
fn with_windows(fields: &Fields, config: TransformerConfig) -> Result<TransformerConfig> {
    let uses_windows = fields.or("use_sliding_window", false)?;
    let sliding_window =
        fields.nullable("sliding_window", Some(4096))?.filter(|_: &usize| uses_windows);
    let layers = config.num_hidden_layers;
    let (before, usual) =
        (fields.layers_before_windows(layers)?, fields.or("max_window_layers", 28)?);
    if sliding_window.is_none() && before.is_some_and(|before| before < layers) {
        let known = "full_attention without use_sliding_window";
        return Err(unsupported("layer_types", "sliding_attention", known));
    }
    let max_window_layers = before.unwrap_or(usual);
    Ok(match sliding_window {
        Some(_) => TransformerConfig { sliding_window, max_window_layers, ..config },
        None => config,
    })
}
