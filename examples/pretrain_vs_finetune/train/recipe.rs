//! How a phase trains.

use candle_dropout::TransformerConfig;
use candle_dropout::training::LrSchedule;
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
    /// The learning rate of every step.
    pub fn schedule(&self) -> candle_core::Result<LrSchedule> {
        LrSchedule::cosine(self.lr, self.steps)?
            .with_warmup(self.warmup)
            .with_final_lr(self.final_lr)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::recipe;
    use super::*;

    #[test]
    fn the_schedule_warms_up_and_decays_to_its_final_value() {
        let r = Recipe { steps: 100, warmup: 10, ..recipe() };
        let schedule = r.schedule().unwrap();
        assert!((schedule.at(0) - 1e-3).abs() < 1e-12 && (schedule.at(9) - 1e-2).abs() < 1e-12);
        assert!(
            (schedule.at(55) - 5.5e-3).abs() < 1e-12 && (schedule.at(100) - 1e-3).abs() < 1e-12
        );
        let constant = Recipe { final_lr: 1.0, ..r }.schedule().unwrap();
        assert_eq!(constant.at(99), 1e-2);
    }
}
