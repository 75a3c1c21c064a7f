//! What the tests of all ops share: dtypes, shapes, windows, data, the kernels' by-value structs, comparisons.

use std::fmt::Debug;

use candle_core::{DType, Device, Tensor, WithDType};
use candle_dropout::functional::{
    AttentionArgs, AttentionLayout, CrossEntropyArgs, DropBlockArgs, HeadStrides, RopeArgs,
    ScoreArgs,
};
use candle_dropout::sizes::Launch;
use candle_dropout::training::{AdamWArgs, AdamWRule};
use candle_dropout::{MaskArgs, MaskKey};

use super::case::{Case, Plain};

/// One, so few that a grid has to stride over tensors of a test's size, and the H200's.
pub const MULTIPROCESSORS: [usize; 2] = [1, 132];

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

/// Parts of larger tensors: shape of the part, shape of the whole, start.
pub const WINDOWS: &[[&[usize]; 3]] = &[
    // A split of the sequence, of the heads, of everything.
    [&[2, 3, 16], &[2, 7, 40], &[0, 2, 8]],
    [&[2, 2, 3, 24], &[2, 5, 3, 24], &[0, 1, 0, 0]],
    [&[2, 2, 3, 13], &[3, 4, 5, 40], &[1, 1, 2, 5]],
    // As many groups of rows as a map keeps apart, each of them behind the first.
    [&[2, 2, 2, 3, 16], &[3, 3, 4, 5, 64], &[1, 1, 1, 1, 24]],
    [&[2, 3, 2, 2, 9], &[3, 4, 5, 3, 64], &[1, 1, 1, 1, 7]],
    // Rows and columns that need more than 32 bits.
    [&[2, 3, 16], &[1 << 30, 1 << 33, 1 << 34], &[1 << 29, 7, (1 << 33) + 8]],
    [&[2, 3, 11], &[1 << 30, 1 << 33, 1 << 34], &[1 << 29, 7, (1 << 33) + 3]],
];

/// The rates of the tests: the usual ones, nothing and everything.
pub const RATES: [f32; 5] = [0.1, 0., 0.5, 1., 0.25];

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
pub fn case<T: Element>(name: &str, launch: Launch) -> Case {
    case_named(&format!("{name}_{}", T::DTYPE.as_str()), launch)
}

/// The kernel of this very name.
pub fn case_named(name: &str, Launch { grid, block, shared_bytes }: Launch) -> Case {
    Case::new(name, grid, block, shared_bytes)
}

/// Values between -2 and 2, always the same for a seed.
pub fn random<T: Element>(seed: u64, len: usize) -> Vec<T> {
    let bits = |i: usize| MaskKey::derive(seed, i as u64).bits() >> 40;
    (0..len).map(|i| T::from_f64(bits(i) as f64 / f64::from(1 << 22) - 2.)).collect()
}

/// What no product with 0 makes vanish, always the same for an index.
pub fn poison<T: Element>(index: usize) -> T {
    T::from_f64([f64::NAN, f64::INFINITY, f64::NEG_INFINITY][index % 3])
}

