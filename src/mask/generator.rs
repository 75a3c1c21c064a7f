use std::sync::atomic::{AtomicU64, Ordering};

use super::MaskKey;

/// Hands out one [`MaskKey`] a call, from a seed and a counter.
///
/// The sixteen bytes of [`state`](Self::state) are the whole state: saved with a checkpoint, they
/// resume a run with the masks it would have drawn; restored before a recomputed block, they give it
/// the masks of its first pass. A model owns its generator in an `Arc` and shares it among its layers,
/// so that models trained side by side do not disturb one another.
///
/// # Example
/// ```
/// use candle_dropout::MaskGenerator;
///
/// let generator = MaskGenerator::new(42);
/// let state = generator.state();
/// let first = generator.next_key();
/// generator.restore(state);
/// assert_eq!(generator.next_key(), first);
/// ```
#[derive(Debug)]
pub struct MaskGenerator {
    seed: AtomicU64,
    counter: AtomicU64,
}

/// A snapshot of a [`MaskGenerator`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskState {
    /// What the generator was made from.
    pub seed: u64,
    /// How many keys it has handed out.
    pub counter: u64,
}

impl MaskGenerator {
    /// A generator at the start of the sequence that `seed` names.
    pub const fn new(seed: u64) -> Self {
        Self { seed: AtomicU64::new(seed), counter: AtomicU64::new(0) }
    }

    /// The next key; distinct for every call (until 2^64 of them).
    pub fn next_key(&self) -> MaskKey {
        // Relaxed is enough: the counter alone orders the keys, and no other memory hangs on it.
        let counter = self.counter.fetch_add(1, Ordering::Relaxed);
        MaskKey::derive(self.seed.load(Ordering::Relaxed), counter)
    }

    /// The seed and counter from which the next key follows.
    pub fn state(&self) -> MaskState {
        MaskState {
            seed: self.seed.load(Ordering::Relaxed),
            counter: self.counter.load(Ordering::Relaxed),
        }
    }

    /// Continues from `state`. Do not call it while other threads draw keys.
    pub fn restore(&self, state: MaskState) {
        self.seed.store(state.seed, Ordering::Relaxed);
        self.counter.store(state.counter, Ordering::Relaxed);
    }
}

impl From<MaskState> for MaskGenerator {
    fn from(state: MaskState) -> Self {
        Self { seed: AtomicU64::new(state.seed), counter: AtomicU64::new(state.counter) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_distinct_and_resume() {
        let generator = MaskGenerator::new(3);
        let keys: std::collections::HashSet<_> = (0..1000).map(|_| generator.next_key()).collect();
        assert_eq!(keys.len(), 1000);
        let resumed = MaskGenerator::from(generator.state());
        assert_eq!(resumed.next_key(), generator.next_key());
        assert_eq!(generator.state(), MaskState { seed: 3, counter: 1001 });
    }
}
