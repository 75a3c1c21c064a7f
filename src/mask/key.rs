/// Names one mask: 64 bits from which every draw of the mask follows.
///
/// Keys come from a [`MaskGenerator`](crate::MaskGenerator), one for each dropout site and training
/// step. Two calls with one key and one shape see one mask, on every device and in every op.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MaskKey(u64);

impl MaskKey {
    /// A key with the given bits.
    pub const fn new(bits: u64) -> Self {
        Self(bits)
    }

    /// The key that a generator with this seed and counter hands out.
    pub const fn derive(seed: u64, counter: u64) -> Self {
        let step = counter.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self(mix64(mix64(seed).wrapping_add(step)))
    }

    /// The key of sample `t` of a mask that is drawn repeatedly (Monte-Carlo passes).
    ///
    /// It depends on this key and `t` alone, so sample `t` stays the same however many are drawn.
    pub const fn draw(self, t: u64) -> Self {
        Self::derive(self.0, t)
    }

    /// The 64 bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The two 32-bit words of the Philox key, low half first.
    pub(crate) const fn words(self) -> [u32; 2] {
        [self.0 as u32, (self.0 >> 32) as u32]
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
/// generators", OOPSLA 2014): a bijection of 64 bits that changes half of them on average.
const fn mix64(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draw_is_a_derived_key() {
        let key = MaskKey::derive(7, 3);
        assert_eq!(key.draw(5), MaskKey::derive(key.bits(), 5));
        assert_ne!(key.draw(0), key.draw(1));
    }
}
