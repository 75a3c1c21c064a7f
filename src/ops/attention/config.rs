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