pub fn tensor<T: Element>(values: &[T], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

/// In f64.
pub fn wide<T: Element>(values: &[T], shape: &[usize]) -> Tensor {
    tensor(values, shape).to_dtype(DType::F64).unwrap()
}

pub fn values<T: Element>(tensor: &Tensor) -> Vec<T> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The structs that kernels take by value.
///
/// # Safety
/// `repr(C)` without padding.
pub unsafe trait Struct: Copy {}
// SAFETY: `the_layout_is_that_of_the_kernels` in `src/mask/args.rs`.
unsafe impl Struct for MaskArgs {}
// SAFETY: `the_layout_is_that_of_the_kernels` in `src/functional/softmax_dropout/args.rs`.
unsafe impl Struct for ScoreArgs {}
// SAFETY: `the_layout_is_that_of_the_kernels` in `src/functional/rope/args.rs`.
unsafe impl Struct for RopeArgs {}
// SAFETY: `the_layout_is_that_of_the_kernels` in `src/functional/cross_entropy/args.rs`.
unsafe impl Struct for CrossEntropyArgs {}
// SAFETY: `the_layout_is_that_of_the_kernels` in `src/functional/drop_block/args.rs`.
unsafe impl Struct for DropBlockArgs {}
// SAFETY: `the_layout_is_that_of_the_kernels` in `src/functional/attention/args.rs`.
unsafe impl Struct for AttentionArgs {}
// SAFETY: as above.
unsafe impl Struct for AttentionLayout {}
// SAFETY: as above.
unsafe impl Struct for HeadStrides {}
// SAFETY: `the_layout_is_that_of_the_kernels` in `src/training/adamw/args.rs`.
unsafe impl Struct for AdamWArgs {}
// SAFETY: as above.
unsafe impl Struct for AdamWRule {}

/// The bytes that a launch copies.
pub fn struct_bytes<T: Struct>(value: &T) -> &[u8] {
    // SAFETY: `value` is `size_of::<T>()` initialised bytes, none of them padding.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

impl Case {
    /// A buffer that may be absent: a null pointer then.
    pub fn optional<T: Element>(self, elements: &Option<Vec<T>>) -> Self {
        match elements {
            Some(elements) => self.input(elements),
            None => self.null(),
        }
    }

    /// The same for numbers of no dtype that tensors compute in.
    pub fn optional_numbers<T: Plain>(self, elements: &Option<Vec<T>>) -> Self {
        match elements {
            Some(elements) => self.input(elements),
            None => self.null(),
        }
    }

    /// A struct passed by value.
    pub fn by_value<T: Struct>(self, value: &T) -> Self {
        self.value_bytes(struct_bytes(value))
    }
}

/// Equal bit for bit, where a NaN equals any other.
#[track_caller]
pub fn assert_same<T: Element>(got: &[T], expected: &[T], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let differs = |(a, b): (&T, &T)| {
        let (a, b) = (a.to_f64(), b.to_f64());
        a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan())
    };
    if let Some(at) = got.iter().zip(expected).position(differs) {
        panic!("{what}: element {at}: got {:?}, expected {:?}", got[at], expected[at]);
    }
}

/// What is dropped equals `bare` bit for bit, whatever the CPU makes of it.
#[track_caller]
pub fn assert_dropped<T: Element>(got: &[T], keep: &[bool], bare: &[T], what: &str) {
    let dropped = |values: &[T]| -> Vec<T> {
        values.iter().zip(keep).filter(|(_, keep)| !**keep).map(|(value, _)| *value).collect()
    };
    assert_same(&dropped(got), &dropped(bare), &format!("{what}, what is dropped"));
}

/// Equal up to the rounding of f32 arithmetic and, once, of the dtype.
///
/// `terms` is the size of what each element is the sum of: its computation in f32 may be off by `ROUNDINGS`
/// units of it. Where that is 0, so is the element.
#[track_caller]
pub fn assert_close<T: Element>(got: &[T], expected: &[f64], terms: &[f64], what: &str) {
    const ROUNDINGS: f64 = 12.;
    let f32_unit = 0.5f64.powi(24);
    let (unit, least) = match T::DTYPE {
        DType::F32 => (f32_unit, 0.5f64.powi(150)),
        DType::F16 => (0.5f64.powi(11), 0.5f64.powi(25)),
        DType::BF16 => (0.5f64.powi(8), 0.5f64.powi(134)),
        dtype => panic!("no kernel takes {dtype:?}"),
    };
    assert_eq!([got.len(), terms.len()], [expected.len(); 2], "{what}");
    for (at, ((got, expected), terms)) in got.iter().zip(expected).zip(terms).enumerate() {
        let got = got.to_f64();
        let computed = ROUNDINGS * f32_unit * terms;
        let tolerance =
            if *terms == 0. { 0. } else { computed + unit * (expected.abs() + computed) + least };
        let error = (got - expected).abs();
        assert!(
            error <= tolerance || (got.is_nan() && expected.is_nan()),
            "{what}: element {at}: got {got}, expected {expected} up to {tolerance}"
        );
    }
}
