//! Progress on stderr: a bar at a terminal, lines elsewhere.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::train::{Phase, RunResult};

pub struct Progress {
    bar: Option<ProgressBar>,
    phase: Phase,
    runs: usize,
    done: AtomicUsize,
    steps: usize,
    stepped: AtomicUsize,
    begin: Instant,
}

impl Progress {
    pub fn new(phase: Phase, runs: usize, steps: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new((runs * steps) as u64);
            let template = "{prefix:9} {bar:36} {pos}/{len} steps, {per_sec}, {eta} left  {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_prefix(format!("{phase:?}").to_lowercase());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self {
            bar,
            phase,
            runs,
            done: AtomicUsize::new(0),
            steps: runs * steps,
            stepped: AtomicUsize::new(0),
            begin: Instant::now(),
        }
    }

    pub fn step(&self) {
        let stepped = self.stepped.fetch_add(1, Ordering::Relaxed) + 1;
        match &self.bar {
            Some(bar) => bar.inc(1),
            // Elsewhere a line at every tenth of the way.
            None if stepped * 10 / self.steps != (stepped - 1) * 10 / self.steps => {
                let (phase, seconds) = (self.name(), self.begin.elapsed().as_secs());
                eprintln!("{phase}: step {stepped} of {}, {seconds} s", self.steps);
            }
            None => {}
        }
    }

    pub fn finished(&self, result: &RunResult) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        let line = format!(
            "{} {done}/{}: p {:<4} seed {}: dev {:.3}, best {:.3} at step {}, {:.0} tokens/s, {:.1} s",
            self.name(),
            self.runs,
            result.run.drop_p,
            result.run.seed,
            result.last.dev.loss(),
            result.early.dev.loss(),
            result.early.step,
            result.tokens_per_second,
            result.seconds,
        );
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    fn name(&self) -> String {
        format!("{:?}", self.phase).to_lowercase()
    }

    pub fn close(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
