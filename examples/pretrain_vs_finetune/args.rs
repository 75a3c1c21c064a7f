//! The command line.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

use super::corpus::{self, Splits};
use super::settings::{Preset, Settings};
use super::train::Sites;

/// Which dropout for pretraining, which for fine-tuning? Trains a small GPT at several rates and
/// seeds and says.
///
/// Without text it pretrains on the source code of this crate's dependencies and fine-tunes on
/// their prose.
#[derive(Debug, Parser)]
#[command(name = "pretrain_vs_finetune")]
pub struct Args {
    /// Sizes and budgets to start from; every other flag overrides one of them.
    #[arg(long, value_enum, default_value = "cpu")]
    preset: Preset,
    /// A run of seconds that shows the program works and decides nothing: the same as `--preset
    /// quick`.
    #[arg(long, conflicts_with = "preset")]
    quick: bool,

    /// Files to pretrain on; documents are files or parts between form feeds.
    #[arg(long, num_args = 1.., value_name = "PATH", requires = "finetune")]
    pretrain: Option<Vec<PathBuf>>,
    /// Files to fine-tune on.
    #[arg(long, num_args = 1.., value_name = "PATH", requires = "pretrain")]
    finetune: Option<Vec<PathBuf>>,
    /// Held-out files for pretraining; without them a tenth of the documents (or of each, below
    /// ten) is held out.
    #[arg(long, num_args = 1.., value_name = "PATH", requires_all = ["pretrain", "pretrain_test"])]
    pretrain_dev: Option<Vec<PathBuf>>,
    /// Files read once at the end.
    #[arg(long, num_args = 1.., value_name = "PATH", requires = "pretrain_dev")]
    pretrain_test: Option<Vec<PathBuf>>,
    /// Held-out files for fine-tuning.
    #[arg(long, num_args = 1.., value_name = "PATH", requires_all = ["finetune", "finetune_test"])]
    finetune_dev: Option<Vec<PathBuf>>,
    /// Files read once at the end.
    #[arg(long, num_args = 1.., value_name = "PATH", requires = "finetune_dev")]
    finetune_test: Option<Vec<PathBuf>>,

    /// Folder for report.json and report.svg.
    #[arg(long, default_value = "target/pretrain_vs_finetune")]
    pub out: PathBuf,
    /// Where to train.
    #[arg(long, value_parser = ["cpu", "cuda"], default_value = "cpu")]
    pub device: String,
    /// Runs side by side [default: one a core; on cuda always 1].
    #[arg(long)]
    threads: Option<usize>,

    /// Dropout rates of pretraining; 0 is always among them.
    #[arg(long, value_delimiter = ',', value_name = "P,P..")]
    pretrain_rates: Option<Vec<f32>>,
    /// Dropout rates of fine-tuning; 0 is always among them.
    #[arg(long, value_delimiter = ',', value_name = "P,P..")]
    finetune_rates: Option<Vec<f32>>,
    /// Number of seeds in pretraining.
    #[arg(long)]
    pretrain_seeds: Option<usize>,
    /// Number of seeds in fine-tuning, at most those of pretraining.
    #[arg(long)]
    finetune_seeds: Option<usize>,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    #[arg(long)]
    pretrain_steps: Option<usize>,
    /// Steps of fine-tuning [default: what is best for p = 0 on a seed that is not reported].
    #[arg(long)]
    finetune_steps: Option<usize>,
    /// The most steps of fine-tuning that are tried, and that early stopping may take.
    #[arg(long)]
    search_steps: Option<usize>,
    /// Steps of the stress arm, by default far more than are good.
    #[arg(long)]
    stress_steps: Option<usize>,
    #[arg(long)]
    pretrain_lr: Option<f64>,
    /// Learning rates of fine-tuning, of which the best for p = 0 on a seed that is not reported is
    /// taken.
    #[arg(long, value_delimiter = ',', value_name = "LR,LR..")]
    finetune_lr: Option<Vec<f64>>,
    #[arg(long)]
    stress_lr: Option<f64>,
    /// Windows a step in pretraining.
    #[arg(long)]
    pretrain_batch: Option<usize>,
    /// Windows a step in fine-tuning.
    #[arg(long)]
    finetune_batch: Option<usize>,
    /// Fine-tune on the first so many bytes.
    #[arg(long)]
    finetune_bytes: Option<usize>,
    #[arg(long)]
    weight_decay: Option<f64>,

