//! The mask law on the CPU: against vectors of an independent implementation, by its statistics, and
//! under every window and instruction set.

use std::process::Command;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{
    AttentionMask, StochasticDepth, drop_path_add, dropout, dropout_add, softmax_dropout,
};
use candle_dropout::{DropMask, MaskKey, Rate};
use cases::{bits, random};
use proptest::prelude::*;

/// A bound on a standard normal variable that a sound mask passes but once in 150,000 checks.
const MAX_Z: f64 = 4.5;

fn keep_bits(drop: &DropMask, shape: &[usize]) -> Result<Vec<u8>> {
    drop.to_tensor(shape, &Device::Cpu)?.flatten_all()?.to_vec1()
}

// ---- vectors ----

/// One line of `mask_vectors.txt`; `mask_vectors.py` says what stands in it.
struct Vector {
    seed: u64,
    counter: u64,
    key: u64,
    drop_p: f32,
    threshold: u32,
    row: usize,
    col: usize,
    draws: Vec<u16>,
    keep: Vec<u8>,
}

fn vectors() -> Vec<Vector> {
    include_str!("mask_vectors.txt")
        .lines()
        .map(|line| {
            let field: Vec<_> = line.split(' ').collect();
            let hex = |i: usize| u64::from_str_radix(field[i], 16).unwrap();
            Vector {
                seed: hex(0),
                counter: hex(1),
                key: hex(2),
                drop_p: field[3].parse().unwrap(),
                threshold: field[4].parse().unwrap(),
                row: field[5].parse().unwrap(),
                col: field[6].parse().unwrap(),
                draws: field[7].split(',').map(|d| u16::from_str_radix(d, 16).unwrap()).collect(),
                keep: field[8].bytes().map(|b| b - b'0').collect(),
            }
        })
        .collect()
}

impl Vector {
    /// The mask at a rate, over the columns of this line.
    fn keep_at(&self, rate: Rate) -> Result<Vec<u8>> {
        let cols = self.keep.len();
        let mask = DropMask::with_rate(rate, MaskKey::derive(self.seed, self.counter));
        let window = mask.window(&[self.row + 1, self.col + cols], &[self.row, self.col]);
        keep_bits(&window, &[1, cols])
    }
}

#[test]
fn keys_and_thresholds_equal_those_of_an_independent_implementation() -> Result<()> {
    for v in vectors() {
        assert_eq!(MaskKey::derive(v.seed, v.counter).bits(), v.key);
        assert_eq!(Rate::new(v.drop_p)?.threshold(), v.threshold, "drop_p {}", v.drop_p);
    }
    Ok(())
}

#[test]
fn masks_equal_those_of_an_independent_implementation() -> Result<()> {
    let vectors = vectors();
    assert_eq!(vectors.len(), 26);
    for v in vectors {
        let keep = v.keep_at(Rate::new(v.drop_p)?)?;
        assert_eq!(
            keep, v.keep,
            "seed {} counter {} row {} col {}",
            v.seed, v.counter, v.row, v.col
        );
    }
    Ok(())
}

/// A mask shows one comparison of each draw; sixteen of them, by bisection, show the draw itself.
#[test]
fn draws_equal_those_of_an_independent_implementation_in_every_bit() -> Result<()> {
    for v in vectors().iter().filter(|v| v.draws.len() < 200) {
        let mut below = vec![0u32; v.draws.len()];
        for bit in (0..16).rev() {
            // Columns ask for different thresholds, so each threshold in turn answers for its columns.
            let mut thresholds: Vec<_> = below.iter().map(|low| low + (1 << bit)).collect();
            thresholds.sort_unstable();
            thresholds.dedup();
            let mut next = below.clone();
            for threshold in thresholds {
                let keep = v.keep_at(Rate::new(1. - threshold as f32 / 65536.)?)?;
                for (i, keep) in keep.iter().enumerate() {
                    if below[i] + (1 << bit) == threshold && *keep == 0 {
                        next[i] = threshold;
                    }
                }
            }
            below = next;
        }
        let draws: Vec<_> = below.iter().map(|draw| *draw as u16).collect();
        assert_eq!(draws, v.draws, "seed {} counter {}", v.seed, v.counter);
    }
    Ok(())
}

// ---- statistics ----

