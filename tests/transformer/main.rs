//! The Transformer in every style: gradients, fused against unfused, saving, generation, refused
//! configurations.

mod generation;
mod masks;
mod tokens;
mod training;
mod variables;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::{
    MaskGenerator, RopeScaling, Transformer, TransformerConfig, seeded_var_builder,
};
use candle_nn::{VarMap, loss::cross_entropy};

fn tiny() -> TransformerConfig {
    TransformerConfig {
        vocab_size: 17,
        max_position_embeddings: 12,
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        ..TransformerConfig::gpt2()
    }
    .with_dropout(0.1)
}

/// Grouped queries, a head of its own.
fn tiny_llama() -> TransformerConfig {
    TransformerConfig {
        vocab_size: 17,
        max_position_embeddings: 12,
        hidden_size: 16,
        intermediate_size: Some(24),
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        rope_theta: 100.,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: false,
        ..TransformerConfig::llama()
    }
    .with_dropout(0.1)
}

/// LLaMA's style with what its kin have: a window in the last layer, norms of queries and keys, biases
/// before attention alone.
fn tiny_qwen() -> TransformerConfig {
    TransformerConfig {
        sliding_window: Some(5),
        max_window_layers: 1,
        qk_norm: true,
        attention_bias: true,
        attention_out_bias: Some(false),
        ..tiny_llama()
    }
}

/// Every style, fused or not.
fn styles(fused: bool) -> [TransformerConfig; 3] {
    [tiny(), tiny_llama(), tiny_qwen()].map(|config| TransformerConfig { fused, ..config })
}

fn new_model(config: &TransformerConfig, seed: u64) -> Result<(Transformer, VarMap)> {
    let vars = VarMap::new();
    let vb = seeded_var_builder(&vars, seed, DType::F32, &Device::Cpu);
    Ok((Transformer::new(config, Arc::new(MaskGenerator::new(seed)), vb)?, vars))
}

/// Token ids `[b, t]` that follow a pattern a model can learn.
fn ids(b: usize, t: usize, step: usize) -> Result<Tensor> {
    let ids: Vec<u32> =
        (0..b * t).map(|at| ((at / t + (at % t) * (step + 1)) % 17) as u32).collect();
    Tensor::from_vec(ids, (b, t), &Device::Cpu)
}

fn loss(model: &Transformer, ids: &Tensor, train: bool) -> Result<Tensor> {
    let t = ids.dim(1)? - 1;
    let logits = model.forward(&ids.narrow(1, 0, t)?.contiguous()?, train)?;
    cross_entropy(&logits.flatten_to(1)?, &ids.narrow(1, 1, t)?.flatten_all()?)
}

fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}
