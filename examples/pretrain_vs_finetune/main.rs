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
//!
//! Changed after results had been seen: the fixed number, and with it the wording of H2, is the number
//! of steps that is best for p = 0 on a tuning seed; what was tried first goes on as a stress arm.

mod args;
mod corpus;
mod progress;
mod random;
pub mod report;
mod settings;
mod stats;
mod train;
mod tuning;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use clap::Parser;

pub use args::Args;
use corpus::{Document, Splits, Window};
use progress::Progress;
use report::{Report, Results, TextReport};
use settings::Settings;
use train::{
    Phase, Recipe, Run, RunResult, Shared, Task, check_guards, learning_curve, side_by_side, train,
};
use tuning::{LearningRate, Tuning};

fn main() -> Result<()> {
    one_thread_a_run();
    run(&Args::parse())
}

/// The whole job, to its report; `one_thread_a_run` comes first.
pub fn run(args: &Args) -> Result<()> {
    // The whole job on one thread, unless runs go side by side: on CUDA a tensor must not cross threads, so the
    // report, which holds the weights of its runs, is dropped there, too.
    rayon::ThreadPoolBuilder::new().num_threads(1).build()?.install(|| {
        let report = job(args)?;
        report.print();
        report.write(&args.out)
    })
}

fn job(args: &Args) -> Result<Report> {
    let begin = Instant::now();
    let mut settings = args.settings()?;
    let device = device(&args.device)?;
    let (pretrain, finetune) = args.texts(&settings)?;
    let (pretrain, mut finetune, text) = tasks(pretrain, finetune, &settings)?;
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
    check_guards(&pretrain, &shared, &rates)?;
    println!(
        "guards: p = 0 equals no dropout bit for bit, equal seeds give equal runs, keep rates \
         within 4 sigma"
    );

    let runs = |phase, rates: &[f32], seeds: std::ops::Range<u64>| -> Vec<Run> {
        seeds
            .flat_map(|seed| rates.iter().map(move |&drop_p| Run { phase, drop_p, seed }))
            .collect()
    };
    let mut pretraining =
        runs(Phase::Pretrain, &settings.pretrain_rates, settings.pretrain_seeds());
    let reported = pretraining.len();
    if settings.wants_tuning() {
        let seed = settings.tuning_seed();
        pretraining.push(Run { phase: Phase::Pretrain, drop_p: 0.0, seed });
    }
    let threads = settings.threads;
    let mut pretrained = run_all("pretrain", &pretraining, &pretrain, &shared, threads, &[])?;
    let tuning = match pretrained.split_off(reported).first() {
        Some(base) => Some(tune(base, &finetune, &shared, &settings)?),
        None => None,
    };
    if let Some(Tuning { chosen, .. }) = &tuning {
        finetune.fixed_step = chosen.steps;
        finetune.recipe.lr = chosen.lr;
    }
    settings.finetune = finetune.recipe.clone();

    let runs = runs(Phase::Finetune, &settings.finetune_rates, settings.finetune_seeds());
    let finetuned = run_all("finetune", &runs, &finetune, &shared, threads, &pretrained)?;
    let stress = Task {
        fixed_step: settings.stress.steps,
        recipe: settings.stress.clone(),
        ..finetune.clone()
    };
    let stressed = run_all("stress", &runs, &stress, &shared, threads, &pretrained)?;
    let results = Results { tuning, pretrained, finetuned, stressed };
    Ok(Report::new(&settings, text, results, begin.elapsed()))
}

