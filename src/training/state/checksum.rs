//! Whether a file is what was written.

use std::io::{Result, Write};

/// A checksum of a stream of bytes, eight at a time: each step is a bijection of the state and of the word,
/// so two streams of one length that differ in one word never agree.
pub(super) struct Checksum {
    state: u64,
    /// Bytes that do not fill a word yet.
    rest: Vec<u8>,
}

impl Checksum {
    pub(super) fn new() -> Self {
        Self { state: 0xcbf2_9ce4_8422_2325, rest: Vec::with_capacity(8) }
    }

    pub(super) fn update(&mut self, mut bytes: &[u8]) {
        if !self.rest.is_empty() {
            let (head, tail) = bytes.split_at(bytes.len().min(8 - self.rest.len()));
            self.rest.extend_from_slice(head);
            bytes = tail;
            if self.rest.len() == 8 {
                let word = std::mem::take(&mut self.rest);
                self.words(&word);
            }
        }
        let whole = bytes.len() - bytes.len() % 8;
        self.words(&bytes[..whole]);
        self.rest.extend_from_slice(&bytes[whole..]);
    }

    fn words(&mut self, bytes: &[u8]) {
        for word in bytes.chunks_exact(8) {
            let word = word.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
            self.state = mix(self.state ^ word);
        }
    }

    pub(super) fn finish(mut self) -> [u8; 8] {
        // The length of the rest tells zeros from nothing.
        let length = self.rest.len();
        self.rest.resize(8, 0);
        let rest = std::mem::take(&mut self.rest);
        self.words(&rest);
        mix(self.state ^ length as u64).to_le_bytes()
    }

    /// The checksum of `bytes`.
    pub(super) fn of(bytes: &[u8]) -> [u8; 8] {
        let mut checksum = Self::new();
        checksum.update(bytes);
        checksum.finish()
    }
}

/// A product with the odd prime of FNV, and a shift so that high bits reach low ones; both can be undone.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_mul(0x0100_0000_01b3);
    x ^ x >> 32
}

/// Writes on, and keeps the checksum of what was written.
pub(super) struct Summed<W> {
    pub(super) to: W,
    pub(super) checksum: Checksum,
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let written = self.to.write(bytes)?;
        self.checksum.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_has_one_checksum_however_it_is_cut() {
        let bytes: Vec<u8> = (0..100).map(|i| (i * 37 % 251) as u8).collect();
        for length in [0, 1, 7, 8, 9, 63, 100] {
            for piece in [1, 2, 3, 5, 8, 13, 100] {
                let mut checksum = Checksum::new();
                bytes[..length].chunks(piece).for_each(|piece| checksum.update(piece));
                assert_eq!(
                    checksum.finish(),
                    Checksum::of(&bytes[..length]),
                    "{length} by {piece}"
                );
            }
        }
    }

    #[test]
    fn every_flipped_bit_and_every_missing_byte_shows() {
        let mut bytes: Vec<u8> = (0..41).map(|i| i * 5).collect();
        let checksum = Checksum::of(&bytes);
        for i in 0..bytes.len() {
            assert_ne!(Checksum::of(&bytes[..i]), checksum, "cut at {i}");
            for bit in 0..8 {
                bytes[i] ^= 1 << bit;
                assert_ne!(Checksum::of(&bytes), checksum, "bit {bit} of byte {i}");
                bytes[i] ^= 1 << bit;
            }
        }
        // The top bit of two words in a row, which a product alone would let cancel.
        bytes[7] ^= 0x80;
        bytes[15] ^= 0x80;
        assert_ne!(Checksum::of(&bytes), checksum);
        assert_ne!(Checksum::of(&[0; 3]), Checksum::of(&[0; 4]));
    }
}
