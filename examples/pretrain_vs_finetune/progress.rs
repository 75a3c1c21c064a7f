//! Progress on stderr: a bar at a terminal, lines elsewhere.
//!
//! A crate for the bar would bring three more, a tenth more than all that the job needs beside the
//! library.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::train::RunResult;

const REDRAWN_EVERY: Duration = Duration::from_millis(200);
/// Back to the first column, of a line that is empty from there on.
const CLEAR: &str = "\r\x1b[K";

pub struct Progress {
    is_terminal: bool,
    name: &'static str,
    runs: usize,
    done: AtomicUsize,
    steps: usize,
    stepped: AtomicUsize,
    begin: Instant,
    /// When the bar was drawn; who holds it has the terminal's line.
    drawn: Mutex<Instant>,
}

impl Progress {
    pub fn new(name: &'static str, runs: usize, steps: usize) -> Self {
        Self {
            is_terminal: std::io::stderr().is_terminal(),
            name,
            runs,
            done: AtomicUsize::new(0),
            steps: runs * steps,
            stepped: AtomicUsize::new(0),
            begin: Instant::now(),
            drawn: Mutex::new(Instant::now()),
        }
    }

    pub fn step(&self) {
        let stepped = self.stepped.fetch_add(1, Ordering::Relaxed) + 1;
        if self.is_terminal {
            self.draw(stepped);
        } else if stepped * 10 / self.steps != (stepped - 1) * 10 / self.steps {
            // Elsewhere a line at every tenth of the way.
            let (name, seconds) = (self.name, self.begin.elapsed().as_secs());
            eprintln!("{name}: step {stepped} of {}, {seconds} s", self.steps);
        }
    }

    fn draw(&self, stepped: usize) {
        // A run that finds another one drawing has nothing to add.
        let Ok(mut drawn) = self.drawn.try_lock() else { return };
        if drawn.elapsed() >= REDRAWN_EVERY {
            *drawn = Instant::now();
            eprint!("{CLEAR}{}", bar(self.name, stepped, self.steps, self.begin.elapsed()));
        }
    }

    pub fn finished(&self, result: &RunResult) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        let line = format!(
            "{} {done}/{}: p {:<4} seed {}: dev {:.3} at step {}, best {:.3} at {}, {:.0} tokens/s, {:.1} s",
            self.name,
            self.runs,
            result.run.drop_p,
            result.run.seed,
            result.fixed.dev.loss(),
            result.fixed.step,
            result.early.dev.loss(),
            result.early.step,
            result.tokens_per_second,
            result.seconds,
        );
        let _line = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        eprintln!("{}{line}", self.clear());
    }

    fn clear(&self) -> &'static str {
        if self.is_terminal { CLEAR } else { "" }
    }

    pub fn close(&self) {
        eprint!("{}", self.clear());
    }
}

/// Narrower than the narrowest terminal in use.
fn bar(name: &str, stepped: usize, steps: usize, elapsed: Duration) -> String {
    const WIDTH: usize = 24;
    let full = stepped * WIDTH / steps.max(1);
    let (full_part, empty_part) = ("█".repeat(full), "░".repeat(WIDTH.saturating_sub(full)));
    let per_second = stepped as f64 / elapsed.as_secs_f64().max(1e-3);
    let left = steps.saturating_sub(stepped) as f64 / per_second.max(1e-3);
    format!(
        "{name:9} {full_part}{empty_part} {stepped}/{steps} steps, {per_second:.0}/s, {left:.0} s left"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_fills_and_says_how_long_it_takes() {
        let seconds = Duration::from_secs;
        assert_eq!(
            bar("pretrain", 100, 400, seconds(2)),
            "pretrain  ██████░░░░░░░░░░░░░░░░░░ 100/400 steps, 50/s, 6 s left"
        );
        assert!(bar("finetune", 400, 400, seconds(9)).ends_with("400/400 steps, 44/s, 0 s left"));
    }
}
