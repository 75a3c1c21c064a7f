//! The model of a run: its weights, a step, and its loss on held-out text.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use candle_dropout::functional::{CrossEntropyConfig, cross_entropy};
use candle_dropout::training::{
    AdamW, NamedVars, Optimizer, ParamGroup, ParamsAdamW, check_gradients, named_vars,
};
use candle_dropout::{MaskGenerator, Transformer, seeded_var_builder};
use candle_nn::VarMap;

use super::super::corpus::{Document, Window};
use super::order::stream;
use super::{Evaluation, Recipe, Run, Shared};

/// Weights by name.
pub type Weights = BTreeMap<String, Tensor>;

/// Loss of every target, `logits [N, V]` and `targets [N]` -> `[N]`; fewer passes than candle-nn's
/// cross-entropy.
fn token_losses(logits: &Tensor, targets: &Tensor) -> candle_core::Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.detach().max_keepdim(1)?)?; // [N, V]
    let log_sum = shifted.exp()?.sum_keepdim(1)?.log()?; // [N, 1]
    (log_sum - shifted.gather(&targets.unsqueeze(1)?, 1)?)?.squeeze(1) // [N]
}

/// Inputs `[B, T]` and targets `[B * T]`.
pub fn batch(
    documents: &[Document],
    windows: &[Window],
    context: usize,
    device: &Device,
) -> candle_core::Result<(Tensor, Tensor)> {
    let bytes = |shift: usize| -> Vec<u32> {
        let of =
            |w: &Window| &documents[w.document].text[w.start + shift..w.start + shift + context];
        windows.iter().flat_map(of).map(|&byte| u32::from(byte)).collect()
    };
    let inputs = Tensor::from_vec(bytes(0), (windows.len(), context), device)?;
    Ok((inputs, Tensor::from_vec(bytes(1), windows.len() * context, device)?))
}

pub struct Model {
    gpt: Transformer,
    vars: NamedVars,
    masks: Arc<MaskGenerator>,
    fused: bool,
}

impl Model {
    pub fn new(shared: &Shared, run: &Run, start: Option<&Weights>) -> Result<Self> {
        let config = shared.sites.config(&shared.model, run.drop_p);
        // Within a seed every rate sees one stream of masks, which no other random choice shares.
        let masks = Arc::new(MaskGenerator::new(stream(run, 1)));
        let map = VarMap::new();
        let gpt = Transformer::new(
            &config,
            masks.clone(),
            seeded_var_builder(&map, run.seed, DType::F32, &shared.device),
        )?;
        let model = Self { gpt, vars: named_vars(&map)?, masks, fused: config.fused };
        if let Some(weights) = start {
            model.restore(weights)?;
        }
        Ok(model)
    }

    pub fn weights(&self) -> Result<Weights> {
        self.vars
            .iter()
            .map(|(name, var)| Ok((name.clone(), var.as_tensor().copy()?.detach())))
            .collect()
    }

    pub fn restore(&self, weights: &Weights) -> Result<()> {
        for (name, var) in &self.vars {
            var.set(weights.get(name).with_context(|| format!("no weights for {name}"))?)?;
        }
        Ok(())
    }

    /// Mean loss of a batch, and its gradient.
    fn gradients(
        &self,
        inputs: &Tensor,
        targets: &Tensor,
        with_dropout: bool,
    ) -> Result<(Tensor, GradStore)> {
        let logits = self.gpt.forward(inputs, with_dropout)?.flatten_to(1)?;
        let loss = match self.fused {
            true => cross_entropy(&logits, targets, &CrossEntropyConfig::default())?,
            false => token_losses(&logits, targets)?.mean_all()?,
        };
        let grads = loss.backward()?;
        Ok((loss, grads))
    }

    /// Every variable learns from a batch.
    pub fn check_gradients(&self, inputs: &Tensor, targets: &Tensor) -> Result<()> {
        Ok(check_gradients(&self.vars, &self.gradients(inputs, targets, false)?.1)?)
    }

    /// Mean loss of a batch; with its gradient applied.
    pub fn step(
        &self,
        adamw: &mut AdamW,
        inputs: &Tensor,
        targets: &Tensor,
        with_dropout: bool,
    ) -> Result<f64> {
        let (loss, grads) = self.gradients(inputs, targets, with_dropout)?;
        adamw.step(&grads)?;
        let loss = f64::from(loss.to_scalar::<f32>()?);
        ensure!(loss.is_finite(), "the training loss is {loss}: lower the learning rate");
        Ok(loss)
    }

    /// Loss without dropout, document by document.
    pub fn evaluate(
        &self,
        shared: &Shared,
        documents: &[Document],
        windows: &[Window],
    ) -> Result<Evaluation> {
        let (keys, context) = (self.masks.state().counter, shared.model.max_position_embeddings);
        let mut sums = BTreeMap::<usize, (f64, usize)>::new();
        for chunk in windows.chunks(shared.eval_batch) {
            let (inputs, targets) = batch(documents, chunk, context, &shared.device)?;
            let logits = self.gpt.forward(&inputs, false)?.flatten_to(1)?;
            let losses = token_losses(&logits, &targets)?
                .reshape((chunk.len(), context))?
                .sum(1)?
                .to_vec1::<f32>()?;
            for (window, loss) in chunk.iter().zip(losses) {
                let sum = sums.entry(window.document).or_default();
                *sum = (sum.0 + f64::from(loss), sum.1 + context);
            }
        }
        ensure!(self.masks.state().counter == keys, "evaluation drew dropout masks");
        Ok(Evaluation { documents: sums.into_values().collect() })
    }
}

pub fn adamw(model: &Model, recipe: &Recipe) -> Result<AdamW> {
    let params = ParamsAdamW {
        lr: recipe.lr,
        beta2: 0.99,
        weight_decay: recipe.weight_decay,
        ..Default::default()
    };
    Ok(AdamW::from_groups(vec![ParamGroup::new(&model.vars)], params)?
        .with_clip_norm(recipe.clip)?)
}
