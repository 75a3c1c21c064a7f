//! Element types: the only list of dtypes on the Rust side, and the arithmetic that kernels do in
//! them. Twin of `kernels/elem.cuh`.

use std::iter::Sum;
use std::ops::{Add, AddAssign, Mul, Sub};

use candle_core::cpu::erf::erf_f64;
use candle_core::{CpuStorage, DType, Layout, Result, Tensor, WithDType, bail};
use half::{bf16, f16};

/// A floating-point dtype of tensors: widened on load, rounded on store.
pub(crate) trait Element: WithDType {
    /// What products, sums and statistics are computed in: f64 for f64, else f32.
    type Real: Real;
    const ZERO: Self;
    fn load(self) -> Self::Real;
    fn store(x: Self::Real) -> Self;
}

/// A type that kernels compute in.
pub(crate) trait Real:
    Copy
    + Send
    + Sync
    + PartialOrd
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Sum
{
    const ZERO: Self;
    const ONE: Self;
    const INFINITY: Self;
    const NEG_INFINITY: Self;
    fn from_f32(x: f32) -> Self;
    fn from_f64(x: f64) -> Self;
    /// The elements of a storage, if they are of this type.
    fn elements(storage: &CpuStorage) -> Result<&[Self]>;
    fn storage(elements: Vec<Self>) -> CpuStorage;
    fn to_f64(self) -> f64;
    fn ln(self) -> Self;
    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    fn tanh(self) -> Self;
    fn recip(self) -> Self;
    fn sqrt(self) -> Self;
    /// `e^self` for `self <= 0`; within 2 units in the last place, and an exact 0 for -inf.
    fn exp_of_nonpositive(self) -> Self;
    fn abs(self) -> Self;
    /// The probability that a standard normal number is less.
    fn normal_cdf(self) -> Self;

    /// `s = 1 / (1 + e^-self)` and its derivative `s (1 - s)`, without the cancellation of `1 - s`.
    #[inline(always)]
    fn sigmoid(self) -> (Self, Self) {
        let e = (Self::ZERO - self.abs()).exp_of_nonpositive();
        let of_abs = (Self::ONE + e).recip();
        (if self >= Self::ZERO { of_abs } else { e * of_abs }, e * of_abs * of_abs)
    }
}

macro_rules! element {
    ($elem:ty, $real:ty, $zero:expr, $load:expr, $store:expr) => {
        impl Element for $elem {
            type Real = $real;
            const ZERO: Self = $zero;
            #[inline(always)]
            fn load(self) -> $real {
                $load(self)
            }
            #[inline(always)]
            fn store(x: $real) -> Self {
                $store(x)
            }
        }
    };
}

element!(f32, f32, 0., |x| x, |x| x);
element!(f64, f64, 0., |x| x, |x| x);
element!(f16, f32, f16::ZERO, widen_f16, round_to_f16);
element!(bf16, f32, bf16::ZERO, widen_bf16, round_to_bf16);

/// Runs `$body` with `$E` bound to the element type of a storage on the CPU.
macro_rules! for_float_dtype {
    ($op:expr, $storage:expr, |$E:ident| $body:expr) => {
        match $storage {
            candle_core::CpuStorage::F32(_) => {
                type $E = f32;
                $body
            }
            candle_core::CpuStorage::F64(_) => {
                type $E = f64;
                $body
            }
            candle_core::CpuStorage::F16(_) => {
                type $E = half::f16;
                $body
            }
            candle_core::CpuStorage::BF16(_) => {
                type $E = half::bf16;
                $body
            }
            other => {
                let dtype = candle_core::backend::BackendStorage::dtype(other);
                Err($crate::elem::unsupported_dtype($op, "x", dtype))
            }
        }
    };
}
pub(crate) use for_float_dtype;

pub(crate) fn unsupported_dtype(op: &str, arg: &str, dtype: DType) -> candle_core::Error {
    candle_core::Error::Msg(format!(
        "{op}: {arg}: expected dtype f32, f64, f16 or bf16, got {dtype:?}; convert it with to_dtype"
    ))
}

