use candle_core::Result;

use crate::mask::{DropMask, MaskArgs, Rate};

/// What a kept and a dropped element become.
#[derive(Clone, Copy, Debug)]
pub(super) struct Values {
    /// `x * scale + shift`, if it is kept.
    pub(super) scale: f64,
    pub(super) shift: f64,
    /// What it is otherwise.
    pub(super) fill: f64,
}

/// The negative saturation of SELU: `-λ α`.
const SATURATION: f64 = -1.758_099_340_847_376_6;

impl Values {
    /// `keep ? x * scale : 0`. To add -0 leaves every number as it is, also 0.
    pub(super) const fn scaled(scale: f64) -> Self {
        Self { scale, shift: -0., fill: 0. }
    }

    /// Dropped elements saturate, and an affine map brings mean 0 and variance 1 back, at the realised rate.
    pub(super) fn saturating(rate: Rate) -> Self {
        if rate == Rate::DROP_ALL {
            return Self::scaled(0.);
        }
        let keep_p = f64::from(rate.threshold()) / 65536.;
        let scale = (keep_p * (1. + SATURATION * SATURATION * (1. - keep_p))).sqrt().recip();
        let shift = -scale * SATURATION * (1. - keep_p);
        Self { scale, shift, fill: scale * SATURATION + shift }
    }
}

/// A tensor as `[rows, cols]`, and what one decision is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Groups {
    pub(super) mask: MaskArgs,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Each row is a group, and there are so many in a row of the mask; or, if none, each column of `repeat` rows is one.
    pub(super) mask_cols: Option<usize>,
    /// Rows, one below the other, that have one row of the mask.
    pub(super) repeat: usize,
}

impl Groups {
    /// The groups of a tensor of shape `dims` whose mask is shared over the dimensions `shared`, in ascending order.
    pub(super) fn new(op: &str, drop: &DropMask, dims: &[usize], shared: &[usize]) -> Result<Self> {
        let mask = drop.args_shared(op, dims, shared)?;
        let grouped = (0..dims.len()).rev().find(|d| !shared.contains(d)).map_or(0, |d| d + 1);
        let (groups, group) = dims.split_at(grouped);
        let product = |dims: &[usize]| dims.iter().product::<usize>();
        let cols = groups.last().copied().unwrap_or(1);
        Ok(match group {
            [] if !groups.is_empty() => {
                let leading = &groups[..grouped - 1];
                let alike = (0..leading.len()).rev().take_while(|d| shared.contains(d)).count();
                let repeat = product(&leading[leading.len() - alike..]);
                Self { mask, rows: product(leading), cols, mask_cols: None, repeat }
            }
            _ => {
                let rows = product(groups);
                Self { mask, rows, cols: product(group), mask_cols: Some(cols), repeat: 1 }
            }
        })
    }

    /// One decision a word, whose number stands in `ids`: the mask has a single row.
    pub(super) fn of_words(mask: MaskArgs, ids: usize, cols: usize) -> Self {
        Self { mask, rows: ids, cols, mask_cols: Some(usize::MAX), repeat: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::MaskKey;

    fn groups(dims: &[usize], shared: &[usize]) -> (usize, usize, Option<usize>, usize) {
        let drop = DropMask::new(0.5, MaskKey::new(1)).unwrap();
        let groups = Groups::new("test", &drop, dims, shared).unwrap();
        (groups.rows, groups.cols, groups.mask_cols, groups.repeat)
    }

    #[test]
    fn what_is_shared_behind_the_mask_makes_rows_of_its_groups() {
        assert_eq!(groups(&[2, 3, 5, 7], &[2, 3]), (6, 35, Some(3), 1));
        assert_eq!(groups(&[2, 3, 1, 1], &[2, 3]), (6, 1, Some(3), 1), "whatever its size");
        assert_eq!(groups(&[2, 3, 5], &[1]), (6, 5, None, 3));
        assert_eq!(groups(&[2, 3, 5, 7], &[1, 2]), (30, 7, None, 15));
        assert_eq!(groups(&[2, 3, 5, 7], &[0, 2]), (30, 7, None, 5));
        assert_eq!(groups(&[2, 3, 5], &[0]), (6, 5, None, 1), "the rows of one mask lie apart");
        assert_eq!(groups(&[2, 3, 5], &[0, 1, 2]), (1, 30, Some(1), 1));
        assert_eq!(groups(&[2, 3], &[]), (2, 3, None, 1));
        assert_eq!(groups(&[], &[]), (1, 1, Some(1), 1));
    }

    /// Klambauer et al.: mean 0 and variance 1 of the input stay.
    #[test]
    fn saturating_keeps_mean_and_variance() {
        for drop_p in [1e-3, 0.05, 0.1, 0.5, 0.9] {
            let rate = Rate::new(drop_p).unwrap();
            let Values { scale, shift, fill } = Values::saturating(rate);
            let keep_p = f64::from(rate.threshold()) / 65536.;
            let mean = keep_p * shift + (1. - keep_p) * fill;
            let square = keep_p * (scale * scale + shift * shift) + (1. - keep_p) * fill * fill;
            assert!(
                mean.abs() < 1e-12 && (square - 1.).abs() < 1e-12,
                "{drop_p}: {mean}, {square}"
            );
        }
    }
}
