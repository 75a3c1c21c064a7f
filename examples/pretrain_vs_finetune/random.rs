//! Random choices that stay the same in every release.
//!
//! Equal seeds promise equal runs, and a generator of another crate may change between releases:
//! draws come from the key derivation of the masks, which is fixed.

use candle_dropout::MaskGenerator;

pub struct Random(MaskGenerator);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(MaskGenerator::new(seed))
    }

    /// A number from 0 to `n - 1`; 0 for `n = 0`.
    pub fn below(&mut self, n: usize) -> usize {
        // The high half of the product (Lemire 2019, arXiv 1805.10941), without its rejection: the
        // bias is below n / 2^64.
        ((u128::from(self.0.next_key().bits()) * n as u128) >> 64) as usize
    }

    /// Fisher and Yates's shuffle.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_of_a_seed_are_pinned() {
        let mut random = Random::new(3);
        let draws: Vec<usize> = (0..6).map(|_| random.below(1000)).collect();
        assert_eq!(draws, [815, 435, 400, 825, 616, 720]);
    }

    #[test]
    fn draws_are_uniform_and_shuffles_lose_nothing() {
        let mut random = Random::new(1);
        let mut counts = [0f64; 7];
        for _ in 0..7000 {
            counts[random.below(7)] += 1.0;
        }
        // 4.5 standard deviations.
        assert!(counts.iter().all(|count| (count - 1000.0).abs() < 132.0), "{counts:?}");
        let mut first = [0f64; 5];
        for _ in 0..5000 {
            let mut items = [0, 1, 2, 3, 4];
            random.shuffle(&mut items);
            first[items[0]] += 1.0;
            items.sort();
            assert_eq!(items, [0, 1, 2, 3, 4]);
        }
        assert!(first.iter().all(|count| (count - 1000.0).abs() < 128.0), "{first:?}");
        random.shuffle::<u8>(&mut []);
    }
}
