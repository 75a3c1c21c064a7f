use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use candle_nn::{Linear, Module, VarBuilder, linear_b};

use super::site::Site;
use crate::mask::MaskGenerator;
use crate::ops::{AttentionConfig, attention_qkv};

/// Sizes and settings of a [`MultiHeadAttention`].
#[derive(Clone, Debug)]
pub struct MultiHeadAttentionConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Heads of queries.
    pub num_heads: usize,
    /// Heads of keys and values, each shared by a group of queries; `None`: as many.
    pub num_kv_heads: Option<usize>,
    /// Width of a head; `None`: `hidden_size / num_heads`.
    pub head_dim: Option<usize>,
    /// Whether the two projections have biases.
    pub bias: bool,
    /// Drop probability of the attention weights.
    pub drop_p: f32,
    /// Which keys a query sees, and what becomes of a score.
    pub attention: AttentionConfig,
}

impl Default for MultiHeadAttentionConfig {
    /// GPT-2 small's: 12 heads of 64, causal, biases, a drop probability of 0.1.
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_heads: 12,
            num_kv_heads: None,
            head_dim: None,
            bias: true,
            drop_p: 0.1,
            attention: AttentionConfig { causal: true, ..AttentionConfig::default() },
        }
    }
}

/// Multi-head self-attention with dropout on its weights: one projection to queries, keys and values,
/// [`attention_qkv`], one projection back. Nothing is transposed or copied in between.
///
/// In training it draws one key a call, whatever the rate; in evaluation none.
///
/// # Shapes
/// `[B, S, hidden_size]` to the same. Parameters, `[out, in]` as candle's linear layers have them:
/// `qkv_proj.weight` of `(num_heads + 2 num_kv_heads) head_dim` rows, queries first, then keys and values
/// (LLaMA's `q_proj`, `k_proj` and `v_proj`, one below the other; GPT-2's `c_attn`, transposed);
/// `o_proj.weight`; with `bias` also `qkv_proj.bias` and `o_proj.bias`.
///
/// Vaswani et al., "Attention is all you need", 2017, arXiv 1706.03762 (section 3.2.2); see
/// [`attention()`](crate::attention()) for the rest.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{
///     MaskGenerator, MultiHeadAttention, MultiHeadAttentionConfig, seeded_var_builder,
/// };
/// use candle_nn::VarMap;
///
/// # fn main() -> candle_core::Result<()> {
/// let config = MultiHeadAttentionConfig {
///     hidden_size: 32,
///     num_heads: 4,
///     num_kv_heads: Some(2),
///     ..Default::default()
/// };
/// let vars = VarMap::new();
/// let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
/// let layer = MultiHeadAttention::new(&config, Arc::new(MaskGenerator::new(2)), vb)?;
/// let xs = Tensor::ones((2, 5, 32), DType::F32, &Device::Cpu)?;
/// assert_eq!(layer.forward(&xs, true)?.dims(), [2, 5, 32]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct MultiHeadAttention {
    qkv_proj: Linear,
    o_proj: Linear,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    attention: AttentionConfig,
    drop: Site,
}

impl MultiHeadAttention {
    /// Builds the layer from the variables of `vb`, creating those that do not exist.
    ///
    /// # Errors
    /// A size is 0; the heads do not divide the width and `head_dim` is absent, or those of keys and values
    /// do not divide the heads; `drop_p` is no probability; `vb` holds a variable of another shape.
    pub fn new(
        config: &MultiHeadAttentionConfig,
        generator: Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Self> {
        const NAME: &str = "multi_head_attention";
        let (hidden_size, num_heads) = (config.hidden_size, config.num_heads);
        let num_kv_heads = config.num_kv_heads.unwrap_or(num_heads);
        let sizes = [
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
        ];
        for (field, size) in sizes.into_iter().chain([("head_dim", config.head_dim.unwrap_or(1))]) {
            if size == 0 {
                bail!("{NAME}: {field}: expected at least 1, got 0")
            }
        }
        if config.head_dim.is_none() && !hidden_size.is_multiple_of(num_heads) {
            bail!(
                "{NAME}: hidden_size: expected a multiple of num_heads = {num_heads}, got {hidden_size}; \
                 change one of the two, or set head_dim"
            )
        }
        if !num_heads.is_multiple_of(num_kv_heads) {
            bail!(
                "{NAME}: num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}"
            )
        }
        let head_dim = config.head_dim.unwrap_or(hidden_size / num_heads);
        let projected = (num_heads + 2 * num_kv_heads) * head_dim;
        let drop = Site::new(config.drop_p, generator).checked()?;
        Ok(Self {
            qkv_proj: linear_b(hidden_size, projected, config.bias, vb.pp("qkv_proj"))?,
            o_proj: linear_b(num_heads * head_dim, hidden_size, config.bias, vb.pp("o_proj"))?,
            num_heads,
            num_kv_heads,
            head_dim,
            attention: config.attention.clone(),
            drop,
        })
    }

    /// Attends within each sequence; drops weights if `train` is true.
    ///
    /// # Errors
    /// `xs` is not `[B, S, hidden_size]` of the parameters' dtype and device, or refused by
    /// [`attention_qkv`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        self.attend(xs, &self.attention, train)
    }

    /// The same for sequences of `lengths` tokens, u32 of shape `[B]`, and padding behind them.
    ///
    /// What stands at the padding reaches no other token; its own outputs mean nothing.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward); `lengths` does not fit.
    pub fn forward_padded(&self, xs: &Tensor, lengths: &Tensor, train: bool) -> Result<Tensor> {
        let key_lengths = Some(lengths.clone());
        self.attend(xs, &AttentionConfig { key_lengths, ..self.attention.clone() }, train)
    }

    fn attend(&self, xs: &Tensor, config: &AttentionConfig, train: bool) -> Result<Tensor> {
        let &[b, s, _] = xs.dims() else {
            bail!(
                "multi_head_attention: xs: expected [B, S, hidden_size], got {:?}; reshape it",
                xs.dims()
            )
        };
        let drop = self.drop.next_mask(train)?;
        let heads = self.num_heads + 2 * self.num_kv_heads;
        let qkv = self.qkv_proj.forward(xs)?;
        let qkv = qkv.reshape((b, s, heads, self.head_dim))?; // [B, S, H + 2 Hkv, D]
        let y = attention_qkv(&qkv, self.num_heads, config, &drop)?; // [B, S, H, D]
        self.o_proj.forward(&y.reshape((b, s, self.num_heads * self.head_dim))?) // [B, S, C]
    }
}