    /// Bytes a window.
    #[arg(long)]
    context: Option<usize>,
    #[arg(long)]
    layers: Option<usize>,
    /// Width of the residual stream.
    #[arg(long)]
    width: Option<usize>,
    #[arg(long)]
    heads: Option<usize>,
    /// Stochastic depth of every run.
    #[arg(long)]
    drop_path_rate: Option<f32>,
    /// Where the rates apply.
    #[arg(long, value_enum, default_value = "all")]
    sites: Sites,
    /// Use candle's own ops around dropout instead of the fused ones; the masks are the same.
    #[arg(long)]
    unfused: bool,
}

impl Args {
    pub fn settings(&self) -> Result<Settings> {
        let mut s = Settings::preset(if self.quick { Preset::Quick } else { self.preset });
        fn set<T: Clone>(field: &mut T, flag: &Option<T>) {
            if let Some(value) = flag {
                *field = value.clone();
            }
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        s.device = self.device.clone();
        s.threads = self.threads.unwrap_or(if s.device == "cuda" { 1 } else { cores });
        s.seed = self.seed;
        set(&mut s.pretrain_rates, &self.pretrain_rates);
        set(&mut s.finetune_rates, &self.finetune_rates);
        set(&mut s.pretrain_seeds, &self.pretrain_seeds);
        set(&mut s.finetune_seeds, &self.finetune_seeds);
        set(&mut s.pretrain.steps, &self.pretrain_steps);
        set(&mut s.finetune.steps, &self.search_steps);
        set(&mut s.stress.steps, &self.stress_steps);
        s.finetune_steps = self.finetune_steps;
        set(&mut s.pretrain.lr, &self.pretrain_lr);
        set(&mut s.finetune_lrs, &self.finetune_lr);
        set(&mut s.stress.lr, &self.stress_lr);
        set(&mut s.pretrain.batch, &self.pretrain_batch);
        set(&mut s.finetune.batch, &self.finetune_batch);
        set(&mut s.stress.batch, &self.finetune_batch);
        set(&mut s.pretrain.weight_decay, &self.weight_decay);
        set(&mut s.finetune.weight_decay, &self.weight_decay);
        set(&mut s.stress.weight_decay, &self.weight_decay);
        set(&mut s.finetune_bytes, &self.finetune_bytes);
        set(&mut s.context, &self.context);
        set(&mut s.layers, &self.layers);
        set(&mut s.width, &self.width);
        set(&mut s.heads, &self.heads);
        set(&mut s.drop_path_rate, &self.drop_path_rate);
        s.sites = self.sites;
        s.fused = !self.unfused;
        for rates in [&mut s.pretrain_rates, &mut s.finetune_rates] {
            rates.push(0.0);
            rates.sort_by(f32::total_cmp);
            rates.dedup();
        }
        s.validate()?;
        Ok(s)
    }

    /// The texts of pretraining and fine-tuning, split.
    pub fn texts(&self, settings: &Settings) -> Result<(Splits, Splits)> {
        let (Some(pretrain), Some(finetune)) = (&self.pretrain, &self.finetune) else {
            return corpus::built_in();
        };
        let read = |train: &[PathBuf],
                    dev: &Option<Vec<PathBuf>>,
                    test: &Option<Vec<PathBuf>>|
         -> Result<Splits> {
            let train = corpus::read_documents(train)?;
            match (dev, test) {
                (Some(dev), Some(test)) => {
                    let (dev, test) = (corpus::read_documents(dev)?, corpus::read_documents(test)?);
                    Ok(Splits { train, dev, test })
                }
                _ => Ok(Splits::of(train, settings.context)),
            }
        };
        let pretrain = read(pretrain, &self.pretrain_dev, &self.pretrain_test)?;
        Ok((pretrain, read(finetune, &self.finetune_dev, &self.finetune_test)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(flags: &[&str]) -> Result<Settings> {
        Args::try_parse_from([&["pretrain_vs_finetune"], flags].concat())?.settings()
    }

    #[test]
    fn flags_override_presets_and_zero_is_always_a_rate() {
        let s = settings(&["--quick", "--finetune-rates", "0.3,0.1,0.1", "--pretrain-lr", "0.5"])
            .unwrap();
        assert_eq!((s.layers, s.pretrain.lr, s.finetune_rates), (1, 0.5, vec![0.0, 0.1, 0.3]));
    }

    #[test]
    fn the_largest_seed_is_followed_by_all_others() {
        let s = settings(&["--seed", "18446744073709551611"]).unwrap();
        assert_eq!(s.pretrain_seeds().count(), 4);
        assert_eq!(s.finetune_seeds().last(), Some(u64::MAX - 1));
    }

    #[test]
    fn a_number_of_steps_and_one_learning_rate_leave_nothing_to_tune() {
        let wants = |flags: &[&str]| settings(flags).unwrap().wants_tuning();
        assert!(wants(&[]) && wants(&["--finetune-steps", "30"]) && wants(&["--finetune-lr", "1"]));
        assert!(!wants(&["--finetune-steps", "30", "--finetune-lr", "1e-3"]));
        let s = settings(&["--seed", "7", "--search-steps", "80", "--stress-lr", "1e-2"]).unwrap();
        assert_eq!((s.tuning_seed(), s.finetune.steps, s.stress.steps), (11, 80, 200));
        assert!(!s.pretrain_seeds().contains(&s.tuning_seed()) && s.stress.lr == 1e-2);
    }

    #[test]
    fn threads_side_by_side_are_refused_on_cuda() {
        let error = settings(&["--device", "cuda", "--threads", "2"]).unwrap_err().to_string();
        assert!(error.starts_with("--threads: expected 1 with --device cuda, got 2: "), "{error}");
        assert!(error.contains("leave --threads out"), "{error}");
        assert_eq!(settings(&["--device", "cuda"]).unwrap().threads, 1);
        assert_eq!(settings(&["--device", "cuda", "--threads", "1"]).unwrap().threads, 1);
        assert_eq!(settings(&["--threads", "2"]).unwrap().threads, 2);
    }

    #[test]
    fn bad_flags_are_refused_with_a_reason() {
        let error = |flags: &[&str]| settings(flags).unwrap_err().to_string();
        assert!(error(&["--pretrain-rates", "0.1,1"]).contains("expected 0 <= p < 1, got 1"));
        assert!(error(&["--finetune-seeds", "9"]).contains("at most --pretrain-seeds = 4, got 9"));
        assert!(error(&["--context", "0"]).contains("--context: expected at least 1"));
        assert!(
            error(&["--heads", "5"]).contains(
                "transformer: hidden_size: expected a multiple of num_attention_heads = 5"
            )
        );
        assert!(error(&["--stress-steps", "0"]).contains("--stress-steps: expected at least 1"));
        assert!(
            error(&["--finetune-lr", "1e-3,0"])
                .contains("--finetune-lr: expected a positive number")
        );
        assert!(error(&["--pretrain", "a.txt"]).contains("--finetune"));
        let error = error(&["--seed", "18446744073709551615"]);
        assert!(error.contains("--seed: expected at most 18446744073709551611"), "{error}");
    }
}
