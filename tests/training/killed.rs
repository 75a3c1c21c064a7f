//! A training that is killed at any moment goes on, by the same command, to the very losses of one that was
//! not.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use candle_dropout::training::Progress;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

const STEPS: usize = 120;
const KILLS: usize = 40;

/// The folder that the child trains in.
const IN: &str = "CANDLE_DROPOUT_TRAIN_IN";

/// Trains to the last step, from where `state` stands, and writes a line a step: its number and the bits of
/// its loss.
fn train(folder: &Path) -> Result<()> {
    // Embeddings of 65,536 elements: the optimiser and the norm cut them for their threads.
    let mut training = Training::with_vocab(2_048, 32, STEPS, 1)?;
    let path = folder.join("state");
    let start = match path.exists() {
        true => training.state.load(&path, &mut training.adamw)?.step,
        false => 0,
    };
    let mut losses = OpenOptions::new().create(true).append(true).open(folder.join("losses"))?;
    for step in start..STEPS {
        let loss = training.step(step)?;
        losses.write_all(format!("{step} {:08x}\n", loss.to_bits()).as_bytes())?;
        // Not after every step, so that some are taken twice.
        if step % 3 == 2 || step + 1 == STEPS {
            training.state.save(
                &path,
                &training.adamw,
                &Progress { step: step + 1, ..Default::default() },
            )?;
        }
    }
    Ok(())
}

/// The losses, by step; a step that was taken twice has the same twice.
fn losses(folder: &Path) -> Result<BTreeMap<usize, u32>> {
    let mut losses = BTreeMap::new();
    for line in fs::read_to_string(folder.join("losses"))?.lines() {
        let (step, bits) = line.split_once(' ').expect("a step and its loss");
        let step = step.parse().expect("a step");
        let bits = u32::from_str_radix(bits, 16).expect("the bits of a loss");
        assert_eq!(
            *losses.entry(step).or_insert(bits),
            bits,
            "step {step} had another loss before"
        );
    }
    Ok(losses)
}

/// Runs in the child that the test below starts; alone it trains once.
#[test]
fn a_small_training_learns() -> Result<()> {
    if let Ok(folder) = std::env::var(IN) {
        return train(Path::new(&folder));
    }
    let folder = Folder::new("learns")?;
    train(&folder.0)?;
    let losses = losses(&folder.0)?;
    let loss = |step: usize| f32::from_bits(losses[&step]);
    assert!(loss(STEPS - 1) < loss(0), "{} and then {}", loss(0), loss(STEPS - 1));
    Ok(())
}

/// This very command, whatever it has done before.
fn start(folder: &Path, threads: usize) -> Result<Child> {
    let child = Command::new(std::env::current_exe()?)
        .args(["killed::a_small_training_learns", "--exact", "--test-threads=1"])
        .env(IN, folder)
        .env("RAYON_NUM_THREADS", threads.to_string())
        .stdout(Stdio::null())
        .stderr(File::create(folder.join("errors"))?)
        .spawn()?;
    Ok(child)
}

fn finish(mut child: Child, folder: &Path) -> Result<()> {
    let status = child.wait()?;
    assert!(status.success(), "{}", errors(folder)?);
    Ok(())
}

/// What the last child has complained about.
fn errors(folder: &Path) -> Result<String> {
    Ok(fs::read_to_string(folder.join("errors"))?)
}

/// As `Child::kill` does it, and no panic: by a signal that cannot be caught, or on Windows with this code.
fn was_killed(status: ExitStatus) -> bool {
    #[cfg(unix)]
    return std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
    #[cfg(not(unix))]
    return status.code() == Some(1);
}

#[test]
fn a_training_that_is_killed_at_any_moment_goes_on_to_the_same_losses() -> Result<()> {
    let seed = rand::rng().random();
    println!("moments from seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);

    let whole = Folder::new("whole")?;
    finish(start(&whole.0, 1)?, &whole.0)?;
    let expected = losses(&whole.0)?;
    assert!(expected.keys().copied().eq(0..STEPS));

    // Again from the start, should it have come to its end before it was killed often enough.
    let (mut kills, mut threads) = (0, 0);
    while kills < KILLS {
        let killed = Folder::new("killed")?;
        while kills < KILLS {
            threads = threads % 3 + 1;
            let mut child = start(&killed.0, threads)?;
            // A moment after some steps, or any moment from the first on.
            let (begin, length) =
                (Instant::now(), || fs::metadata(killed.0.join("losses")).map_or(0, |m| m.len()));
            let steps = rng.random_range(0..6) * rng.random_range(0..2);
            let enough = length() + steps * "10 00000000\n".len() as u64;
            while length() < enough && child.try_wait()?.is_none() {
                assert!(begin.elapsed() < Duration::from_secs(60), "no step in a minute");
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_micros(rng.random_range(0..30_000)));
            child.kill()?;
            let status = child.wait()?;
            if status.success() {
                break;
            }
            assert!(was_killed(status), "{status}: {}", errors(&killed.0)?);
            kills += 1;
        }
        finish(start(&killed.0, threads)?, &killed.0)?;
        assert_eq!(losses(&killed.0)?, expected);
    }
    Ok(())
}
