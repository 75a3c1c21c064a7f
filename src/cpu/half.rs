//! Halves from and to f32, without a branch, so that loops over them vectorise.

use half::{bf16, f16};

/// By bits and one exact product, which also normalises subnormals: loops over it vectorise, while
/// those over `f16::to_f32` ask for the instruction set at every element. NaN becomes quiet.
#[inline(always)]
pub(super) fn widen_f16(x: f16) -> f32 {
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
pub(super) fn round_to_f16(x: f32) -> f16 {
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
pub(super) fn widen_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Round to nearest even without a branch, so that loops over it vectorise; NaN stays NaN.
#[inline(always)]
pub(super) fn round_to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet_nan } else { rounded } as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

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
