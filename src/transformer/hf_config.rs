//! The hyperparameters of a Transformer, read from Hugging Face's `config.json`.

use std::path::Path;

use candle_core::{Result, bail};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::TransformerConfig;
use crate::layers::RopeScaling;
use crate::ops::Activation;
use crate::vars::read_text;

impl TransformerConfig {
    /// Reads `config.json` of a checkpoint's folder.
    ///
    /// # Errors
    /// The file cannot be read, or see [`from_hf_config`](Self::from_hf_config).
    pub fn from_pretrained(dir: impl AsRef<Path>) -> Result<Self> {
        Self::from_hf_config(&read_text(&dir.as_ref().join("config.json"))?)
    }

    /// Reads the text of a Hugging Face `config.json` whose `model_type` is `gpt2` or `llama`.
    ///
    /// What the file leaves out has the default of Hugging Face's `GPT2Config` or `LlamaConfig`.
    /// What does not change the model (token ids, caching, versions) is not looked at.
    ///
    /// # Errors
    /// The text is no JSON object, a field has a value of another kind, or asks for something this
    /// model does not have: another `model_type`, an activation or a kind of `rope_scaling` that is
    /// unknown here, GPT-2's variants of attention. Each error names the field.
    ///
    /// # Example
    /// ```
    /// use candle_dropout::TransformerConfig;
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let json = r#"{ "model_type": "gpt2", "n_embd": 96, "n_head": 6, "resid_pdrop": 0.2 }"#;
    /// let config = TransformerConfig::from_hf_config(json)?;
    /// assert_eq!((config.hidden_size, config.resid_pdrop), (96, 0.2));
    /// assert_eq!(config.vocab_size, 50257);
    /// # Ok(()) }
    /// ```
    pub fn from_hf_config(json: &str) -> Result<Self> {
        let fields = match serde_json::from_str(json) {
            Ok(fields) => Fields(fields),
            Err(error) => bail!("config.json: expected a JSON object: {error}"),
        };
        let config = match fields.or("model_type", String::new())?.as_str() {
            "gpt2" => Self::from_gpt2(&fields)?,
            "llama" => Self::from_llama(&fields)?,
            other => return Err(unsupported("model_type", other, "gpt2 or llama")),
        };
        config.validate()?;
        Ok(config)
    }

    fn from_gpt2(fields: &Fields) -> Result<Self> {
        // Variants of attention that no published GPT-2 uses. `reorder_and_upcast_attn` is not one:
        // it changes the rounding alone.
        for (name, usual) in [
            ("scale_attn_weights", true),
            ("scale_attn_by_inverse_layer_idx", false),
            ("add_cross_attention", false),
        ] {
            if fields.or(name, usual)? != usual {
                return Err(unsupported(name, &(!usual).to_string(), &usual.to_string()));
            }
        }
        let hidden_act = fields.or("activation_function", "gelu_new".to_string())?;
        let hidden_act = match hidden_act.as_str() {
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
            "gelu" => Activation::GeluErf,
            "silu" | "swish" => Activation::Silu,
            "relu" => Activation::Relu,
            other => {
                let known = "gelu_new, gelu_pytorch_tanh, gelu_fast, gelu, silu, swish or relu";
                return Err(unsupported("activation_function", other, known));
            }
        };
        let gpt2 = Self::gpt2();
        // Hugging Face takes the names that all its models share before GPT-2's own.
        let either = |shared, own, default| fields.or(shared, fields.or(own, default)?);
        Ok(Self {
            vocab_size: fields.or("vocab_size", gpt2.vocab_size)?,
            max_position_embeddings: either(
                "max_position_embeddings",
                "n_positions",
                gpt2.max_position_embeddings,
            )?,
            hidden_size: either("hidden_size", "n_embd", gpt2.hidden_size)?,
            intermediate_size: fields.get("n_inner")?,
            num_hidden_layers: either("num_hidden_layers", "n_layer", gpt2.num_hidden_layers)?,
            num_attention_heads: either("num_attention_heads", "n_head", gpt2.num_attention_heads)?,
            hidden_act,
            norm_eps: fields.or("layer_norm_epsilon", gpt2.norm_eps)?,
            tie_word_embeddings: fields.or("tie_word_embeddings", true)?,
            initializer_range: fields.or("initializer_range", gpt2.initializer_range)?,
            embd_pdrop: fields.or("embd_pdrop", gpt2.embd_pdrop)?,
            attn_pdrop: fields.or("attn_pdrop", gpt2.attn_pdrop)?,
            resid_pdrop: fields.or("resid_pdrop", gpt2.resid_pdrop)?,
            ..gpt2
        })
    }

