//! Which dropout for pretraining, which for fine-tuning?
//!
//! Pretrains a small GPT on much text, each byte seen once, and fine-tunes it on little text seen
//! many times, for several dropout rates and seeds, and says which rates are best in each phase and
//! how sure that is:
//!
//! ```text
//! cargo run --release --example pretrain_vs_finetune
//! cargo run --release --example pretrain_vs_finetune -- --pretrain books.txt --finetune poems.txt
//! ```
//!
//! Registered before any run: H1, in one-epoch pretraining every p > 0 has a higher dev loss than p
//! = 0; H2, after a fixed number of epochs of fine-tuning on little data some p from 0.05 to 0.2
//! has a lower test loss than p = 0; H3, the same with early stopping.

mod args;
mod corpus;
mod progress;
mod random;
mod report;
mod settings;
mod stats;
mod train;

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use clap::Parser;

pub use args::Args;
use corpus::{Document, Splits, Window};
use progress::Progress;
use report::{Report, TextReport};
use settings::Settings;
use train::{Phase, Run, RunResult, Shared, Task, check_guards, side_by_side, train};

fn main() -> Result<()> {
    run(&Args::parse())
}

/// The whole job, to its report. Call it before any thread is started.
pub fn run(args: &Args) -> Result<()> {
    one_thread_a_run();
    let report = job(args)?;
    report.print();
    report.write(&args.out)
}

fn job(args: &Args) -> Result<Report> {
    let begin = Instant::now();
    let settings = args.settings()?;
    let device = device(&args.device)?;
    let (pretrain, finetune) = args.texts(&settings)?;
    let (tasks, text) = tasks(pretrain, finetune, &settings)?;
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("--out: cannot create {}", args.out.display()))?;
    text.print();

    let shared = Shared {
        model: settings.gpt(),
        sites: settings.sites,
        device,
        eval_batch: settings.eval_batch,
        train_windows: settings.dev_windows,
    };
    let rates = [&settings.pretrain_rates[..], &settings.finetune_rates[..]].concat();
    check_guards(&tasks[&Phase::Pretrain], &shared, &rates)?;
    println!(
        "guards: p = 0 equals no dropout bit for bit, equal seeds give equal runs, keep rates \
         within 4 sigma"
    );
    let pretrained = run_phase(Phase::Pretrain, &tasks, &shared, &settings, &[])?;
    let finetuned = run_phase(Phase::Finetune, &tasks, &shared, &settings, &pretrained)?;
    Ok(Report::new(&settings, text, pretrained, finetuned, begin.elapsed()))
}

/// Candle spreads one op over all cores through a process-wide pool that spins and serves one
/// caller at a time: runs side by side would queue for it (on two cores a step took six times as
/// long). Here every run keeps to its thread.
fn one_thread_a_run() {
    for name in ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"] {
        // SAFETY: `run` calls this before any thread is started, so nothing reads the environment
        // meanwhile.
        unsafe { std::env::set_var(name, "1") }
    }
}

fn device(name: &str) -> Result<Device> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    ensure!(
        candle_core::utils::cuda_is_available(),
        "--device cuda: this program was built without CUDA; build it with \
         `cargo run --release --features cuda --example pretrain_vs_finetune -- --device cuda`"
    );
    Device::new_cuda(0).context("--device cuda: cannot open the first CUDA device")
}

/// Every rate with every seed of a phase. Fine-tuning starts from the p = 0 model of the same seed.
fn run_phase(
    phase: Phase,
    tasks: &BTreeMap<Phase, Task>,
    shared: &Shared,
    settings: &Settings,
    bases: &[RunResult],
) -> Result<Vec<RunResult>> {
    let (rates, seeds) = match phase {
        Phase::Pretrain => (&settings.pretrain_rates, settings.pretrain_seeds()),
        Phase::Finetune => (&settings.finetune_rates, settings.finetune_seeds()),
    };
    let runs: Vec<Run> = seeds
        .flat_map(|seed| rates.iter().map(move |&drop_p| Run { phase, drop_p, seed }))
        .collect();
    let task = &tasks[&phase];
    let progress = Progress::new(phase, runs.len(), task.recipe.steps);
    let results = side_by_side(&runs, settings.threads, |run| {
        let base = bases.iter().find(|base| base.run.drop_p == 0.0 && base.run.seed == run.seed);
        let result = train(*run, task, shared, base.map(|base| &base.weights), || progress.step())
            .with_context(|| format!("{phase:?} with p = {} and seed {}", run.drop_p, run.seed))?;
        progress.finished(&result);
        Ok(result)
    })?;
    progress.close();
    Ok(results)
}