pub(crate) fn unsupported_on_cuda(op: &str, arg: &str, dtype: DType) -> candle_core::Error {
    candle_core::Error::Msg(format!(
        "{op}: {arg}: expected dtype f32, f16 or bf16 on CUDA, got {dtype:?}; convert it with \
         to_dtype(DType::F32) or move it to the CPU"
    ))
}

/// Checks that `arg` is a float tensor that its device computes in.
pub(crate) fn check_dtype(op: &str, arg: &str, x: &Tensor) -> Result<()> {
    match x.dtype() {
        DType::F64 if x.device().is_cuda() => Err(unsupported_on_cuda(op, arg, DType::F64)),
        DType::F32 | DType::F64 | DType::F16 | DType::BF16 => Ok(()),
        dtype => Err(unsupported_dtype(op, arg, dtype)),
    }
}

/// Checks that `arg` has the dtype and the device of `x`.
pub(crate) fn check_alike(op: &str, arg: &str, tensor: &Tensor, x: &Tensor) -> Result<()> {
    if tensor.dtype() != x.dtype() {
        bail!(
            "{op}: {arg}: expected dtype {:?} like x, got {:?}; convert it with to_dtype",
            x.dtype(),
            tensor.dtype()
        )
    }
    if !tensor.device().same_device(x.device()) {
        bail!(
            "{op}: {arg}: expected device {:?} like x, got {:?}; move it with to_device",
            x.device().location(),
            tensor.device().location()
        )
    }
    Ok(())
}

/// Checks that `arg` has the shape, the dtype and the device of `x`.
pub(crate) fn check_same(op: &str, arg: &str, tensor: &Tensor, x: &Tensor) -> Result<()> {
    if tensor.dims() != x.dims() {
        bail!(
            "{op}: {arg}: expected shape {:?} like x, got {:?}; expand it with broadcast_as",
            x.dims(),
            tensor.dims()
        )
    }
    check_alike(op, arg, tensor, x)
}

/// The elements of a contiguous tensor on the CPU.
pub(crate) fn slice<'a, E: Element>(
    op: &str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [E]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{op}: expected a contiguous tensor, got {layout:?}; call contiguous() on it")
    };
    Ok(&E::cpu_storage_as_slice(storage)?[start..end])
}

/// The elements of a contiguous tensor on the CPU whose dtype is one that is computed in.
pub(crate) fn reals<'a, R: Real>(
    op: &str,
    (storage, layout): (&'a CpuStorage, &Layout),
) -> Result<&'a [R]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{op}: expected a contiguous tensor, got {layout:?}; call contiguous() on it")
    };
    Ok(&R::elements(storage)?[start..end])
}

/// A vector of elements as the storage of a tensor on the CPU.
pub(crate) fn storage<E: Element>(elements: Vec<E>) -> CpuStorage {
    E::to_cpu_storage_owned(elements)
}

/// Rows and columns of a tensor: its leading dimensions flattened, and its last one.
pub(crate) fn rows_cols(dims: &[usize]) -> (usize, usize) {
    let (cols, leading) = dims.split_last().map_or((1, dims), |(cols, leading)| (*cols, leading));
    (leading.iter().product(), cols)
}

/// By bits and one exact product, which also normalises subnormals: loops over it vectorise, while
/// those over `f16::to_f32` ask for the instruction set at every element. NaN becomes quiet.
#[inline(always)]
fn widen_f16(x: f16) -> f32 {
    const TWO_TO_112: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(x.to_bits());
    let shifted = (bits & 0x7fff) << 13;
    let finite = (f32::from_bits(shifted) * TWO_TO_112).to_bits();
    let quiet = if shifted > 0x0f80_0000 { 0x0040_0000 } else { 0 };
    let magnitude = if shifted >= 0x0f80_0000 { 0x7f80_0000 | shifted | quiet } else { finite };
    f32::from_bits((bits & 0x8000) << 16 | magnitude)
}

