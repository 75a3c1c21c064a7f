//! The text of a job.

use serde::Serialize;

use super::super::corpus::{GUARD_BYTES, Splits};
use super::super::settings::Settings;
use super::super::train::{Phase, Recipe};

/// The text of a job.
#[derive(Debug, Serialize)]
pub struct TextReport {
    fnv1a_64: String,
    pretrain_bytes: [usize; 3],
    finetune_bytes: [usize; 3],
    pub pretrain_epochs_a_step: f64,
    pub finetune_epochs_a_step: f64,
    held_out: Vec<HeldOut>,
}

#[derive(Debug, Serialize)]
struct HeldOut {
    phase: Phase,
    split: String,
    windows: usize,
    /// Removed because they occur in training text.
    removed: usize,
    /// Evaluated, evenly spaced among the rest.
    used: usize,
}

impl TextReport {
    pub fn new(hash: u64, pretrain: &Splits, finetune: &Splits, settings: &Settings) -> Self {
        let (pretrain_bytes, finetune_bytes) = (pretrain.bytes(), finetune.bytes());
        let epochs_a_step = |recipe: &Recipe, bytes: [usize; 3]| {
            (recipe.batch * settings.context) as f64 / bytes[0] as f64
        };
        Self {
            fnv1a_64: format!("{hash:016x}"),
            pretrain_epochs_a_step: epochs_a_step(&settings.pretrain, pretrain_bytes),
            finetune_epochs_a_step: epochs_a_step(&settings.finetune, finetune_bytes),
            pretrain_bytes,
            finetune_bytes,
            held_out: Vec::new(),
        }
    }

    pub fn held_out(&mut self, phase: Phase, split: &str, [used, clean, removed]: [usize; 3]) {
        let split = split.to_string();
        let windows = clean + removed;
        self.held_out.push(HeldOut { phase, split, windows, removed, used });
    }

    pub fn print(&self) {
        println!("text: FNV-1a {} over names and bytes", self.fnv1a_64);
        for (name, [train, dev, test]) in
            [("pretraining", self.pretrain_bytes), ("fine-tuning", self.finetune_bytes)]
        {
            println!("  {name}: train {train} bytes, dev {dev}, test {test}");
        }
        for HeldOut { phase, split, windows, removed, used } in &self.held_out {
            let phase = format!("{phase:?}").to_lowercase();
            println!(
                "  {phase} {split}: {used} windows, of {windows} less {removed} that share {GUARD_BYTES} bytes with \
                 training text"
            );
        }
    }
}
