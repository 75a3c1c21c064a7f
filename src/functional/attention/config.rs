use candle_core::{Result, Tensor};

use crate::mask::Repeat;

/// Which keys a query sees, what becomes of a score before the softmax, and whether weights or keys are dropped.
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
    /// What causal and window refer to stays `Sk`. A length above `Sk` is an error on the CPU; on CUDA,
    /// where nobody waits for what the device holds, it counts as `Sk`.
    pub key_lengths: Option<Tensor>,
    /// `[H]`, f32: a penalty on distance, one slope a head. Press, Smith, Lewis, "Train short, test
    /// long", 2021, arXiv 2108.12409.
    pub alibi_slopes: Option<Tensor>,
    /// DropKey: the mask drops keys before the softmax, not weights behind it, so what a query keeps sums to 1 as it
    /// is, and nothing is scaled: `t = keep ? t : -inf`, `y = P`. The mask is the same, of shape `[B, H, Sq, Sk]`: each
    /// query of each head drops keys of its own. A query whose keys are all dropped gives zeros. Li, Hu, Nie, Han,
    /// Jiang, Guo, Liu, "DropKey", CVPR 2023, arXiv 2208.02646.
    pub drop_key: bool,
}

impl AttentionConfig {
    /// That of one repetition of a batch.
    pub(super) fn of_repeat(&self, part: &Repeat<'_>) -> Result<Self> {
        let key_lengths = part.of_optional("key_lengths", self.key_lengths.as_ref())?;
        Ok(Self { key_lengths, ..self.clone() })
    }
}
