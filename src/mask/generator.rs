use std::sync::atomic::{AtomicU64, Ordering};

use super::MaskKey;

/// Hands out one [`MaskKey`] a call, from a seed and a counter.
///
/// The sixteen bytes of [`state`](Self::state) ([`MaskState::to_bytes`]) are the whole state: saved
/// with a checkpoint, they resume a run with the masks it would have drawn; restored before a
/// recomputed block, they give it the masks of its first pass. A model owns its generator in an `Arc`
/// and shares it among its layers, so that models trained side by side do not disturb one another.
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
///
/// # Example
/// ```
/// use candle_dropout::{MaskGenerator, MaskState};
///
/// let generator = MaskGenerator::new(42);
/// generator.next_key();
/// let saved: [u8; 16] = generator.state().to_bytes();
/// let resumed = MaskGenerator::from(MaskState::from_bytes(saved));
/// assert_eq!(resumed.next_key(), generator.next_key());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskState {
    /// What the generator was made from.
    pub seed: u64,
    /// How many keys it has handed out.
    pub counter: u64,
}

impl MaskState {
    /// The sixteen bytes to save: the seed, then the counter, both little-endian.
    pub const fn to_bytes(self) -> [u8; 16] {
        (self.seed as u128 | (self.counter as u128) << 64).to_le_bytes()
    }

    /// The state whose [`to_bytes`](Self::to_bytes) are these.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        let both = u128::from_le_bytes(bytes);
        Self { seed: both as u64, counter: (both >> 64) as u64 }
    }
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

    #[test]
    fn the_bytes_of_a_state_are_seed_and_counter_little_endian() {
        let state = MaskState { seed: 0x0807_0605_0403_0201, counter: 0x100f_0e0d_0c0b_0a09 };
        let bytes = state.to_bytes();
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
        assert_eq!(MaskState::from_bytes(bytes), state);
        let last = MaskState { seed: u64::MAX, counter: 1 };
        assert_eq!(MaskState::from_bytes(last.to_bytes()), last);
    }
}
