//! The hyperparameters of a Transformer, read from Hugging Face's `config.json`.

mod decoder;
mod fields;
mod rope;
#[cfg(test)]
mod tests;

use std::path::Path;

use candle_core::{Result, bail};

use super::TransformerConfig;
use crate::functional::Activation;
use crate::vars::read_text;
use fields::{Fields, unsupported};

impl TransformerConfig {
    /// Reads `config.json` of a checkpoint's folder.
    ///
    /// # Errors
    /// The file cannot be read, or see [`from_hf_config`](Self::from_hf_config).
    pub fn from_pretrained(dir: impl AsRef<Path>) -> Result<Self> {
        Self::from_hf_config(&read_text(&dir.as_ref().join("config.json"))?)
    }

    /// Reads the text of a Hugging Face `config.json` whose `model_type` is `gpt2`, `llama`, `mistral`,
    /// `qwen2` or `qwen3`.
    ///
    /// What the file leaves out has the default of Hugging Face's configuration of that type. What does
    /// not change the model (token ids, caching, versions) is not looked at.
    ///
    /// # Errors
    /// The text is no JSON object, a field has a value of another kind, or asks for something this
    /// model does not have: another `model_type`, quantised weights, an activation or a kind of
    /// `rope_scaling` that is unknown here, GPT-2's variants of attention, windows other than those of
    /// the last layers. Each error names the field.
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
        let fields = Fields::new(json)?;
        if fields.set("quantization_config").is_some() {
            bail!(
                "config.json: quantization_config: expected none, got quantised weights: take the \
                 checkpoint that they were made from"
            )
        }
        // What changes any of Hugging Face's decoders, or takes the weights from another file.
        let elsewhere = [
            "per_layer_config",
            "text_config",
            "decoder",
            "attention_chunk_size",
            "transformers_weights",
        ];
        for name in elsewhere {
            if let Some(value) = fields.set(name) {
                return Err(unsupported(name, &value.to_string(), "none"));
            }
        }
        fields.expect("is_causal", true)?;
        let config = match fields.or("model_type", String::new())?.as_str() {
            "gpt2" => Self::from_gpt2(&fields)?,
            family @ ("llama" | "mistral" | "qwen2" | "qwen3") => decoder::read(&fields, family)?,
            other => {
                return Err(unsupported(
                    "model_type",
                    other,
                    "gpt2, llama, mistral, qwen2 or qwen3",
                ));
            }
        };
        config.validate()?;
        Ok(config)
    }

    fn from_gpt2(fields: &Fields) -> Result<Self> {
        // Variants of attention that no published GPT-2 uses. `reorder_and_upcast_attn` is not one:
        // it changes the rounding alone, whichever it is.
        let _: bool = fields.or("reorder_and_upcast_attn", false)?;
        fields.expect("scale_attn_weights", true)?;
        fields.expect("scale_attn_by_inverse_layer_idx", false)?;
        fields.expect("add_cross_attention", false)?;
        let gpt2 = Self::gpt2();
        // Hugging Face takes the names that all its models share before GPT-2's own.
        let either = |shared, own, default| fields.or(shared, fields.or(own, default)?);
        let num_hidden_layers = either("num_hidden_layers", "n_layer", gpt2.num_hidden_layers)?;
        fields.expect_full_attention(num_hidden_layers)?;
        let intermediate_size: Option<usize> = fields.get("n_inner")?;
        if let Some(size) = intermediate_size.filter(|size| !(1..1 << 40).contains(size)) {
            bail!(
                "config.json: n_inner: expected a width from 1 to 2^40, got {size}: correct the file"
            )
        }
        let act = fields.or("activation_function", "gelu_new".to_string())?;
        Ok(Self {
            vocab_size: fields.or("vocab_size", gpt2.vocab_size)?,
            max_position_embeddings: either(
                "max_position_embeddings",
                "n_positions",
                gpt2.max_position_embeddings,
            )?,
            hidden_size: either("hidden_size", "n_embd", gpt2.hidden_size)?,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads: either("num_attention_heads", "n_head", gpt2.num_attention_heads)?,
            hidden_act: activation("activation_function", &act)?,
            norm_eps: fields.positive("layer_norm_epsilon", gpt2.norm_eps)?,
            tie_word_embeddings: fields.or("tie_word_embeddings", true)?,
            initializer_range: fields.positive("initializer_range", gpt2.initializer_range)?,
            embd_pdrop: fields.probability("embd_pdrop", gpt2.embd_pdrop)?,
            attn_pdrop: fields.probability("attn_pdrop", gpt2.attn_pdrop)?,
            resid_pdrop: fields.probability("resid_pdrop", gpt2.resid_pdrop)?,
            ..gpt2
        })
    }
}

/// The function of this name, without a gate.
fn activation(field: &str, name: &str) -> Result<Activation> {
    Ok(match name {
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_accurate" | "gelu_fast" => {
            Activation::GeluTanh
        }
        "gelu" | "gelu_python" => Activation::GeluErf,
        "quick_gelu" => Activation::QuickGelu,
        "silu" | "swish" => Activation::Silu,
        "relu" => Activation::Relu,
        "relu2" => Activation::Relu2,
        "sigmoid" => Activation::Sigmoid,
        "tanh" => Activation::Tanh,
        other => {
            let known = "gelu_new, gelu_pytorch_tanh, gelu_python_tanh, gelu_accurate, gelu_fast, gelu, \
                         gelu_python, quick_gelu, silu, swish, relu, relu2, sigmoid or tanh";
            return Err(unsupported(field, other, known));
        }
    })
}
