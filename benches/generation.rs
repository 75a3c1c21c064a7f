//! Text from a Transformer, its keys and values cached, against computing the whole text for every token;
//! on the CPU in f32, with weights at random.
//!
//! ```text
//! cargo bench --bench generation
//! ```

use std::sync::Arc;

use candle_core::{DType, Device, IndexOp, Result, Tensor};
use candle_dropout::{
    GenerationConfig, MaskGenerator, Transformer, TransformerConfig, seeded_var_builder,
};
use candle_nn::{VarBuilder, VarMap};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const PROMPT: u32 = 128;
const NEW: usize = 32;

/// A model whose weights are constants, as if loaded to be used.
fn model(config: &TransformerConfig) -> Result<Transformer> {
    let (vars, masks, cpu) = (VarMap::new(), Arc::new(MaskGenerator::new(0)), Device::Cpu);
    Transformer::new(config, masks.clone(), seeded_var_builder(&vars, 1, DType::F32, &cpu))?;
    let vars = vars.data().lock().unwrap();
    let weights = vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
    Transformer::new(config, masks, VarBuilder::from_tensors(weights, DType::F32, &cpu))
}

fn cached(model: &Transformer, prompt: &[u32]) -> Result<Vec<u32>> {
    let greedy = GenerationConfig { max_new_tokens: NEW, temperature: 0., ..Default::default() };
    model.generate(prompt, &greedy)
}

fn anew(model: &Transformer, prompt: &[u32]) -> Result<Vec<u32>> {
    let mut ids = prompt.to_vec();
    for _ in 0..NEW {
        let logits = model.forward(&Tensor::new(&*ids, &Device::Cpu)?.unsqueeze(0)?, false)?;
        ids.push(logits.i((0, ids.len() - 1))?.argmax(0)?.to_scalar()?);
    }
    Ok(ids)
}

fn generation(c: &mut Criterion) {
    let base = |config| TransformerConfig {
        vocab_size: 8192,
        max_position_embeddings: 256,
        hidden_size: 512,
        num_hidden_layers: 6,
        num_attention_heads: 8,
        ..config
    };
    let gpt2 = base(TransformerConfig::gpt2());
    let llama = TransformerConfig {
        num_key_value_heads: Some(2),
        intermediate_size: Some(1408),
        ..base(TransformerConfig::llama())
    };
    let prompt: Vec<u32> = (0..PROMPT).map(|at| at * 37 % 8192).collect();
    for (style, config) in [("gpt2", gpt2), ("llama", llama)] {
        let model = model(&config).unwrap();
        assert_eq!(cached(&model, &prompt).unwrap(), anew(&model, &prompt).unwrap());
        let mut group = c.benchmark_group(format!("generation/{style}"));
        group.sample_size(10).throughput(Throughput::Elements(NEW as u64));
        group.bench_function("cached", |b| b.iter(|| cached(&model, &prompt).unwrap()));
        group.bench_function("anew", |b| b.iter(|| anew(&model, &prompt).unwrap()));
        group.finish();
    }
}

criterion_group!(benches, generation);
criterion_main!(benches);