/// How many standard deviations `kept` of `n` lies from `keep_p`.
fn z_of_rate(kept: usize, n: usize, keep_p: f64) -> f64 {
    (kept as f64 - n as f64 * keep_p) / (n as f64 * keep_p * (1. - keep_p)).sqrt()
}

#[test]
fn keep_rate_is_the_realised_one_overall_by_column_and_by_row() -> Result<()> {
    let (rows, cols) = (2048, 1000);
    for (i, drop_p) in [0.001, 0.1, 0.25, 0.5, 0.9, 0.999].into_iter().enumerate() {
        let mask = DropMask::new(drop_p, MaskKey::derive(1, i as u64))?;
        let keep_p = mask.rate().keep_p();
        let keep = keep_bits(&mask, &[rows, cols])?;
        let (mut by_row, mut by_col) = (vec![0; rows], vec![0; cols]);
        for (at, keep) in keep.iter().enumerate() {
            by_row[at / cols] += usize::from(*keep);
            by_col[at % cols] += usize::from(*keep);
        }
        let z = z_of_rate(by_row.iter().sum(), rows * cols, keep_p);
        assert!(z.abs() < MAX_Z, "drop_p {drop_p}: z {z}");
        if keep_p.min(1. - keep_p) * cols as f64 > 20. {
            let rows_z = by_row.iter().map(|kept| z_of_rate(*kept, cols, keep_p));
            let cols_z = by_col.iter().map(|kept| z_of_rate(*kept, rows, keep_p));
            let worst = rows_z.chain(cols_z).fold(0f64, |a, z| a.max(z.abs()));
            assert!(worst < MAX_Z, "drop_p {drop_p}: z {worst}");
        }
    }
    Ok(())
}

/// A rate of the grid is drawn without bias: 16 bits are compared with the threshold itself.
#[test]
fn output_has_the_expectation_of_the_input() -> Result<()> {
    let x = Tensor::ones((4096, 1024), DType::F64, &Device::Cpu)?;
    for drop_p in [0.1, 0.37] {
        let drop = DropMask::new(drop_p, MaskKey::new(77))?;
        let mean = dropout(&x, &drop)?.mean_all()?.to_scalar::<f64>()?;
        let keep_p = drop.rate().keep_p();
        let sigma = ((1. - keep_p) / keep_p / x.elem_count() as f64).sqrt();
        assert!((mean - 1.).abs() < MAX_Z * sigma, "drop_p {drop_p}: mean {mean}");
    }
    Ok(())
}

/// The correlation of two masks over the same number of elements, in standard deviations.
fn z_of_correlation<'a>(
    a: impl Iterator<Item = &'a u8>,
    b: impl Iterator<Item = &'a u8>,
    keep_p: f64,
) -> f64 {
    let (sum, n) = a.zip(b).fold((0., 0), |(sum, n), (a, b)| {
        (sum + (f64::from(*a) - keep_p) * (f64::from(*b) - keep_p), n + 1)
    });
    sum / (keep_p * (1. - keep_p) * f64::from(n).sqrt())
}

#[test]
fn neighbouring_columns_and_rows_are_uncorrelated() -> Result<()> {
    let (rows, cols) = (1024, 1024);
    for drop_p in [0.1, 0.5] {
        let mask = DropMask::new(drop_p, MaskKey::new(5))?;
        let (keep, keep_p) = (keep_bits(&mask, &[rows, cols])?, mask.rate().keep_p());
        for lag in [1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 512] {
            let (a, b) = (keep.chunks(cols), keep.chunks(cols));
            let z = z_of_correlation(
                a.flat_map(|row| &row[lag..]),
                b.flat_map(|row| &row[..cols - lag]),
                keep_p,
            );
            assert!(z.abs() < MAX_Z, "drop_p {drop_p}, columns {lag} apart: z {z}");
            let z = z_of_correlation(keep[lag * cols..].iter(), keep.iter(), keep_p);
            assert!(z.abs() < MAX_Z, "drop_p {drop_p}, rows {lag} apart: z {z}");
        }
    }
    Ok(())
}

