//! What a run draws: which windows, in which order.

use std::collections::HashSet;

use anyhow::{Result, ensure};
use candle_dropout::MaskKey;

use super::super::corpus::{Window, all_windows, windows};
use super::super::random::Random;
use super::{Phase, Run, Task};

/// A seed for one purpose of one run; the same for every rate.
pub fn stream(run: &Run, purpose: u64) -> u64 {
    let phase = match run.phase {
        Phase::Pretrain => 0,
        Phase::Finetune => 1,
    };
    MaskKey::derive(run.seed, phase * 16 + purpose).bits()
}

/// The windows of every step. Pretraining sees none twice; fine-tuning draws from all positions
/// again and again.
pub fn window_order(run: &Run, task: &Task, context: usize) -> Result<Vec<Window>> {
    let mut random = Random::new(stream(run, 2));
    let count = task.recipe.steps * task.recipe.batch;
    if run.phase == Phase::Finetune {
        let all = all_windows(&task.train, context);
        ensure!(!all.is_empty(), "no window in the fine-tuning text");
        return Ok((0..count).map(|_| all[random.below(all.len())]).collect());
    }
    let mut order = windows(&task.train, context);
    random.shuffle(&mut order);
    order.truncate(count);
    let distinct: HashSet<&Window> = order.iter().collect();
    ensure!(
        distinct.len() == count,
        "pretraining would see a window twice: {} windows for {count}",
        distinct.len()
    );
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::super::model::Model;
    use super::super::tests::{shared, task};
    use super::*;

    #[test]
    fn rates_of_one_seed_share_weights_and_window_order_and_seeds_do_not() {
        let run = |drop_p, seed| Run { phase: Phase::Pretrain, drop_p, seed };
        let order = |run| window_order(&run, &task(), 8).unwrap();
        assert_eq!(order(run(0.0, 1)), order(run(0.5, 1)));
        assert_ne!(order(run(0.0, 1)), order(run(0.0, 2)));
        let wte = |run| {
            let weights = Model::new(&shared(), &run, None).unwrap().weights().unwrap();
            weights["wte.weight"].to_vec2::<f32>().unwrap()
        };
        assert_eq!(wte(run(0.0, 1)), wte(run(0.5, 1)));
        assert_ne!(wte(run(0.0, 1)), wte(run(0.0, 2)));
    }

    #[test]
    fn window_orders_are_pinned_and_every_seed_has_one() {
        // Other numbers here mean that equal seeds no longer give equal runs.
        for (phase, seed, expected) in [
            (Phase::Pretrain, 1, [(0, 104), (1, 48), (1, 96), (1, 8)]),
            (Phase::Finetune, 1, [(1, 20), (0, 57), (1, 157), (1, 181)]),
            (Phase::Finetune, u64::MAX, [(0, 30), (1, 64), (0, 13), (1, 139)]),
        ] {
            let order = window_order(&Run { phase, drop_p: 0.0, seed }, &task(), 8).unwrap();
            let first: Vec<_> = order[..4].iter().map(|w| (w.document, w.start)).collect();
            assert_eq!(first, expected, "{phase:?} with seed {seed}");
        }
    }

    #[test]
    fn pretraining_sees_no_window_twice() {
        let run = Run { phase: Phase::Pretrain, drop_p: 0.0, seed: 1 };
        let mut task = task();
        let order = window_order(&run, &task, 8).unwrap();
        assert_eq!(order.iter().collect::<HashSet<_>>().len(), 12);
        task.recipe.steps = 1000;
        assert!(window_order(&run, &task, 8).unwrap_err().to_string().contains("a window twice"));
    }
}
