//! The hyperparameters of a Transformer.

use candle_core::{Result, bail};

use crate::functional::Activation;
use crate::layers::RopeScaling;

/// Whose names, weight layout and parts a [`Transformer`](super::Transformer) has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// LayerNorm, learned positions, an MLP of two projections whose weights are `[in, out]`:
    /// Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    Gpt2,
    /// RMSNorm, rotary positions, a gated MLP, weights `[out, in]`: Touvron et al. 2023, arXiv
    /// 2302.13971; grouped-query heads as in arXiv 2307.09288.
    Llama,
}

/// The hyperparameters of a [`Transformer`](super::Transformer), with the names Hugging Face gives
/// them: those that all its models answer to, so `hidden_size` is GPT-2's `n_embd` too.
///
/// # Example
/// ```
/// use candle_dropout::TransformerConfig;
///
/// let config = TransformerConfig {
///     hidden_size: 64,
///     num_hidden_layers: 2,
///     num_attention_heads: 4,
///     num_key_value_heads: Some(2),
///     intermediate_size: Some(128),
///     ..TransformerConfig::llama()
/// };
/// assert!(config.with_dropout(0.1).validate().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct TransformerConfig {
    /// Style of the model.
    pub architecture: Architecture,
    /// Number of tokens the model knows.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP; `None`: `4 hidden_size`.
    pub intermediate_size: Option<usize>,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of attention heads.
    pub num_attention_heads: usize,
    /// Number of heads of keys and values, each shared by a group of queries (Ainslie et al. 2023,
    /// arXiv 2305.13245); divides `num_attention_heads`. `None`: as many.
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; `None`: `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// The function inside the MLP; gated in LLaMA, and only there.
    pub hidden_act: Activation,
    /// Added to the variance, or mean square, in every norm.
    pub norm_eps: f64,
    /// Base of the rotary frequencies; LLaMA only.
    pub rope_theta: f64,
    /// Change of the rotary frequencies for long contexts; LLaMA only.
    pub rope_scaling: RopeScaling,
    /// Tokens that a query sees, itself and those before it; `None`: all (Jiang et al. 2023, "Mistral
    /// 7B", arXiv 2310.06825).
    pub sliding_window: Option<usize>,
    /// The first so many layers have no `sliding_window`.
    pub max_window_layers: usize,
    /// Whether queries and keys are normalised, head by head, before they are turned to their
    /// positions; LLaMA only (Yang et al. 2025, "Qwen3", arXiv 2505.09388).
    pub qk_norm: bool,
    /// Whether the projections around attention have biases.
    pub attention_bias: bool,
    /// Whether the projection after attention has one; `None`: as those before it.
    pub attention_out_bias: Option<bool>,
    /// Whether the projections of the MLP have biases.
    pub mlp_bias: bool,
    /// Whether the output head is the token embedding (Press & Wolf 2017, arXiv 1608.05859).
    pub tie_word_embeddings: bool,
    /// Standard deviation of the initial weights. Projections that write to the residual stream
    /// start smaller, by `1 / sqrt(2 num_hidden_layers)`.
    pub initializer_range: f64,
    /// Drop probability of the embedding.
    pub embd_pdrop: f32,
    /// Drop probability of attention weights.
    pub attn_pdrop: f32,
    /// Drop probability of what a residual branch adds to the stream.
    pub resid_pdrop: f32,
    /// Probability that the last block's branches are skipped for a sample; block `l` of `L` uses
    /// `l / L` of it.
    pub drop_path_rate: f32,
    /// Whether to run the fused ops (the default) or the same maths from candle's own ops around
    /// [`dropout`](crate::functional::dropout()). Both draw the same masks; the second form is there to compare
    /// with.
    pub fused: bool,
    /// Whether attention is one fused op, [`attention()`](crate::functional::attention()), whose memory grows
    /// with the length of the sequence (the default), or materialises its scores around
    /// [`softmax_dropout`](crate::functional::softmax_dropout()). Both draw the same masks. On CUDA the fused
    /// op takes heads of at most 256 columns, and halves from compute capability 8.0 on. Without
    /// `fused`, no effect.
    pub flash_attention: bool,
}

impl TransformerConfig {
    /// GPT-2 small (124M parameters) with its published dropout of 0.1 everywhere and no stochastic
    /// depth.
    pub fn gpt2() -> Self {
        Self {
            architecture: Architecture::Gpt2,
            vocab_size: 50257,
            max_position_embeddings: 1024,
            hidden_size: 768,
            intermediate_size: None,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: Activation::GeluTanh,
            norm_eps: 1e-5,
            rope_theta: 10_000.,
            rope_scaling: RopeScaling::None,
            sliding_window: None,
            max_window_layers: 0,
            qk_norm: false,
            attention_bias: true,
            attention_out_bias: None,
            mlp_bias: true,
            tie_word_embeddings: true,
            initializer_range: 0.02,
            embd_pdrop: 0.1,
            attn_pdrop: 0.1,
            resid_pdrop: 0.1,
            drop_path_rate: 0.0,
            fused: true,
            flash_attention: true,
        }
    }

    /// LLaMA 3.2 with 1.2B parameters, published without dropout.
    pub fn llama() -> Self {
        Self {
            architecture: Architecture::Llama,
            vocab_size: 128_256,
            max_position_embeddings: 131_072,
            hidden_size: 2048,
            intermediate_size: Some(8192),
            num_hidden_layers: 16,
            num_attention_heads: 32,
            num_key_value_heads: Some(8),
            hidden_act: Activation::SwiGlu,
            rope_theta: 500_000.,
            rope_scaling: RopeScaling::Llama3 {
                factor: 32.,
                low_freq_factor: 1.,
                high_freq_factor: 4.,
                original_max_positions: 8192,
            },
            attention_bias: false,
            mlp_bias: false,
            ..Self::gpt2().with_dropout(0.)
        }
    }

    /// The same model with one drop probability at embedding, attention and residual, as `p` is
    /// usually swept.
    pub fn with_dropout(self, drop_p: impl Into<f64>) -> Self {
        let drop_p = drop_p.into() as f32;
        Self { embd_pdrop: drop_p, attn_pdrop: drop_p, resid_pdrop: drop_p, ..self }
    }

    /// The window of a layer, counted from 0.
    pub(super) fn window(&self, layer: usize) -> Option<usize> {
        self.sliding_window.filter(|_| layer >= self.max_window_layers)
    }

    /// Width inside the MLP.
    pub(super) fn mlp_size(&self) -> usize {
        self.intermediate_size.unwrap_or(self.hidden_size.saturating_mul(4))
    }

    /// Heads of keys and values.
    pub(super) fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Width of a head.
    pub(super) fn head_size(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// Checks that the elements of every weight can be counted.
    fn check_elements(&self) -> Result<()> {
        let (c, d, kv_heads) = (self.hidden_size, self.head_size(), self.kv_heads());
        let heads = kv_heads.checked_mul(2).and_then(|kv| kv.checked_add(self.num_attention_heads));
        let positions = match self.architecture {
            Architecture::Gpt2 => self.max_position_embeddings,
            Architecture::Llama => 0,
        };
        let joined = [
            ("vocab_size", Some(self.vocab_size)),
            ("max_position_embeddings", Some(positions)),
            ("num_attention_heads or head_dim", heads.and_then(|heads| heads.checked_mul(d))),
            ("intermediate_size", self.mlp_size().checked_mul(2)),
        ];
        for (name, size) in joined {
            // In bytes they fit an isize, whatever the dtype.
            let bytes =
                size.and_then(|size| size.checked_mul(c)).and_then(|size| size.checked_mul(8));
            if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
                bail!(
                    "transformer: {name}: expected a weight of fewer than 2^60 elements, got more with \
                     hidden_size = {c}: correct the configuration"
                )
            }
        }
        Ok(())
    }

    /// Checks every field.
    ///
    /// # Errors
    /// A size is 0, or so large that the elements of a weight cannot be counted; the heads do not
    /// divide the width, or the heads of keys and values the heads; a rotary head has an odd width;
    /// `hidden_act` or `qk_norm` does not suit the architecture; a drop probability lies outside 0 to
    /// 1; `norm_eps`, `rope_theta` or `initializer_range` is not a positive number.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.mlp_size()),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.kv_heads()),
            ("head_dim", self.head_dim.unwrap_or(1)),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
        ];
        for (name, size) in sizes {
            if size == 0 {
                bail!("transformer: {name}: expected at least 1, got 0: correct the configuration")
            }
        }
        let (c, heads, kv_heads) = (self.hidden_size, self.num_attention_heads, self.kv_heads());
        if self.head_dim.is_none() && !c.is_multiple_of(heads) {
            bail!(
                "transformer: hidden_size: expected a multiple of num_attention_heads = {heads}, got \
                 {c}: change one of the two, or set head_dim"
            )
        }
        if !heads.is_multiple_of(kv_heads) {
            bail!(
                "transformer: num_key_value_heads: expected a divisor of num_attention_heads = \
                 {heads}, got {kv_heads}"
            )
        }
        self.check_elements()?;
        let is_llama = self.architecture == Architecture::Llama;
        if is_llama && !self.head_size().is_multiple_of(2) {
            bail!(
                "transformer: head_dim: expected an even number for rotary positions, got {}: it is \
                 hidden_size = {c} / num_attention_heads = {heads} unless it is set",
                self.head_size()
            )
        }
        if self.qk_norm && !is_llama {
            bail!("transformer: qk_norm: expected false for Gpt2, got true: LLaMA alone has them")
        }
        if is_llama != self.hidden_act.is_gated() {
            let (kind, example) = match self.architecture {
                Architecture::Gpt2 => ("an activation without a gate", Activation::GeluTanh),
                Architecture::Llama => ("a gated activation", Activation::SwiGlu),
            };
            bail!(
                "transformer: hidden_act: expected {kind} for {:?}, got {:?}: the usual one is \
                 {example:?}",
                self.architecture,
                self.hidden_act
            )
        }
        let rates = [
            ("embd_pdrop", self.embd_pdrop),
            ("attn_pdrop", self.attn_pdrop),
            ("resid_pdrop", self.resid_pdrop),
            ("drop_path_rate", self.drop_path_rate),
        ];
        for (name, rate) in rates {
            if !(0.0..=1.0).contains(&rate) {
                bail!("transformer: {name}: expected a probability from 0 to 1, got {rate}")
            }
        }
        for (name, value) in [
            ("norm_eps", self.norm_eps),
            ("rope_theta", self.rope_theta),
            ("initializer_range", self.initializer_range),
        ] {
            if !(value.is_finite() && value > 0.0) {
                bail!(
                    "transformer: {name}: expected a positive number, got {value}: correct the configuration"
                )
            }
        }
        self.rope_scaling.validate()
    }
}