    fn from_llama(fields: &Fields) -> Result<Self> {
        let hidden_act = match fields.or("hidden_act", "silu".to_string())?.as_str() {
            "silu" | "swish" => Activation::SwiGlu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeGlu,
            other => {
                let known = "silu, swish, gelu_new, gelu_pytorch_tanh or gelu_fast";
                return Err(unsupported("hidden_act", other, known));
            }
        };
        let max_position_embeddings = fields.or("max_position_embeddings", 2048)?;
        // Since version 5, transformers writes theta and scaling together, and reads what it wrote
        // before first.
        let (name, rope) = match fields.or("rope_scaling", Map::new())? {
            rope if !rope.is_empty() => ("rope_scaling", rope),
            _ => ("rope_parameters", fields.or("rope_parameters", Map::new())?),
        };
        let rope = Fields(rope);
        let theta = fields.or("rope_theta", 10_000.)?;
        let inner = rope.or("original_max_position_embeddings", max_position_embeddings)?;
        let original = fields.or("original_max_position_embeddings", inner)?;
        Ok(Self {
            vocab_size: fields.or("vocab_size", 32_000)?,
            max_position_embeddings,
            hidden_size: fields.or("hidden_size", 4096)?,
            intermediate_size: Some(fields.or("intermediate_size", 11_008)?),
            num_hidden_layers: fields.or("num_hidden_layers", 32)?,
            num_attention_heads: fields.or("num_attention_heads", 32)?,
            num_key_value_heads: fields.get("num_key_value_heads")?,
            head_dim: fields.get("head_dim")?,
            hidden_act,
            norm_eps: fields.or("rms_norm_eps", 1e-6)?,
            rope_theta: rope.or("rope_theta", theta)?,
            rope_scaling: rope_scaling(name, &rope, original)?,
            attention_bias: fields.or("attention_bias", false)?,
            mlp_bias: fields.or("mlp_bias", false)?,
            tie_word_embeddings: fields.or("tie_word_embeddings", false)?,
            initializer_range: fields.or("initializer_range", 0.02)?,
            attn_pdrop: fields.or("attention_dropout", 0.)?,
            ..Self::llama()
        })
    }
}

/// The scaling that the object `name` of a `config.json` asks for.
fn rope_scaling(name: &str, rope: &Fields, original_max_positions: usize) -> Result<RopeScaling> {
    let old_name = rope.or("type", "default".to_string())?;
    let number = |field| match rope.get(field)? {
        Some(number) => Ok(number),
        None => bail!("config.json: {name}.{field}: expected a number, got none"),
    };
    if rope.or("partial_rotary_factor", 1.)? != 1. {
        return Err(unsupported(&format!("{name}.partial_rotary_factor"), "another", "1"));
    }
    match rope.or("rope_type", old_name)?.as_str() {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_positions,
        }),
        other => Err(unsupported(&format!("{name}.rope_type"), other, "default, linear or llama3")),
    }
}

fn unsupported(field: &str, got: &str, known: &str) -> candle_core::Error {
    candle_core::Error::Msg(format!(
        "config.json: {field}: expected {known}, got {got:?}: this model has no other"
    ))
    .bt()
}

/// A JSON object, read field by field so that an error can name the field.
struct Fields(Map<String, Value>);

impl Fields {
    /// The value of a field; `None` if it is absent or null.
    fn get<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let value = self.0.get(name).cloned().unwrap_or(Value::Null);
        match serde_json::from_value(value) {
            Ok(value) => Ok(value),
            Err(error) => bail!("config.json: {name}: {error}: correct the file"),
        }
    }

    fn or<T: DeserializeOwned>(&self, name: &str, default: T) -> Result<T> {
        Ok(self.get(name)?.unwrap_or(default))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            let json = format!(
                r#""rope_scaling": {{ {scaling}, "high_freq_factor": 4 {inner} }} {outer}"#
            );
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
            ("{}", "config.json: model_type: expected gpt2 or llama, got \"\""),
            (r#"{"model_type": "bert"}"#, "model_type: expected gpt2 or llama, got \"bert\""),
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
            (r#"{"model_type": "llama", "hidden_act": "gelu"}"#, "hidden_act: expected silu, "),
            (
                r#"{"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4}}"#,
                "rope_scaling.rope_type: expected default, linear or llama3, got \"yarn\"",
            ),
            (
                r#"{"model_type": "llama", "rope_parameters": {"rope_type": "linear"}}"#,
                "rope_parameters.factor: expected a number, got none",
            ),
            (
                r#"{"model_type": "llama", "attention_dropout": 1.5}"#,
                "attn_pdrop: expected a probability from 0 to 1, got 1.5",
            ),
            (
                r#"{"model_type": "llama", "num_key_value_heads": 5}"#,
                "num_key_value_heads: expected a divisor of num_attention_heads = 32, got 5",
            ),
        ] {
            assert!(error(json).contains(expected), "{}", error(json));
        }
    }
}