/// Candle spreads one op over all cores through a process-wide pool that spins and serves one
/// caller at a time: runs side by side would queue for it (on two cores a step took six times as
/// long). Here every run keeps to its thread. Call it before any thread is started, which a CUDA driver
/// does, too, when a device is opened.
pub fn one_thread_a_run() {
    for name in ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"] {
        // SAFETY: this is the first that a program does, before it opens a device or starts a thread, so
        // nothing reads the environment meanwhile.
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

/// Trains the runs of one task. Fine-tuning starts from the p = 0 model of the same seed among
/// `bases`.
fn run_all(
    name: &'static str,
    runs: &[Run],
    task: &Task,
    shared: &Shared,
    threads: usize,
    bases: &[RunResult],
) -> Result<Vec<RunResult>> {
    let progress = Progress::new(name, runs.len(), task.recipe.steps);
    let results = side_by_side(runs, threads, |run| {
        let base = bases.iter().find(|base| base.run.drop_p == 0.0 && base.run.seed == run.seed);
        let result = train(*run, task, shared, base.map(|base| &base.weights), || progress.step())
            .with_context(|| format!("{name} with p = {} and seed {}", run.drop_p, run.seed))?;
        progress.finished(&result);
        Ok(result)
    })?;
    progress.close();
    Ok(results)
}

/// The learning curve of p = 0 with each learning rate, from a model whose seed is not reported.
fn tune(base: &RunResult, task: &Task, shared: &Shared, settings: &Settings) -> Result<Tuning> {
    let run = Run { phase: Phase::Finetune, ..base.run };
    let tasks: Vec<Task> = settings
        .finetune_lrs
        .iter()
        .map(|&lr| Task { recipe: Recipe { lr, ..task.recipe.clone() }, ..task.clone() })
        .collect();
    let progress = Progress::new("tuning", tasks.len(), task.recipe.steps);
    let curves = side_by_side(&tasks, settings.threads, |task| {
        let lr = task.recipe.lr;
        let curve = learning_curve(run, task, shared, Some(&base.weights), || progress.step())
            .with_context(|| format!("tuning with a learning rate of {lr}"))?;
        Ok(LearningRate { lr, curve })
    })?;
    progress.close();
    let tuning =
        Tuning::new(run.seed, curves, settings.finetune_steps).context("tuning: no curve")?;
    tuning.print();
    Ok(tuning)
}

/// Cuts the texts into what the phases train and are judged on, and checks that there is enough of
/// everything.
fn tasks(
    pretrain: Splits,
    mut finetune: Splits,
    settings: &Settings,
) -> Result<(Task, Task, TextReport)> {
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
    let mut task = |splits: Splits, recipe: Recipe, fixed_step| -> Result<Task> {
        let mut held_out = |documents| -> Result<_> {
            Ok(Arc::new((documents, windows.next().context("held-out windows")?)))
        };
        Ok(Task {
            train: Arc::new(splits.train),
            dev: held_out(splits.dev)?,
            test: held_out(splits.test)?,
            recipe,
            fixed_step,
        })
    };
    let pretrain = task(pretrain, settings.pretrain.clone(), settings.pretrain.steps)?;
    // Long enough for the number of steps that is asked for; which one is chosen, tuning says.
    let fixed_step = settings.finetune_steps.unwrap_or(settings.finetune.steps);
    let recipe = Recipe {
        lr: settings.finetune_lrs[0],
        steps: settings.finetune.steps.max(fixed_step),
        ..settings.finetune.clone()
    };
    Ok((pretrain, task(finetune, recipe, fixed_step)?, text))
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
            let flags = ["--pretrain-steps", "6", "--search-steps", "6", "--stress-steps", "9"];
            let flags = [&flags[..], &["--threads", threads]].concat();
            job(&args(&flags, &out)).unwrap().losses()
        };
        let alone = losses("1");
        // Pretraining, fine-tuning and the stress arm at two rates with two seeds.
        assert_eq!(alone.len(), 3 * 2 * 2 * 2);
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
            let steps = ["--pretrain-steps", "6", "--finetune-steps", "6", "--stress-steps", "6"];
            let flags = [&steps, flags].concat();
            job(&args(&flags, &out))
                .map(|report| report.losses().len())
                .map_err(|e| format!("{e:#}"))
        };
        assert_eq!(job(&["--pretrain", &long, "--finetune", &poems]), Ok(24));
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
    fn steps_and_learning_rate_are_chosen_on_a_seed_apart_unless_they_are_given() {
        let out = folder("tuning");
        let tuned = |flags: &[&str]| {
            let steps = ["--pretrain-steps", "6", "--search-steps", "10", "--stress-steps", "6"];
            let report = job(&args(&[&steps, flags].concat(), &out)).unwrap();
            report.tuning().cloned()
        };
        let tuning = tuned(&[]).unwrap();
        // The quick preset reports seeds 1 and 2.
        assert_eq!((tuning.seed, tuning.curves.len()), (3, 2));
        let points = tuning.curves.iter().flat_map(|of| of.curve[1..].iter().map(|p| (of.lr, p)));
        let (lr, best) = points.min_by(|a, b| a.1.dev_loss.total_cmp(&b.1.dev_loss)).unwrap();
        assert_eq!((tuning.chosen.lr, tuning.chosen.steps), (lr, best.step));
        assert_eq!(tuned(&["--finetune-steps", "7"]).unwrap().chosen.steps, 7);
        assert_eq!(tuned(&["--finetune-steps", "12"]).unwrap().chosen.steps, 12);
        assert!(tuned(&["--finetune-steps", "7", "--finetune-lr", "1e-3"]).is_none());
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
