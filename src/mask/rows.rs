//! Where the rows of a tensor lie in something larger, smaller or broadcast.

/// Groups of leading dimensions that a [`RowMap`] can keep apart.
const GROUPS: usize = 4;

/// Maps the flattened leading dimensions of a tensor (its row) to a row of another grid: the whole
/// mask of which the tensor is a shard, or an additive mask that is broadcast over it.
///
/// Row `r` becomes `base + Σ_g digit_g * stride[g]`, where the digits of `r` are taken in the mixed
/// radix `size`, innermost first, and the last one is unbounded. Dimensions whose strides follow from
/// one another share a digit, so the usual map has a single one and no division happens.
/// Twin of `struct RowMap` in `kernels/rows.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RowMap {
    base: u64,
    size: [u64; GROUPS - 1],
    stride: [u64; GROUPS],
}

impl Default for RowMap {
    /// Rows stay where they are.
    fn default() -> Self {
        Self { base: 0, size: [u64::MAX; GROUPS - 1], stride: [1; GROUPS] }
    }
}

impl RowMap {
    /// The map of leading dimensions `dims` to rows with the given strides; `None` if more than four
    /// groups of dimensions remain apart.
    pub(crate) fn new(dims: &[usize], strides: &[u64], base: u64) -> Option<Self> {
        let mut map = Self { base, size: [u64::MAX; GROUPS - 1], stride: [0; GROUPS] };
        let (mut group, mut group_size) = (None, 1u64);
        for (&dim, &stride) in dims.iter().zip(strides).rev().filter(|(dim, _)| **dim != 1) {
            let follows = |g: usize| stride == map.stride[g].wrapping_mul(group_size);
            match group {
                Some(g) if follows(g) => group_size *= dim as u64,
                Some(g) if g + 1 == GROUPS => return None,
                _ => {
                    let next = group.map_or(0, |g| {
                        map.size[g] = group_size;
                        g + 1
                    });
                    map.stride[next] = stride;
                    group = Some(next);
                    group_size = dim as u64;
                }
            }
        }
        Some(map)
    }

    /// The row that row `row` maps to.
    #[inline(always)]
    pub(crate) fn map(&self, mut row: u64) -> u64 {
        let mut mapped = self.base;
        for (size, stride) in self.size.iter().zip(&self.stride) {
            if row < *size {
                return mapped.wrapping_add(row.wrapping_mul(*stride));
            }
            mapped = mapped.wrapping_add((row % size).wrapping_mul(*stride));
            row /= size;
        }
        mapped.wrapping_add(row.wrapping_mul(self.stride[GROUPS - 1]))
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// Every row of a `dims` grid against its digits taken one dimension at a time.
    fn agrees_with_digits(dims: &[usize], strides: &[u64], base: u64) {
        let map = RowMap::new(dims, strides, base).unwrap();
        for row in 0..dims.iter().product::<usize>() {
            let (mut rest, mut expected) = (row, base);
            for (dim, stride) in dims.iter().zip(strides).rev() {
                expected += (rest % dim) as u64 * stride;
                rest /= dim;
            }
            assert_eq!(map.map(row as u64), expected, "row {row} of {dims:?} by {strides:?}");
        }
    }

    #[test]
    fn rows_follow_the_strides() {
        agrees_with_digits(&[7], &[1], 3);
        agrees_with_digits(&[2, 3, 5], &[15, 5, 1], 0);
        agrees_with_digits(&[2, 3, 5], &[60, 10, 1], 7);
        agrees_with_digits(&[2, 1, 5], &[60, 10, 1], 7);
        agrees_with_digits(&[2, 3, 1], &[60, 10, 1], 7);
        agrees_with_digits(&[2, 3, 4, 5], &[1000, 100, 10, 1], 0);
        agrees_with_digits(&[2, 3, 5], &[5, 0, 1], 0);
        agrees_with_digits(&[2, 3], &[0, 0], 0);
        agrees_with_digits(&[], &[], 9);
    }

    #[test]
    fn contiguous_dimensions_need_no_division() {
        let map = RowMap::new(&[4, 1, 6], &[6, 6, 1], 0).unwrap();
        assert_eq!(map.size, [u64::MAX; 3]);
    }

    #[test]
    fn the_layout_is_that_of_the_kernels() {
        assert_eq!(size_of::<RowMap>(), 64);
        let offsets =
            [offset_of!(RowMap, base), offset_of!(RowMap, size), offset_of!(RowMap, stride)];
        assert_eq!(offsets, [0, 8, 32]);
    }

    #[test]
    fn five_groups_do_not_fit() {
        assert_eq!(RowMap::new(&[2; 5], &[10000, 1000, 100, 10, 1], 0), None);
    }
}