#[test]
fn neighbouring_keys_counters_and_draws_are_uncorrelated() -> Result<()> {
    let key = MaskKey::derive(3, 4);
    let pairs = [
        ("bits that differ by 1", MaskKey::new(6), MaskKey::new(7)),
        ("bits that differ by 2^32", MaskKey::new(6), MaskKey::new(6 + (1 << 32))),
        ("bits that differ by 2^63", MaskKey::new(6), MaskKey::new(6 + (1 << 63))),
        ("counters", MaskKey::derive(3, 4), MaskKey::derive(3, 5)),
        ("seeds", MaskKey::derive(3, 4), MaskKey::derive(4, 4)),
        ("seed and counter swapped", MaskKey::derive(3, 4), MaskKey::derive(4, 3)),
        ("draws", key.draw(0), key.draw(1)),
        ("a key and its first draw", key, key.draw(0)),
    ];
    for (what, a, b) in pairs {
        for drop_p in [0.1, 0.5] {
            let (a, b) = (DropMask::new(drop_p, a)?, DropMask::new(drop_p, b)?);
            let keep_p = a.rate().keep_p();
            let (a, b) = (keep_bits(&a, &[512, 512])?, keep_bits(&b, &[512, 512])?);
            let z = z_of_correlation(a.iter(), b.iter(), keep_p);
            assert!(z.abs() < MAX_Z, "{what}, drop_p {drop_p}: z {z}");
        }
    }
    Ok(())
}

#[test]
fn sample_t_of_a_mask_does_not_depend_on_how_many_are_drawn() -> Result<()> {
    let key = MaskKey::derive(8, 1);
    let third = keep_bits(&DropMask::new(0.5, key.draw(3))?, &[4, 40])?;
    let all: Result<Vec<_>> =
        (0..5).map(|t| keep_bits(&DropMask::new(0.5, key.draw(t))?, &[4, 40])).collect();
    assert_eq!(all?[3], third);
    Ok(())
}

// ---- windows ----

/// A shape, a part of it, and where the part begins.
fn shape_and_part() -> impl Strategy<Value = (Vec<usize>, Vec<usize>, Vec<usize>)> {
    let leading = prop::collection::vec(1usize..6, 0..4);
    (leading, 1usize..700).prop_flat_map(|(mut full, cols)| {
        full.push(cols);
        let part = full.iter().map(|&dim| {
            (0..dim).prop_flat_map(move |start| (Just(start), 1..=dim - start)).boxed()
        });
        (Just(full.clone()), part.collect::<Vec<_>>()).prop_map(|(full, part)| {
            let (start, dims) = part.into_iter().unzip();
            (full, start, dims)
        })
    })
}

fn narrow(x: &Tensor, start: &[usize], dims: &[usize]) -> Result<Tensor> {
    let mut parts = start.iter().zip(dims).enumerate();
    parts.try_fold(x.clone(), |x, (d, (start, len))| x.narrow(d, *start, *len))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_window_equals_that_part_of_the_whole_mask(
        (full, start, dims) in shape_and_part(), key: u64, drop_p in 0f32..1.,
    ) {
        let drop = DropMask::new(drop_p, MaskKey::new(key)).unwrap();
        let window = drop.window(&full, &start);
        let whole = drop.to_tensor(full.as_slice(), &Device::Cpu).unwrap();
        let expected = narrow(&whole, &start, &dims).unwrap().flatten_all().unwrap();
        prop_assert_eq!(keep_bits(&window, &dims).unwrap(), expected.to_vec1::<u8>().unwrap());

        let x = Tensor::ones(full.as_slice(), DType::F32, &Device::Cpu).unwrap();
        let whole = narrow(&dropout(&x, &drop).unwrap(), &start, &dims).unwrap();
        let part = dropout(&narrow(&x, &start, &dims).unwrap(), &window).unwrap();
        prop_assert_eq!(
            part.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            whole.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        );
    }
}

/// The masks of the parts along `dim`, cut at `cuts`, put together again.
fn reassembled(drop: &DropMask, full: &[usize], dim: usize, cuts: &[usize]) -> Result<Vec<u8>> {
    let ends = cuts.iter().copied().chain([full[dim]]);
    let parts: Result<Vec<_>> = [0]
        .iter()
        .chain(cuts)
        .zip(ends)
        .map(|(&from, to)| {
            let (mut start, mut dims) = (vec![0; full.len()], full.to_vec());
            (start[dim], dims[dim]) = (from, to - from);
            drop.window(full, &start).to_tensor(dims, &Device::Cpu)
        })
        .collect();
    Tensor::cat(&parts?, dim)?.flatten_all()?.to_vec1()
}

