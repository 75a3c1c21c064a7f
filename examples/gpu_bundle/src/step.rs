//! One training step of a GPT: forward, loss, backward, clipped to a norm of 1, AdamW. Clipping and AdamW are this
//! crate's in every form, so that what differs is the model.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_dropout::functional::{CrossEntropyConfig, cross_entropy};
use candle_dropout::training::{
    AdamW, NamedVars, Optimizer, ParamGroup, ParamsAdamW, check_gradients, named_vars,
};
use candle_dropout::{MaskGenerator, Transformer, TransformerConfig, seeded_var_builder};
use candle_nn::VarMap;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::candle_gpt::CandleGpt;

/// Which ops a step runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// The fused ops of this crate.
    Fused,
    /// candle's ops around this crate's `dropout`; the masks are those of `Fused`.
    Unfused,
    /// candle's ops, its dropout too.
    Candle,
}

pub const FORMS: [Form; 3] = [Form::Fused, Form::Unfused, Form::Candle];

impl Form {
    /// Library and variant.
    pub fn names(self) -> [&'static str; 2] {
        match self {
            Self::Fused => ["candle-dropout", "fused"],
            Self::Unfused => ["candle-dropout", "unfused"],
            Self::Candle => ["candle", "chain"],
        }
    }
}

/// A GPT with 96 tokens in its vocabulary, and a batch: 4 layers of width 128 in 4 heads, 32 sequences of 128
/// tokens; on CUDA, which that would leave idle, 6 layers of width 768 in 12 heads, 16 sequences of 512
/// tokens. Or much less.
pub fn size(small: bool, device: &Device) -> (TransformerConfig, usize) {
    let (layers, width, heads, tokens, batch) = match (small, device.is_cuda()) {
        (true, _) => (1, 32, 4, 16, 4),
        (false, false) => (4, 128, 4, 128, 32),
        (false, true) => (6, 768, 12, 512, 16),
    };
    let config = TransformerConfig {
        vocab_size: 96,
        max_position_embeddings: tokens,
        hidden_size: width,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        ..TransformerConfig::gpt2()
    };
    (config, batch)
}

/// The same sizes in the style of LLaMA, with half as many heads of keys and values.
pub fn in_llama_style(gpt2: &TransformerConfig) -> TransformerConfig {
    TransformerConfig {
        vocab_size: gpt2.vocab_size,
        max_position_embeddings: gpt2.max_position_embeddings,
        hidden_size: gpt2.hidden_size,
        intermediate_size: Some(3 * gpt2.hidden_size),
        num_hidden_layers: gpt2.num_hidden_layers,
        num_attention_heads: gpt2.num_attention_heads,
        num_key_value_heads: Some(gpt2.num_attention_heads / 2),
        ..TransformerConfig::llama()
    }
}

/// Logits of token ids, in training.
type Logits = Box<dyn Fn(&Tensor) -> candle_core::Result<Tensor>>;

pub struct Step {
    form: Form,
    logits: Logits,
    pub vars: NamedVars,
    adamw: AdamW,
    inputs: Tensor,
    targets: Tensor,
}

impl Step {
    /// A fresh model and a batch of random tokens; equal arguments give equal weights, masks and tokens.
    pub fn new(
        form: Form,
        (config, batch): &(TransformerConfig, usize),
        drop_p: f32,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let map = VarMap::new();
        let vb = seeded_var_builder(&map, 1, dtype, device);
        let config = config.clone().with_dropout(drop_p);
        let config = TransformerConfig { fused: form == Form::Fused, ..config };
        let logits: Logits = match form {
            Form::Candle => {
                let gpt = CandleGpt::new(&config, vb)?;
                Box::new(move |ids| gpt.forward(ids))
            }
            _ => {
                let gpt = Transformer::new(&config, Arc::new(MaskGenerator::new(2)), vb)?;
                Box::new(move |ids| gpt.forward(ids, true))
            }
        };
        let vars = named_vars(&map)?;
        let params = ParamsAdamW { lr: 3e-4, ..Default::default() };
        let adamw = AdamW::from_groups(vec![ParamGroup::new(&vars)], params)?.with_clip_norm(1.)?;
        let t = config.max_position_embeddings;
        let mut rng = StdRng::seed_from_u64(3);
        let mut ids = || -> Result<Vec<u32>> {
            Ok((0..batch * t).map(|_| rng.random_range(0..config.vocab_size as u32)).collect())
        };
        let inputs = Tensor::from_vec(ids()?, (*batch, t), device)?;
        let targets = Tensor::from_vec(ids()?, batch * t, device)?;
        Ok(Self { form, logits, vars, adamw, inputs, targets })
    }

    /// Mean loss of the batch.
    pub fn loss(&self) -> candle_core::Result<Tensor> {
        let logits = (self.logits)(&self.inputs)?.flatten_to(1)?;
        match self.form {
            Form::Fused => cross_entropy(&logits, &self.targets, &CrossEntropyConfig::default()),
            Form::Unfused | Form::Candle => {
                candle_nn::loss::cross_entropy(&logits.to_dtype(DType::F32)?, &self.targets)
            }
        }
    }

    /// Backward, clipped, applied. Nothing waits for the device.
    pub fn apply(&mut self, loss: &Tensor) -> candle_core::Result<()> {
        self.adamw.backward_step(loss)
    }

    pub fn run(&mut self) -> candle_core::Result<Tensor> {
        let loss = self.loss()?;
        self.apply(&loss)?;
        Ok(loss)
    }

    /// The loss and each gradient by name, as f32 on the CPU.
    pub fn gradients(&self) -> Result<(f32, BTreeMap<String, Tensor>)> {
        let loss = self.loss()?;
        let grads = loss.backward()?;
        check_gradients(&self.vars, &grads)?;
        let there = self.vars.iter().filter_map(|(name, var)| Some((name, grads.get(var)?)));
        let on_cpu = there.map(|(name, grad)| -> Result<(String, Tensor)> {
            Ok((name.clone(), grad.to_device(&Device::Cpu)?.to_dtype(DType::F32)?))
        });
        Ok((loss.to_scalar()?, on_cpu.collect::<Result<_>>()?))
    }
}

/// Demands that `ours` has the loss and, in norm, each gradient of `other`.
pub fn check_agree(what: &str, ours: &Step, other: &Step, tolerance: f64) -> Result<()> {
    let ((loss, ours), (other_loss, others)) = (ours.gradients()?, other.gradients()?);
    ensure!(
        f64::from((loss - other_loss).abs()) <= tolerance * f64::from(other_loss),
        "{what}: the loss is {loss}, not {other_loss}"
    );
    for (name, other) in &others {
        let norm = |x: &Tensor| -> Result<f64> {
            Ok(f64::from(x.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt())
        };
        let ours = ours.get(name).with_context(|| format!("{what}: no gradient of {name}"))?;
        let (off, size) = (norm(&(ours - other)?)?, norm(other)?);
        // A NaN is not within the tolerance either.
        let within = off <= tolerance * size.max(1e-6);
        ensure!(within, "{what}: the gradient of {name} is off by {off:e} of {size:e}");
    }
    Ok(())
}
