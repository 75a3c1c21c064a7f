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
    pretrain_epochs: f64,
    finetune_epochs: f64,
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
        let epochs = |recipe: &Recipe, bytes: usize| {
            (recipe.steps * recipe.batch * settings.context) as f64 / bytes as f64
        };
        let (pretrain_bytes, finetune_bytes) = (pretrain.bytes(), finetune.bytes());
        Self {
            fnv1a_64: format!("{hash:016x}"),
            pretrain_epochs: epochs(&settings.pretrain, pretrain_bytes[0]),
            finetune_epochs: epochs(&settings.finetune, finetune_bytes[0]),
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
        for (name, [train, dev, test], epochs) in [
            ("pretraining", self.pretrain_bytes, self.pretrain_epochs),
            ("fine-tuning", self.finetune_bytes, self.finetune_epochs),
        ] {
            println!("  {name}: train {train} bytes ({epochs:.2} epochs), dev {dev}, test {test}");
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
