//! Philox4x32: the counter-based random function behind every mask.
//!
//! Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11. The mask law
//! uses 7 rounds; the published known answers for 7 and 10 rounds are tested below. The CUDA twin
//! is `kernels/philox.cuh`.

/// Rounds of the mask law.
pub(crate) const ROUNDS: u32 = 7;

/// Columns that one Philox call serves: four words of two 16-bit draws.
pub(crate) const COLS_PER_CALL: usize = 8;

const MUL_0: u64 = 0xD251_1F53;
const MUL_1: u64 = 0xCD9E_8D57;
const KEY_STEP: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Columns that [`fill_draws`] serves at a time.
pub(crate) const COLS_PER_FILL: usize = 8 * COLS_PER_CALL;

/// Columns that one Philox call serves where a column takes a whole word.
pub(crate) const WIDE_COLS_PER_CALL: usize = 4;

/// Columns that [`fill_wide_draws`] serves at a time.
pub(crate) const WIDE_COLS_PER_FILL: usize = 8 * WIDE_COLS_PER_CALL;

/// The last word of the counter: which draws these are.
const NARROW: u64 = 0;
const WIDE: u64 = 1;

/// Philox4x32, with each word in the low half of a u64 whose high half is left dirty.
///
/// In a loop over calls, a word lives in a 64-bit lane of a vector register, and a round is two
/// 32 x 32 -> 64 bit products, two shifts and two three-way XORs on whole registers.
#[inline(always)]
fn philox(mut c: [u64; 4], mut key: [u32; 2], n_rounds: u32) -> [u64; 4] {
    const LOW: u64 = 0xffff_ffff;
    for _ in 0..n_rounds {
        let (product_0, product_1) = ((c[0] & LOW) * MUL_0, (c[2] & LOW) * MUL_1);
        let high_0 = (product_1 >> 32) ^ c[1] ^ u64::from(key[0]);
        let high_2 = (product_0 >> 32) ^ c[3] ^ u64::from(key[1]);
        c = [high_0, product_1, high_2, product_0];
        key = [key[0].wrapping_add(KEY_STEP[0]), key[1].wrapping_add(KEY_STEP[1])];
    }
    c
}

/// The 16-bit draws of the 8-column blocks `first_block..` of one row, in column order.
///
/// `draws.len()` is a multiple of [`COLS_PER_FILL`]: a full register of calls costs hardly more than
/// one call, so the caller rounds up and skips the draws it does not need.
#[inline(always)]
pub(crate) fn fill_draws(key: [u32; 2], row: u64, first_block: u32, draws: &mut [u16]) {
    let mut block = u64::from(first_block);
    let mut long = draws.chunks_exact_mut(32 * COLS_PER_CALL);
    for draws in &mut long {
        fill_calls::<32>(key, row, block, draws);
        block += 32;
    }
    for draws in long.into_remainder().chunks_exact_mut(8 * COLS_PER_CALL) {
        fill_calls::<8>(key, row, block, draws);
        block += 8;
    }
}

/// `CALLS` calls: first the words of all, then their draws.
#[inline(always)]
fn fill_calls<const CALLS: usize>(key: [u32; 2], row: u64, first_block: u64, draws: &mut [u16]) {
    let words = words_of_calls::<CALLS>(key, row, first_block, NARROW);
    for (call, draws) in draws.chunks_exact_mut(COLS_PER_CALL).enumerate() {
        for (word, draws) in words.iter().zip(draws.chunks_exact_mut(2)) {
            draws[0] = word[call] as u16;
            draws[1] = (word[call] >> 16) as u16;
        }
    }
}

/// The 32-bit draws of the 4-column blocks `first_block..` of one row, in column order.
///
/// `draws.len()` is a multiple of [`WIDE_COLS_PER_FILL`].
#[inline(always)]
pub(crate) fn fill_wide_draws(key: [u32; 2], row: u64, first_block: u32, draws: &mut [u32]) {
    let mut block = u64::from(first_block);
    for draws in draws.chunks_exact_mut(WIDE_COLS_PER_FILL) {
        let words = words_of_calls::<8>(key, row, block, WIDE);
        for (call, draws) in draws.chunks_exact_mut(WIDE_COLS_PER_CALL).enumerate() {
            for (word, draw) in words.iter().zip(draws) {
                *draw = word[call];
            }
        }
        block += 8;
    }
}

