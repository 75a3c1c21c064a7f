//! How a phase trains.

use candle_dropout::TransformerConfig;
use clap::ValueEnum;
use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    Pretrain,
    Finetune,
}

/// Where a run's dropout rate applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sites {
    /// Embedding, attention weights and residual branches.
    All,
    /// Residual branches only.
    Residual,
}

impl Sites {
    pub fn config(self, model: &TransformerConfig, drop_p: f32) -> TransformerConfig {
        match self {
            Self::All => model.clone().with_dropout(drop_p),
            Self::Residual => {
                TransformerConfig { resid_pdrop: drop_p, ..model.clone().with_dropout(0.0) }
            }
        }
    }
}

/// How a phase trains.
#[derive(Debug, Clone, Serialize)]
pub struct Recipe {
    pub steps: usize,
    pub batch: usize,
    pub lr: f64,
    pub warmup: usize,
    /// Learning rate at the end as a part of `lr`, on a cosine; 1 keeps it constant.
    pub final_lr: f64,
    pub weight_decay: f64,
    /// Largest global norm of the gradient.
    pub clip: f64,
    /// Evaluate on dev every so many steps.
    pub eval_every: usize,
    /// Evaluations without a better dev loss after which the early-stopping arm stops.
    pub patience: usize,
}

impl Recipe {
    pub fn lr_at(&self, step: usize) -> f64 {
        let warmup = ((step + 1) as f64 / self.warmup.max(1) as f64).min(1.0);
        let progress = step.saturating_sub(self.warmup) as f64
            / self.steps.saturating_sub(self.warmup).max(1) as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.lr * warmup * (self.final_lr + (1.0 - self.final_lr) * cosine)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::recipe;
    use super::*;

    #[test]
    fn the_schedule_warms_up_and_decays_to_its_final_value() {
        let r = Recipe { steps: 100, warmup: 10, ..recipe() };
        assert!((r.lr_at(0) - 1e-3).abs() < 1e-12 && (r.lr_at(9) - 1e-2).abs() < 1e-12);
        assert!((r.lr_at(55) - 5.5e-3).abs() < 1e-12 && (r.lr_at(100) - 1e-3).abs() < 1e-12);
        let constant = Recipe { final_lr: 1.0, ..r };
        assert!((constant.lr_at(99) - 1e-2).abs() < 1e-12);
    }
}