/// Cuts the texts into what the phases train and are judged on, and checks that there is enough of
/// everything.
fn tasks(
    pretrain: Splits,
    mut finetune: Splits,
    settings: &Settings,
) -> Result<(BTreeMap<Phase, Task>, TextReport)> {
    let hash = corpus::fnv1a(&[&pretrain, &finetune]);
    let context = settings.context;
    let available = finetune.bytes()[0];
    let remedy = "give more text or lower --finetune-bytes";
    corpus::require(
        "fine-tuning text",
        available,
        settings.finetune_bytes.max(context + 1),
        remedy,
    )?;
    corpus::truncate(&mut finetune.train, settings.finetune_bytes);
    ensure!(
        !corpus::all_windows(&finetune.train, context).is_empty(),
        "fine-tuning text: no document is longer than a window of {} bytes: give longer documents \
         or lower --context",
        context + 1
    );

    let windows = corpus::windows(&pretrain.train, context).len();
    let need = settings.pretrain.steps * settings.pretrain.batch;
    let remedy = "pretraining sees no byte twice: give more text or lower --pretrain-steps";
    corpus::require("pretraining text", windows * context, need * context, remedy)?;

    let mut text = TextReport::new(hash, &pretrain, &finetune, settings);
    let training: [&[Document]; 2] = [&pretrain.train, &finetune.train];
    let mut held_out = |phase: Phase,
                        split: &str,
                        documents: &[Document],
                        limit: usize|
     -> Result<Vec<Window>> {
        let mut windows = corpus::windows(documents, context);
        // Pretraining is judged before fine-tuning text is seen.
        let seen_by_then = if phase == Phase::Pretrain { &training[..1] } else { &training[..] };
        let removed = corpus::remove_seen(&mut windows, documents, context, seen_by_then);
        let what = format!(
            "{phase:?} {split} text, without the {removed} windows that also occur in training text"
        );
        corpus::require(
            &what.to_lowercase(),
            windows.len() * context,
            2 * context,
            "give more text",
        )?;
        let used = corpus::spread(&windows, limit);
        text.held_out(phase, split, [used.len(), windows.len(), removed]);
        Ok(used)
    };
    let mut windows = Vec::new();
    for (phase, splits) in [(Phase::Pretrain, &pretrain), (Phase::Finetune, &finetune)] {
        windows.push(held_out(phase, "dev", &splits.dev, settings.dev_windows)?);
        windows.push(held_out(phase, "test", &splits.test, settings.test_windows)?);
    }
    let mut windows = windows.into_iter();
    let mut task = |splits: Splits, recipe| -> Result<Task> {
        let mut next = || windows.next().context("held-out windows");
        Ok(Task {
            train: splits.train,
            dev: (splits.dev, next()?),
            test: (splits.test, next()?),
            recipe,
        })
    };
    let pretrain = task(pretrain, settings.pretrain.clone())?;
    let finetune = task(finetune, settings.finetune.clone())?;
    Ok((BTreeMap::from([(Phase::Pretrain, pretrain), (Phase::Finetune, finetune)]), text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> std::path::PathBuf {
        let folder = format!("candle-dropout-job-{}-{name}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn args(flags: &[&str], out: &std::path::Path) -> Args {
        let out = out.to_str().unwrap();
        Args::try_parse_from([&["pretrain_vs_finetune", "--quick", "--out", out], flags].concat())
            .unwrap()
    }

    #[test]
    fn runs_side_by_side_do_not_disturb_one_another() {
        let out = folder("threads");
        let losses = |threads: &str| {
            let flags = ["--pretrain-steps", "6", "--finetune-steps", "6", "--threads", threads];
            job(&args(&flags, &out)).unwrap().losses()
        };
        let alone = losses("1");
        assert_eq!(alone.len(), 2 * 2 * 2 * 2);
        assert_eq!(alone, losses("3"));
        std::fs::remove_dir_all(out).unwrap();
    }

    #[test]
    fn text_of_ones_own_is_trained_on_and_text_too_short_is_refused() {
        let out = folder("text");
        let file = |name: &str, numbers: std::ops::Range<usize>| {
            let path = out.join(name);
            std::fs::write(&path, numbers.map(|i| format!("{} ", i * i)).collect::<String>())
                .unwrap();
            path.display().to_string()
        };
        let (long, short) = (file("long", 0..4000), file("short", 9000..9100));
        let poems = file("poems", 5000..6000);
        let job = |flags: &[&str]| {
            let flags = [&["--pretrain-steps", "6", "--finetune-steps", "6"], flags].concat();
            job(&args(&flags, &out))
                .map(|report| report.losses().len())
                .map_err(|e| format!("{e:#}"))
        };
        assert_eq!(job(&["--pretrain", &long, "--finetune", &poems]), Ok(16));
        let error = job(&["--pretrain", &short, "--finetune", &poems]).unwrap_err();
        assert!(
            error.starts_with("pretraining text: 1536 bytes are needed, there are 704:"),
            "{error}"
        );
        let error = job(&["--pretrain", &long, "--finetune", &short]).unwrap_err();
        assert!(
            error.starts_with("fine-tuning text: 2000 bytes are needed, there are 720:"),
            "{error}"
        );
        // Held-out text that was trained on leaves nothing to judge by.
        let couplet = file("couplet", 5000..5223);
        let seen = ["--finetune-dev", &couplet, "--finetune-test", &couplet];
        let error =
            job(&[&["--pretrain", &long, "--finetune", &couplet], &seen[..]].concat()).unwrap_err();
        assert!(error.contains("also occur in training text: 64 bytes are needed"), "{error}");
        let error = job(&["--pretrain", "no-such-file", "--finetune", &poems]).unwrap_err();
        assert!(error.contains("cannot read no-such-file"), "{error}");
        std::fs::remove_dir_all(out).unwrap();
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn cuda_without_the_feature_names_the_remedy() {
        let out = folder("cuda");
        let error = job(&args(&["--device", "cuda"], &out)).unwrap_err().to_string();
        assert!(error.contains("--features cuda"), "{error}");
        std::fs::remove_dir_all(out).unwrap();
    }
}