/// The four words of `CALLS` calls in a row: a loop that vectorises as it stands.
#[inline(always)]
fn words_of_calls<const CALLS: usize>(
    key: [u32; 2],
    row: u64,
    first_block: u64,
    kind: u64,
) -> [[u32; CALLS]; 4] {
    let mut words = [[0u32; CALLS]; 4];
    let [w0, w1, w2, w3] = &mut words;
    for call in 0..CALLS {
        let w = philox([first_block + call as u64, row >> 32, row, kind], key, ROUNDS);
        (w0[call], w1[call], w2[call], w3[call]) =
            (w[0] as u32, w[1] as u32, w[2] as u32, w[3] as u32);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(counter: [u32; 4], key: [u32; 2], n_rounds: u32) -> [u32; 4] {
        philox(counter.map(u64::from), key, n_rounds).map(|word| word as u32)
    }

    /// Known answers published with Random123 (`kat_vectors`): zeros, ones and digits of pi.
    #[test]
    fn philox_gives_the_published_answers() {
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let pi_key = [0xa409_3822, 0x299f_31d0];
        let cases = [
            (7, [0; 4], [0; 2], [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]),
            (7, [!0; 4], [!0; 2], [0x5207_ddc2, 0x4516_5e59, 0x4d8e_e751, 0x8c52_f662]),
            (7, pi, pi_key, [0x4dfc_caba, 0x190a_87f0, 0xc473_62ba, 0xb6b5_242a]),
            (10, [0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            (10, [!0; 4], [!0; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (10, pi, pi_key, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ];
        for (n_rounds, counter, key, answer) in cases {
            assert_eq!(words(counter, key, n_rounds), answer, "{n_rounds} rounds");
        }
    }

    crate::cpu::vectorized! {
        fn draws_in_widest_registers(key: [u32; 2], row: u64, first_block: u32, draws: &mut [u16]) {
            fill_draws(key, row, first_block, draws)
        }
    }

    #[test]
    fn vector_lanes_equal_single_calls() {
        let (key, row, first_block) =
            ([0x1234_5678, 0x9abc_def0], 0xffff_ffff_0000_0005, u32::MAX - 90);
        let mut draws = [0; 11 * COLS_PER_FILL];
        draws_in_widest_registers(key, row, first_block, &mut draws);
        for (i, draws) in draws.chunks(COLS_PER_CALL).enumerate() {
            let counter = [first_block + i as u32, (row >> 32) as u32, row as u32, 0];
            let words = words(counter, key, ROUNDS);
            let expected: Vec<u16> =
                words.iter().flat_map(|&w| [w as u16, (w >> 16) as u16]).collect();
            assert_eq!(draws, expected, "block {i}");
        }
    }

    crate::cpu::vectorized! {
        fn wide_draws_in_widest_registers(key: [u32; 2], row: u64, first_block: u32, draws: &mut [u32]) {
            fill_wide_draws(key, row, first_block, draws)
        }
    }

    #[test]
    fn wide_draws_are_the_words_of_their_calls() {
        let (key, row, first_block) =
            ([0x1234_5678, 0x9abc_def0], 0xffff_ffff_0000_0005, u32::MAX - 90);
        let mut draws = [0; 11 * WIDE_COLS_PER_FILL];
        wide_draws_in_widest_registers(key, row, first_block, &mut draws);
        for (i, draws) in draws.chunks(WIDE_COLS_PER_CALL).enumerate() {
            let counter = [first_block + i as u32, (row >> 32) as u32, row as u32, 1];
            assert_eq!(draws, words(counter, key, ROUNDS), "block {i}");
        }
    }
}
