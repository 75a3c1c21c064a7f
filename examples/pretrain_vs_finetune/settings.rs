//! Presets, and the full configuration of a job.

use anyhow::{Result, ensure};
use candle_dropout::TransformerConfig;
use clap::ValueEnum;
use serde::Serialize;

use super::corpus::VOCAB_SIZE;
use super::train::{Recipe, Sites};

#[derive(Debug, Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Minutes on two cores.
    Cpu,
    /// Seconds; decides nothing.
    Quick,
    /// Minutes on one large GPU; wants text of its own.
    Gpu,
}

/// The full configuration of a job.
#[derive(Debug, Clone, Serialize)]
pub struct Settings {
    preset: Preset,
    pub device: String,
    pub threads: usize,
    pub seed: u64,
    pub pretrain_rates: Vec<f32>,
    pub finetune_rates: Vec<f32>,
    pub pretrain_seeds: usize,
    pub finetune_seeds: usize,
    pub pretrain: Recipe,
    /// Its steps are the most that are tried and that early stopping may take; its learning rate
    /// becomes that which is chosen.
    pub finetune: Recipe,
    /// Learning rates of fine-tuning to choose from.
    pub finetune_lrs: Vec<f64>,
    /// Steps of the arm of a fixed number of steps; by default chosen.
    pub finetune_steps: Option<usize>,
    /// Of the stress arm: in the `cpu` preset far too many steps.
    pub stress: Recipe,
    pub finetune_bytes: usize,
    pub context: usize,
    pub layers: usize,
    pub width: usize,
    pub heads: usize,
    pub drop_path_rate: f32,
    pub sites: Sites,
    pub fused: bool,
    pub dev_windows: usize,
    pub test_windows: usize,
    pub eval_batch: usize,
}

impl Settings {
    pub fn preset(preset: Preset) -> Self {
        let pretrain = Recipe {
            steps: 400,
            batch: 16,
            lr: 3e-3,
            warmup: 40,
            final_lr: 0.1,
            weight_decay: 0.0,
            clip: 1.0,
            eval_every: 100,
            patience: 4,
        };
        let finetune = Recipe {
            steps: 200,
            lr: 2e-3,
            warmup: 20,
            final_lr: 1.0,
            eval_every: 10,
            ..pretrain.clone()
        };
        let cpu = Self {
            preset,
            device: "cpu".into(),
            threads: 1,
            seed: 1,
            pretrain_rates: vec![0.0, 0.1],
            finetune_rates: vec![0.0, 0.05, 0.1, 0.2],
            pretrain_seeds: 4,
            finetune_seeds: 4,
            pretrain,
            stress: finetune.clone(),
            finetune: Recipe { steps: 300, ..finetune },
            finetune_lrs: vec![2e-3, 1e-3, 5e-4, 2.5e-4],
            finetune_steps: None,
            finetune_bytes: 4_000,
            context: 64,
            layers: 2,
            width: 64,
            heads: 4,
            drop_path_rate: 0.0,
            sites: Sites::All,
            fused: true,
            dev_windows: 128,
            test_windows: 512,
            eval_batch: 32,
        };
        match preset {
            Preset::Cpu => cpu,
            Preset::Quick => Self {
                pretrain_seeds: 2,
                finetune_seeds: 2,
                finetune_rates: vec![0.0, 0.1],
                pretrain: Recipe { steps: 40, batch: 8, warmup: 4, eval_every: 20, ..cpu.pretrain },
                finetune: Recipe { steps: 20, batch: 8, warmup: 2, eval_every: 5, ..cpu.finetune },
                stress: Recipe { steps: 40, batch: 8, warmup: 2, eval_every: 10, ..cpu.stress },
                finetune_lrs: vec![2e-3, 1e-3],
                finetune_bytes: 2_000,
                context: 32,
                layers: 1,
                width: 32,
                dev_windows: 32,
                test_windows: 64,
                ..cpu
            },
            Preset::Gpu => Self {
                pretrain_rates: vec![0.0, 0.05, 0.1, 0.2],
                finetune_rates: vec![0.0, 0.05, 0.1, 0.2, 0.3],
                pretrain_seeds: 3,
                finetune_seeds: 3,
                pretrain: Recipe {
                    steps: 1_000,
                    batch: 128,
                    lr: 1e-3,
                    warmup: 100,
                    ..cpu.pretrain
                },
                finetune: Recipe { steps: 250, batch: 32, lr: 3e-4, ..cpu.finetune },
                stress: Recipe { steps: 250, batch: 32, lr: 3e-4, ..cpu.stress },
                finetune_lrs: vec![6e-4, 3e-4, 1.5e-4, 7.5e-5],
                finetune_bytes: 50_000,
                context: 128,
                layers: 4,
                width: 256,
                heads: 8,
                dev_windows: 512,
                test_windows: 2_048,
                eval_batch: 256,
                ..cpu
            },
        }
    }