/// Round to nearest even without a branch: below 2^-14 an addition rounds to the fixed step of
/// subnormals. NaN stays NaN.
#[inline(always)]
fn round_to_f16(x: f32) -> f16 {
    const SUBNORMAL_STEP: f32 = 0.5; // 2^-24, the step, times 2^23
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let subnormal = (f32::from_bits(magnitude) + SUBNORMAL_STEP)
        .to_bits()
        .wrapping_sub(SUBNORMAL_STEP.to_bits());
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    let quiet_nan = 0x7e00 | (magnitude >> 13) & 0x3ff;
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    let large = if magnitude > 0x7f80_0000 { quiet_nan } else { 0x7c00 };
    let rounded = if magnitude >= (127 + 16) << 23 { large } else { finite };
    f16::from_bits(((bits >> 16) & 0x8000 | rounded) as u16)
}

#[inline(always)]
fn widen_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Round to nearest even without a branch, so that loops over it vectorise; NaN stays NaN.
#[inline(always)]
fn round_to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet_nan } else { rounded } as u16)
}

impl Real for f32 {
    const ZERO: Self = 0.;
    const ONE: Self = 1.;
    const INFINITY: Self = f32::INFINITY;
    const NEG_INFINITY: Self = f32::NEG_INFINITY;
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as f32
    }
    fn elements(storage: &CpuStorage) -> Result<&[Self]> {
        Self::cpu_storage_as_slice(storage)
    }
    fn storage(elements: Vec<Self>) -> CpuStorage {
        Self::to_cpu_storage_owned(elements)
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        f32::ln(self)
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f32::mul_add(self, a, b)
    }
    /// The Cephes polynomial near 0, where 1 minus an exponential would cancel.
    #[inline(always)]
    fn tanh(self) -> Self {
        let (x, x2) = (self.abs(), self * self);
        let e = (-2. * x).exp_of_nonpositive();
        let mut p = -5.704_988_6e-3f32;
        for c in [2.063_908_6e-2, -5.373_971_5e-2, 1.333_144_2e-1, -3.333_328e-1] {
            p = p * x2 + c;
        }
        let far = (1. - e) / (1. + e);
        let far = if self < 0. { -far } else { far };
        if x < 0.625 { p * x2 * self + self } else { far }
    }
    #[inline(always)]
    fn recip(self) -> Self {
        1. / self
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }

    #[inline(always)]
    fn abs(self) -> Self {
        f32::abs(self)
    }

    /// Half the complementary error function of `-self / sqrt(2)`: Chebyshev fit of Press et al.,
    /// "Numerical recipes in C", 1992, section 6.2, within 1.2e-7 of each value.
    #[inline(always)]
    fn normal_cdf(self) -> Self {
        let z = self.abs() * std::f32::consts::FRAC_1_SQRT_2;
        let t = (1. + 0.5 * z).recip();
        let mut p = 0.170_872_77f32;
        for c in [
            -0.822_152_2,
            1.488_515_9,
            -1.135_204,
            0.278_868_07,
            -0.186_288_06,
            0.096_784_18,
            0.374_091_96,
            1.000_023_7,
            -1.265_512_2,
        ] {
            p = p * t + c;
        }
        // The fit's exponent is at most 0 but for rounding.
        let tail = 0.5 * t * (0f32.min(p - z * z)).exp_of_nonpositive();
        let cdf = if self > 0. { 1. - tail } else { tail };
        if self.is_nan() { self } else { cdf }
    }

    /// Cody-Waite reduction to `|r| <= ln 2 / 2` and the Cephes polynomial of degree 6; multiplies and
    /// adds stay apart, so every instruction set gives the same bits.
    #[inline(always)]
    fn exp_of_nonpositive(self) -> Self {
        const LN_2_HIGH: f32 = 0.693_359_4;
        const LN_2_LOW: f32 = -2.121_944_4e-4;
        /// Adding it rounds to an integer, which then stands in the low bits.
        const ROUND: f32 = 12_582_912.;
        /// Below this e^x is under the smallest normal f32, and 0 is returned.
        const UNDERFLOW: f32 = -87.336_54;
        let shifted = self.max(UNDERFLOW) * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = self.max(UNDERFLOW) - n * LN_2_HIGH - n * LN_2_LOW;
        let mut p = 1.987_569_1e-4;
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = p * r + c;
        }
        let e_r = p * r * r + r + 1.;
        let two_n = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
        let e_x = if self < UNDERFLOW { 0. } else { e_r * two_n };
        if self.is_nan() { self } else { e_x }
    }
}

