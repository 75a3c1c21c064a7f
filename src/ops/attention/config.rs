use candle_core::Tensor;

/// Which keys a query sees, and what becomes of a score before the softmax.
///
/// ```text
/// s = scale * q·k          s = softcap * tanh(s / softcap)          t = s - slope * |i + Sk - Sq - j|
/// ```
///
/// with query `i`, key `j` and the slope of the head; each step only where its field is set. A query
/// sees a key if every field allows it.
#[derive(Clone, Debug, Default)]
pub struct AttentionConfig {
    /// Multiplies the scores; `1 / sqrt(D)` if absent.
    pub scale: Option<f64>,
    /// Query `i` sees the keys `j <= i + Sk - Sq`: aligned to the bottom right.
    pub causal: bool,
    /// Sliding window: query `i` sees the keys from `i + Sk - Sq - left` to `i + Sk - Sq + right`, as
    /// `(left, right)`. Beltagy, Peters, Cohan, "Longformer", 2020, arXiv 2004.05150.
    pub window: Option<(usize, usize)>,
    /// Bounds the scores smoothly, `softcap * tanh(s / softcap)`. Gemma Team, "Gemma 2", 2024, arXiv
    /// 2408.00118.
    pub softcap: Option<f64>,
    /// `[B]`, u32: of sample `b` only the keys `j < key_lengths[b]` are seen; the rest is padding.
    /// What causal and window refer to stays `Sk`.
    pub key_lengths: Option<Tensor>,
    /// `[H]`, f32: a penalty on distance, one slope a head. Press, Smith, Lewis, "Train short, test
    /// long", 2021, arXiv 2108.12409.
    pub alibi_slopes: Option<Tensor>,
}

/// Sizes of an attention and the limits on its scores, as every kernel gets them. Twin of `struct
/// AttentionArgs` in `kernels/attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct AttentionArgs {
    /// Multiplies the scores.
    pub(crate) scale: f64,
    /// 0 for none.
    pub(crate) softcap: f64,
    pub(crate) batches: u32,
    pub(crate) heads: u32,
    /// Divides `heads`; head `h` reads key and value head `h / (heads / kv_heads)`.
    pub(crate) kv_heads: u32,
    pub(crate) queries: u32,
    pub(crate) keys: u32,
    pub(crate) head_size: u32,
    /// Keys that a query sees before and after its own, the key `i + keys - queries`; `UNBOUNDED` for all.
    pub(crate) left: u32,
    pub(crate) right: u32,
}

/// No limit on the keys that are seen to one side.
pub(crate) const UNBOUNDED: u32 = u32::MAX;

impl AttentionArgs {
    /// The keys that query `i` sees, as a range; `keys` is the length of its sample.
    #[inline(always)]
    pub(crate) fn visible(&self, query: usize, keys: usize) -> (usize, usize) {
        let diagonal = query as i64 + i64::from(self.keys) - i64::from(self.queries);
        let begin = match self.left {
            UNBOUNDED => 0,
            left => (diagonal - i64::from(left)).max(0),
        };
        let end = match self.right {
            UNBOUNDED => keys as i64,
            right => (diagonal + i64::from(right) + 1).min(keys as i64),
        };
        (begin as usize, end.max(begin) as usize)
    }
}

/// Where the elements of a tensor `[B, H, S, D]` lie: strides in elements. Those of the last dimension
/// are neighbours. Twin of `struct HeadStrides` in `kernels/attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct HeadStrides {
    pub(crate) batch: u64,
    pub(crate) head: u64,
    pub(crate) row: u64,
}

impl HeadStrides {
    /// Where row `(batch, head, row)` begins.
    #[inline(always)]
    pub(crate) fn at(&self, batch: usize, head: usize, row: usize) -> usize {
        batch * self.batch as usize + head * self.head as usize + row * self.row as usize
    }
}

/// The strides of the four tensors of a pass: q, k, v, o, or their gradients. Twin of `struct
/// AttentionLayout` in `kernels/attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct AttentionLayout {
    pub(crate) q: HeadStrides,
    pub(crate) k: HeadStrides,
    pub(crate) v: HeadStrides,
    pub(crate) o: HeadStrides,
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_layout_is_that_of_the_kernels() {
        assert_eq!(size_of::<AttentionArgs>(), 48);
        let sizes = [
            offset_of!(AttentionArgs, softcap),
            offset_of!(AttentionArgs, batches),
            offset_of!(AttentionArgs, heads),
            offset_of!(AttentionArgs, kv_heads),
            offset_of!(AttentionArgs, queries),
            offset_of!(AttentionArgs, keys),
            offset_of!(AttentionArgs, head_size),
            offset_of!(AttentionArgs, left),
            offset_of!(AttentionArgs, right),
        ];
        assert_eq!(sizes, [8, 16, 20, 24, 28, 32, 36, 40, 44]);
        assert_eq!(size_of::<AttentionLayout>(), 96);
        assert_eq!([offset_of!(HeadStrides, head), offset_of!(HeadStrides, row)], [8, 16]);
        let tensors = [
            offset_of!(AttentionLayout, k),
            offset_of!(AttentionLayout, v),
            offset_of!(AttentionLayout, o),
        ];
        assert_eq!(tensors, [24, 48, 72]);
    }
}
