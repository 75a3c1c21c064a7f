use candle_core::{Result, bail};

/// A drop probability as the mask law realises it: an integer threshold and its exact inverse.
///
/// ```text
/// threshold = clamp(floor((1 - drop_p) * 65536 + 0.5), 1, 65535)
/// scale     = 65536 / threshold
/// ```
///
/// An element is kept when its 16-bit draw is below `threshold`, so the realised keep probability is
/// exactly `threshold / 65536` and scaling by its exact inverse leaves the expectation unchanged. The
/// two rates that need no draws are the ends of the same scale: `drop_p = 0` has the threshold 65536
/// (every draw is below) and `drop_p = 1` the threshold 0 (none is).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    threshold: u32,
    scale: f32,
}

/// Number of distinct 16-bit draws.
const DRAWS: u32 = 1 << 16;

impl Rate {
    /// Keeps everything.
    pub const KEEP_ALL: Self = Self { threshold: DRAWS, scale: 1. };

    /// Drops everything.
    pub const DROP_ALL: Self = Self { threshold: 0, scale: 0. };

    /// The rate that drops with probability `drop_p`, rounded to a multiple of 1/65536.
    ///
    /// A probability in f64 is rounded to f32 first, so that 0.1 is the same rate in both.
    ///
    /// # Errors
    /// `drop_p` is negative, above 1 or NaN.
    pub fn new(drop_p: impl Into<f64>) -> Result<Self> {
        let drop_p = drop_p.into() as f32;
        if !(0. ..=1.).contains(&drop_p) {
            bail!(
                "drop_p: expected a probability of dropping in [0, 1], got {drop_p}; pass 0 to drop nothing"
            )
        }
        if drop_p == 0. {
            return Ok(Self::KEEP_ALL);
        }
        if drop_p == 1. {
            return Ok(Self::DROP_ALL);
        }
        let keep = (1. - f64::from(drop_p)) * f64::from(DRAWS) + 0.5;
        let threshold = (keep.floor() as u32).clamp(1, DRAWS - 1);
        let scale = (f64::from(DRAWS) / f64::from(threshold)) as f32;
        Ok(Self { threshold, scale })
    }

    /// Draws below this are kept: 0 drops everything, 65536 keeps everything.
    pub fn threshold(self) -> u32 {
        self.threshold
    }

    /// What a kept element is multiplied by.
    pub fn scale(self) -> f32 {
        self.scale
    }

    /// The realised probability of keeping an element.
    pub fn keep_p(self) -> f64 {
        f64::from(self.threshold) / f64::from(DRAWS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_follow_the_law() -> Result<()> {
        for (drop_p, threshold) in
            [(0.1, 58982), (0.5, 32768), (0.25, 49152), (0.9, 6554), (0.05, 62259), (0.001, 65470)]
        {
            assert_eq!(Rate::new(drop_p)?.threshold(), threshold, "drop_p {drop_p}");
        }
        assert_eq!(Rate::new(1e-9)?.threshold(), 65535);
        assert_eq!(Rate::new(1. - f32::EPSILON / 2.)?.threshold(), 1);
        assert_eq!(Rate::new(0.)?, Rate::KEEP_ALL);
        assert_eq!(Rate::new(-0.)?, Rate::KEEP_ALL);
        assert_eq!(Rate::new(1.)?, Rate::DROP_ALL);
        Ok(())
    }

    #[test]
    fn scale_is_the_inverse_of_the_realised_keep_probability() -> Result<()> {
        for drop_p in [0.001, 0.1, 0.3, 0.5, 0.77, 0.999] {
            let rate = Rate::new(drop_p)?;
            assert_eq!(rate.scale(), (1. / rate.keep_p()) as f32);
        }
        Ok(())
    }

    #[test]
    fn what_is_no_probability_is_refused() {
        for drop_p in [-0.1, 1.0001, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = Rate::new(drop_p).unwrap_err().to_string();
            assert!(error.contains("drop_p: expected a probability"), "{error}");
        }
    }
}