impl Real for f64 {
    const ZERO: Self = 0.;
    const ONE: Self = 1.;
    const INFINITY: Self = f64::INFINITY;
    const NEG_INFINITY: Self = f64::NEG_INFINITY;
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f64::from(x)
    }
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }
    fn elements(storage: &CpuStorage) -> Result<&[Self]> {
        Self::cpu_storage_as_slice(storage)
    }
    fn storage(elements: Vec<Self>) -> CpuStorage {
        Self::to_cpu_storage_owned(elements)
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn ln(self) -> Self {
        f64::ln(self)
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f64::mul_add(self, a, b)
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        f64::tanh(self)
    }
    #[inline(always)]
    fn recip(self) -> Self {
        1. / self
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f64::abs(self)
    }
    #[inline(always)]
    fn normal_cdf(self) -> Self {
        0.5 * (1. + erf_f64(self * std::f64::consts::FRAC_1_SQRT_2))
    }
    #[inline(always)]
    fn exp_of_nonpositive(self) -> Self {
        self.exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        assert_eq!(f32::NEG_INFINITY.exp_of_nonpositive(), 0.);
        assert!(f32::NAN.exp_of_nonpositive().is_nan());
        assert_eq!(0f32.exp_of_nonpositive(), 1.);
        let mut worst = 0f64;
        for i in 0..2_000_000 {
            let x = -87.3 * (i as f32 / 2e6).powi(3);
            let exact = f64::from(x).exp();
            let ulp = f64::from(f32::EPSILON) * 2f64.powi(exact.log2().floor() as i32);
            worst = worst.max((f64::from(x.exp_of_nonpositive()) - exact).abs() / ulp);
        }
        assert!(worst <= 2., "{worst} units in the last place");
    }

    #[test]
    fn tanh_is_within_three_units_in_the_last_place() {
        assert_eq!([0f32.tanh(), 90f32.tanh(), f32::NEG_INFINITY.tanh()], [0., 1., -1.]);
        assert!(Real::tanh(f32::NAN).is_nan());
        let mut worst = 0f64;
        for i in -1_000_000..1_000_000 {
            let x = 10. * (i as f32 / 1e6).powi(3);
            let exact = f64::from(x).tanh();
            let ulp = f64::from(f32::EPSILON) * 2f64.powi(exact.abs().log2().floor() as i32);
            if x != 0. {
                worst = worst.max((f64::from(Real::tanh(x)) - exact).abs() / ulp);
            }
        }
        assert!(worst <= 3., "{worst} units in the last place");
    }

    #[test]
    fn f16_converts_as_the_half_crate_does() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            assert_eq!(widen_f16(x).to_bits(), x.to_f32().to_bits(), "{bits:x}");
        }
        // Every value of the high half, so every exponent, around the ties of each rounding.
        for high in 0..=u16::MAX {
            for low in [0u32, 1, 0xfff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x8000, 0xf000, 0xffff] {
                let x = f32::from_bits(u32::from(high) << 16 | low);
                assert_eq!(round_to_f16(x).to_bits(), f16::from_f32(x).to_bits(), "{x:e}");
            }
        }
    }

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        for high in 0..=u16::MAX {
            assert_eq!(widen_bf16(bf16::from_bits(high)).to_bits(), u32::from(high) << 16);
            for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(high) << 16 | low);
                assert_eq!(round_to_bf16(x).to_bits(), bf16::from_f32(x).to_bits(), "{x:e}");
            }
        }
    }
}