    /// The model, without its dropout rates.
    pub fn gpt(&self) -> TransformerConfig {
        TransformerConfig {
            vocab_size: VOCAB_SIZE,
            max_position_embeddings: self.context,
            hidden_size: self.width,
            num_hidden_layers: self.layers,
            num_attention_heads: self.heads,
            drop_path_rate: self.drop_path_rate,
            fused: self.fused,
            ..TransformerConfig::gpt2()
        }
    }

    pub fn pretrain_seeds(&self) -> std::ops::Range<u64> {
        // `validate` has seen to it that the sum is a seed.
        self.seed..self.seed.saturating_add(self.pretrain_seeds as u64)
    }

    pub fn finetune_seeds(&self) -> std::ops::Range<u64> {
        self.seed..self.seed.saturating_add(self.finetune_seeds as u64)
    }

    /// The seed after those that are reported.
    pub fn tuning_seed(&self) -> u64 {
        self.seed.saturating_add(self.pretrain_seeds as u64)
    }

    /// Whether anything about fine-tuning is left to choose.
    pub fn wants_tuning(&self) -> bool {
        self.finetune_steps.is_none() || self.finetune_lrs.len() > 1
    }

    #[cfg(test)]
    pub fn for_tests() -> Self {
        Self::preset(Preset::Quick)
    }

    pub fn validate(&self) -> Result<()> {
        let at_least_one = [
            ("--threads", self.threads),
            ("--pretrain-seeds", self.pretrain_seeds),
            ("--finetune-seeds", self.finetune_seeds),
            ("--pretrain-steps", self.pretrain.steps),
            ("--finetune-steps", self.finetune_steps.unwrap_or(1)),
            ("--search-steps", self.finetune.steps),
            ("--stress-steps", self.stress.steps),
            ("--pretrain-batch", self.pretrain.batch),
            ("--finetune-batch", self.finetune.batch),
            ("--context", self.context),
        ];
        for (flag, value) in at_least_one {
            ensure!(value > 0, "{flag}: expected at least 1, got 0");
        }
        ensure!(
            self.device != "cuda" || self.threads == 1,
            "--threads: expected 1 with --device cuda, got {}: candle gives each host thread a CUDA \
             stream of its own, and nothing orders what two of them do to one tensor; leave \
             --threads out",
            self.threads
        );
        let largest = u64::MAX.saturating_sub(self.pretrain_seeds as u64);
        ensure!(
            self.seed <= largest,
            "--seed: expected at most {largest}, so that {} seeds follow on it, got {}",
            self.pretrain_seeds,
            self.seed
        );
        ensure!(!self.finetune_lrs.is_empty(), "--finetune-lr: expected at least one, got none");
        let lrs = self.finetune_lrs.iter().map(|&lr| ("--finetune-lr", lr));
        for (flag, value) in
            lrs.chain([("--pretrain-lr", self.pretrain.lr), ("--stress-lr", self.stress.lr)])
        {
            ensure!(
                value.is_finite() && value > 0.0,
                "{flag}: expected a positive number, got {value}"
            );
        }
        for &p in self.pretrain_rates.iter().chain(&self.finetune_rates) {
            ensure!((0.0..1.0).contains(&p), "dropout rates: expected 0 <= p < 1, got {p}");
        }
        ensure!(
            self.finetune_seeds <= self.pretrain_seeds,
            "--finetune-seeds: expected at most --pretrain-seeds = {}, got {}: every fine-tuning run \
             starts from the pretrained model of its seed",
            self.pretrain_seeds,
            self.finetune_seeds
        );
        Ok(self.gpt().validate()?)
    }
}