#[test]
fn a_split_in_any_dimension_reassembles_the_mask() -> Result<()> {
    let drop = DropMask::new(0.5, MaskKey::new(12))?;
    let splits: [(&str, &[usize], usize, &[usize]); 7] = [
        ("batch", &[4, 6, 33], 0, &[1, 3]),
        ("sequence, with a batch above 1", &[3, 10, 33], 1, &[1, 4, 9]),
        ("columns from 3 on", &[3, 10, 33], 2, &[3]),
        ("columns, each alone", &[2, 9], 1, &[1, 2, 3, 4, 5, 6, 7, 8]),
        ("heads", &[2, 6, 5, 19], 1, &[2, 4]),
        ("queries of every head", &[2, 6, 5, 19], 2, &[3]),
        ("keys, beyond one run of draws", &[2, 2, 3, 1200], 3, &[3, 600, 1111]),
    ];
    for (what, full, dim, cuts) in splits {
        let whole = keep_bits(&drop, full)?;
        assert_eq!(reassembled(&drop, full, dim, cuts)?, whole, "{what}");
    }
    Ok(())
}

// ---- instruction sets ----

/// Folds the bits of tensors into one number (FNV-1a).
struct Fingerprint(u64);

impl Fingerprint {
    fn add(&mut self, x: &Tensor) -> Result<()> {
        for bits in bits(x)? {
            self.0 = (self.0 ^ bits).wrapping_mul(0x0000_0100_0000_01b3);
        }
        Ok(())
    }
}

/// Masks, outputs and gradients of every op, in every dtype.
fn fingerprint() -> Result<u64> {
    let mut fingerprint = Fingerprint(0xcbf2_9ce4_8422_2325);
    let drop = DropMask::new(0.3, MaskKey::new(99))?;
    fingerprint.add(&drop.to_tensor((37, 1031), &Device::Cpu)?)?;
    fingerprint.add(&drop.window(&[50, 2000], &[7, 3]).to_tensor((37, 1031), &Device::Cpu)?)?;
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let input = |seed| Var::from_tensor(&random(&[37, 1031], dtype, seed)?.exp()?);
        let (x, residual, bias) = (input(1)?, input(2)?, input(3)?);
        let first_row = bias.get(0)?;
        let additive = AttentionMask::Additive(first_row.clone());
        let outputs = [
            dropout(&x, &drop)?,
            dropout_add(&x, &residual, None, &drop)?,
            dropout_add(&x, &residual, Some(&first_row), &drop)?,
            softmax_dropout(&x, 0.01, &AttentionMask::None, &drop)?,
            softmax_dropout(&x, 0.01, &AttentionMask::Causal, &drop)?,
            softmax_dropout(&x, 0.01, &additive, &drop)?,
            drop_path_add(&x, &residual, StochasticDepth::Row, &drop)?,
        ];
        for y in outputs {
            fingerprint.add(&y)?;
            let grads = (&y * residual.as_tensor())?.backward()?;
            for var in [&x, &residual, &bias] {
                if let Some(grad) = grads.get(var) {
                    fingerprint.add(grad)?;
                }
            }
        }
    }
    Ok(fingerprint.0)
}

/// The child of the test below, which chooses its instruction set through the environment.
#[test]
#[ignore = "run by every_instruction_set_gives_the_same_bits"]
fn print_fingerprint() -> Result<()> {
    println!("fingerprint {:016x}", fingerprint()?);
    Ok(())
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let fingerprints = ["baseline", "avx2", ""].map(|simd| {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "print_fingerprint", "--ignored", "--nocapture"])
            .env("CANDLE_DROPOUT_SIMD", simd)
            .output()
            .unwrap();
        let text = String::from_utf8(child.stdout).unwrap();
        let (_, rest) = text.split_once("fingerprint ").unwrap_or_else(|| panic!("{text}"));
        rest[..16].to_string()
    });
    assert_eq!(fingerprints[0], fingerprints[1], "baseline and avx2");
    assert_eq!(fingerprints[0], fingerprints[2], "baseline and the widest");
}
