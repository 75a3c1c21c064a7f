//! The training kit: a state that is taken back bit for bit or refused, trainings that are killed and go on,
//! gradients of micro-batches.

mod accumulate;
mod clip;
mod damaged;
mod killed;
mod state;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::functional::{CrossEntropyConfig, cross_entropy};
use candle_dropout::training::{
    AdamW, LrSchedule, NamedVars, ParamGroup, TrainingState, named_vars,
};
use candle_dropout::{MaskGenerator, Transformer, TransformerConfig, seeded_var_builder};
use candle_nn::{Optimizer, ParamsAdamW, VarMap};

/// What a training consists of, as a user writes it.
struct Training {
    gpt: Transformer,
    vars: NamedVars,
    masks: Arc<MaskGenerator>,
    adamw: AdamW,
    schedule: LrSchedule,
    state: TrainingState,
}

impl Training {
    /// A small GPT with dropout, from a seed.
    fn new(width: usize, steps: usize, seed: u64) -> Result<Self> {
        Self::with_vocab(31, width, steps, seed)
    }

    /// With so many tokens, of which the text has the first 31.
    fn with_vocab(vocab_size: usize, width: usize, steps: usize, seed: u64) -> Result<Self> {
        let config = TransformerConfig {
            vocab_size,
            max_position_embeddings: 24,
            hidden_size: width,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            ..TransformerConfig::gpt2()
        };
        let (map, masks) = (VarMap::new(), Arc::new(MaskGenerator::new(seed)));
        let vb = seeded_var_builder(&map, seed, DType::F32, &Device::Cpu);
        let gpt = Transformer::new(&config.with_dropout(0.1), masks.clone(), vb)?;
        let vars = named_vars(&map)?;
        let adamw = adamw(&vars, ParamsAdamW::default())?.with_clip_norm(1.)?;
        let schedule = LrSchedule::cosine(1e-2, steps)?.with_warmup(steps / 10);
        let state =
            TrainingState::new(&vars).with_masks("gpt", &masks).with_schedule("lr", &schedule);
        Ok(Self { gpt, vars, masks, adamw, schedule, state })
    }

    /// The loss of a step, which is taken.
    fn step(&mut self, step: usize) -> Result<f32> {
        let ids: Vec<u32> =
            (0..4 * 25).map(|i| ((i * i + 7 * step * (i + 3)) % 31) as u32).collect();
        let ids = Tensor::from_vec(ids, (4, 25), &Device::Cpu)?;
        let logits = self.gpt.forward(&ids.narrow(1, 0, 24)?, true)?;
        let targets = ids.narrow(1, 1, 24)?.contiguous()?;
        let loss = cross_entropy(&logits, &targets, &CrossEntropyConfig::default())?;
        self.adamw.set_learning_rate(self.schedule.at(step));
        self.adamw.backward_step(&loss)?;
        loss.to_scalar()
    }

    /// Everything that a step depends on, bit for bit.
    fn bits(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        bits(&self.vars, &self.adamw, &[&self.masks])
    }
}

/// An optimiser of these variables, under their names.
fn adamw(vars: &NamedVars, params: ParamsAdamW) -> Result<AdamW> {
    AdamW::from_groups(vec![ParamGroup::new(vars)], params)
}

fn bits(
    vars: &NamedVars,
    adamw: &AdamW,
    masks: &[&MaskGenerator],
) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut bits = BTreeMap::new();
    let state = adamw.state()?;
    let weights = vars.iter().map(|(name, var)| (name, var.as_tensor()));
    for (kind, (name, tensor)) in
        weights.map(|weight| ("weight", weight)).chain(state.iter().map(|of| ("optimizer", of)))
    {
        let mut bytes = Vec::new();
        tensor.write_bytes(&mut bytes)?;
        bits.insert(format!("{kind} {name}"), bytes);
    }
    for (i, masks) in masks.iter().enumerate() {
        bits.insert(format!("masks {i}"), masks.state().to_bytes().to_vec());
    }
    Ok(bits)
}

/// A folder of its own for a test, which is removed with it.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Result<Self> {
        let folder =
            std::env::temp_dir().join(format!("candle-dropout-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}
