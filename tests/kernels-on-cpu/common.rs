//! What the tests of all ops share: dtypes, shapes, data, and the kernels' by-value structs.

use std::fmt::Debug;

use candle_core::{Device, Tensor, WithDType};
use candle_dropout::{DropMask, MaskKey};

use crate::harness::{Case, Plain};
use crate::launch::Launch;

/// Few enough that a grid has to stride over tensors of a test's size.
pub const MULTIPROCESSORS: usize = 1;

/// One element, odd, prime, whole vectors, just beside them, several tiles a
/// row, more rows than a grid holds at once.
pub const SHAPES: &[[usize; 2]] = &[
    [1, 1],
    [3, 5],
    [7, 8],
    [31, 61],
    [5, 24],
    [2, 1000],
    [3, 1024],
    [4, 1027],
    [2100, 8],
    [2, 4104],
];

/// The dtypes that kernels exist for.
pub trait Element: Plain + WithDType + Debug {}
impl<T: Plain + WithDType + Debug> Element for T {}

/// Runs `$test::<T>(..)` for every dtype.
macro_rules! for_each_dtype {
    ($test:ident($($argument:expr),*)) => {{
        $test::<f32>($($argument),*);
        $test::<half::f16>($($argument),*);
        $test::<half::bf16>($($argument),*);
    }};
}
pub(crate) use for_each_dtype;

/// The kernel `<name>_<dtype>`, launched as `src/` launches it.
pub fn case<T: Element>(name: &str, Launch { grid, block }: Launch) -> Case {
    Case::new(&format!("{name}_{}", T::DTYPE.as_str()), grid, block, 0)
}

/// Values between -2 and 2, always the same for a seed.
pub fn random<T: Element>(seed: u64, len: usize) -> Vec<T> {
    let bits = |i: usize| MaskKey::derive(seed, i as u64).bits() >> 40;
    (0..len).map(|i| T::from_f64(bits(i) as f64 / f64::from(1 << 22) - 2.)).collect()
}

pub fn tensor<T: Element>(values: &[T], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

pub fn values<T: Element>(tensor: &Tensor) -> Vec<T> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

pub fn mask(drop_p: f32) -> DropMask {
    DropMask::new(drop_p, MaskKey::derive(7, 11)).unwrap()
}

/// `struct RowMap` with a single digit: row r becomes base + r * stride.
pub fn row_map(base: u64, stride: u64) -> Vec<u8> {
    crate::harness::to_bytes(&[base, u64::MAX, u64::MAX, u64::MAX, stride, 0, 0, 0])
}

/// `struct MaskArgs` for the part of a mask that begins at [row, col].
pub fn mask_args(drop: &DropMask, [row, col]: [usize; 2]) -> Vec<u8> {
    let mut bytes = drop.key().bits().to_le_bytes().to_vec();
    drop.rate().threshold().append(&mut bytes);
    drop.rate().scale().append(&mut bytes);
    (col as u64).append(&mut bytes);
    bytes.extend(row_map(row as u64, 1));
    bytes
}

/// Equal bit for bit.
#[track_caller]
pub fn assert_same<T: Element>(got: &[T], expected: &[T], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let differs = |(a, b): (&T, &T)| a.to_f64().to_bits() != b.to_f64().to_bits();
    if let Some(at) = got.iter().zip(expected).position(differs) {
        panic!("{what}: element {at}: got {:?}, expected {:?}", got[at], expected[at]);
    }
}

/// Equal up to a few units in the last place of the dtype.
#[track_caller]
pub fn assert_close<T: Element>(got: &[T], expected: &[f64], what: &str) {
    let tolerance = match size_of::<T>() {
        4 => 2e-6,
        _ => 1. / 128.,
    };
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f64, |largest, x| largest.max(x.abs()));
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got.to_f64() - expected).abs();
        // A NaN is close to nothing.
        assert!(
            error <= tolerance * largest,
            "{what}: element {at}: got {got:?}, expected {expected}"
        );
    }
}
