//! The types that passes on the CPU compute in, and their functions.

use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

use candle_core::cpu::erf::erf_f64;
use candle_core::{CpuStorage, Result, WithDType};

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
    + Div<Output = Self>
    + Sum
{
    const ZERO: Self;
    const ONE: Self;
    const INFINITY: Self;
    const NEG_INFINITY: Self;
    fn from_f32(x: f32) -> Self;
    fn from_f64(x: f64) -> Self;
    fn from_u32(x: u32) -> Self;
    /// The elements of a storage, if they are of this type.
    fn elements(storage: &CpuStorage) -> Result<&[Self]>;
    fn storage(elements: Vec<Self>) -> CpuStorage;
    fn to_f64(self) -> f64;
    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    fn tanh(self) -> Self;
    fn recip(self) -> Self;
    fn sqrt(self) -> Self;
    /// `e^self` for `self <= 0`; within 2 units in the last place, and an exact 0 for -inf.
    fn exp_of_nonpositive(self) -> Self;
    fn abs(self) -> Self;
    /// The logarithm of a positive normal number.
    fn ln_of_normal(self) -> Self;
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
    #[inline(always)]
    fn from_u32(x: u32) -> Self {
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

    /// The Cephes polynomial of degree 9 on a mantissa between the roots of 1/2 and of 2.
    #[inline(always)]
    fn ln_of_normal(self) -> Self {
        const LN_2_HIGH: f32 = 0.693_359_4;
        const LN_2_LOW: f32 = -2.121_944_4e-4;
        const ROOT_OF_HALF: u32 = 0x3f35_04f3;
        let bits = self.to_bits();
        let n = (bits.wrapping_sub(ROOT_OF_HALF) as i32) >> 23;
        let r = f32::from_bits(bits.wrapping_sub((n << 23) as u32)) - 1.;
        let n = n as f32;
        let mut p = 7.037_683_6e-2f32;
        for c in [
            -1.151_461e-1,
            1.167_699_87e-1,
            -1.242_014_1e-1,
            1.424_932_3e-1,
            -1.666_805_7e-1,
            2.000_071_4e-1,
            -2.499_999_4e-1,
            3.333_333e-1,
        ] {
            p = p * r + c;
        }
        let r2 = r * r;
        r + (p * r * r2 + n * LN_2_LOW - 0.5 * r2) + n * LN_2_HIGH
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
    #[inline(always)]
    fn from_u32(x: u32) -> Self {
        f64::from(x)
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
    fn ln_of_normal(self) -> Self {
        self.ln()
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
    fn ln_is_within_two_units_in_the_last_place() {
        assert_eq!(1f32.ln_of_normal(), 0.);
        let mut worst = 0f64;
        for i in 0..2_000_000 {
            // As dense near 1, where the logarithm is 0, as anywhere.
            let x = (60. * (i as f64 / 1e6 - 1.).powi(3)).exp() as f32;
            let exact = f64::from(x).ln();
            let ulp = f64::from(f32::EPSILON) * 2f64.powi(exact.abs().log2().floor() as i32);
            if x != 1. {
                worst = worst.max((f64::from(x.ln_of_normal()) - exact).abs() / ulp);
            }
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
}
