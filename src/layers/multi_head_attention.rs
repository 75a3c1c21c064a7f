use std::sync::Arc;

use candle_core::{Error, Result, Tensor, bail};
use candle_nn::{Module, VarBuilder};

use super::linear::{Linear, linear_b};
use super::rate_schedule::ScheduledRate;
use super::site::{Site, module_methods, name_at};
use crate::functional::{AttentionConfig, attention, attention_qkv};
use crate::mask::MaskGenerator;

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
    /// Drop probability of the attention weights, or of keys with `attention.drop_key`.
    pub drop_p: f32,
    /// Which keys a query sees, what becomes of a score, and whether weights or keys are dropped.
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
/// [`attention()`](crate::functional::attention()) for the rest.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{MaskGenerator, MultiHeadAttention, MultiHeadAttentionConfig, seeded_var_builder};
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
    /// The layer and, where it has one, the path of its variables: for errors.
    name: String,
    projections: Projections,
    o_proj: Linear,
    sizes: Sizes,
    attention: AttentionConfig,
    drop: Site,
}

/// What makes queries, keys and values.
#[derive(Clone, Debug)]
enum Projections {
    /// One product.
    Joint(Linear),
    /// Three, as a model holds them that was written with three: q, k, v.
    Apart([Linear; 3]),
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    hidden_size: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

const NAME: &str = "multi_head_attention";

impl MultiHeadAttention {
    /// Builds the layer from the variables of `vb`, creating those that do not exist.
    ///
    /// # Errors
    /// A size is 0; the heads do not divide the width and `head_dim` is absent, or those of keys and values
    /// do not divide the heads; `drop_p` is no probability; `vb` holds a variable of another shape, or weights of
    /// queries, keys and values apart, which are for [`from_qkv`](Self::from_qkv).
    pub fn new(
        config: &MultiHeadAttentionConfig,
        generator: Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let name = name_at(NAME, &vb.prefix());
        let sizes = Sizes::new(&name, config)?;
        let projected = (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim;
        let is_missing = !vb.contains_tensor("qkv_proj.weight");
        if is_missing && vb.contains_tensor("q_proj.weight") {
            bail!(
                "{name}: qkv_proj.weight: expected the weights of queries, keys and values as one of \
                 [{projected}, {}], got q_proj.weight; use MultiHeadAttention::from_qkv",
                sizes.hidden_size
            )
        }
        let qkv_proj = linear_b(sizes.hidden_size, projected, config.bias, vb.pp("qkv_proj"));
        let qkv_proj = qkv_proj.map_err(|error| match is_missing {
            true => Error::Msg(format!(
                "{name}: qkv_proj.weight: expected queries, keys and values as one, got none; for three of their \
                 own use MultiHeadAttention::from_qkv: {error}"
            )),
            false => error,
        })?;
        Self::of(name, config, sizes, generator, Projections::Joint(qkv_proj), vb.pp("o_proj"))
    }

    /// The same layer over projections of queries, keys and values of their own, and of the output: each builder
    /// holds a `weight` `[out, in]` and, with `bias`, a `bias`, whatever the model calls it. The numbers are those
    /// of [`new`](Self::new); three products take the place of one.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use candle_core::{DType, Device, Result, Tensor};
    /// # use candle_dropout::{MaskGenerator, MultiHeadAttention, MultiHeadAttentionConfig};
    /// # use candle_nn::{VarBuilder, VarMap};
    /// # fn main() -> Result<()> {
    /// # let (vars, generator) = (VarMap::new(), Arc::new(MaskGenerator::new(1)));
    /// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// # let config = MultiHeadAttentionConfig { hidden_size: 8, num_heads: 2, ..Default::default() };
    /// let [q, k, v, o] = ["query", "key", "value", "out"].map(|name| vb.pp(name));
    /// let layer = MultiHeadAttention::from_qkv(&config, generator, [q, k, v], o)?;
    /// # let xs = Tensor::ones((2, 3, 8), DType::F32, &Device::Cpu)?;
    /// # assert_eq!(layer.forward(&xs, true)?.dims(), [2, 3, 8]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn from_qkv(
        config: &MultiHeadAttentionConfig,
        generator: Arc<MaskGenerator>,
        qkv: [VarBuilder; 3],
        o: VarBuilder,
    ) -> Result<Self> {
        let name =
            name_at(NAME, &common_path([&qkv[0], &qkv[1], &qkv[2], &o].map(VarBuilder::prefix)));
        let sizes = Sizes::new(&name, config)?;
        let [q, k, v] = qkv;
        let project = |heads: usize, vb: VarBuilder| {
            linear_b(sizes.hidden_size, heads * sizes.head_dim, config.bias, vb)
        };
        let projections = Projections::Apart([
            project(sizes.num_heads, q)?,
            project(sizes.num_kv_heads, k)?,
            project(sizes.num_kv_heads, v)?,
        ]);
        Self::of(name, config, sizes, generator, projections, o)
    }

    fn of(
        name: String,
        config: &MultiHeadAttentionConfig,
        sizes: Sizes,
        generator: Arc<MaskGenerator>,
        projections: Projections,
        o: VarBuilder,
    ) -> Result<Self> {
        let drop = Site::new(config.drop_p, generator).checked(&name)?;
        let o_proj = linear_b(sizes.num_heads * sizes.head_dim, sizes.hidden_size, config.bias, o)?;
        let attention = config.attention.clone();
        Ok(Self { name, projections, o_proj, sizes, attention, drop })
    }

    /// The drop probability of the attention weights, or of keys.
    pub fn drop_p(&self) -> f32 {
        self.drop.drop_p()
    }

    /// Changes the drop probability; an f64 is rounded to f32.
    ///
    /// # Errors
    /// `drop_p` is no probability, or the layer follows a schedule; it keeps the rate that it had.
    pub fn set_drop_p(&mut self, drop_p: impl Into<f64>) -> Result<()> {
        self.drop.set_drop_p(&self.name, drop_p)
    }

    /// The same layer, whose rate is that of a schedule at each step.
    pub fn following(self, rate: &ScheduledRate) -> Self {
        Self { drop: self.drop.following(rate), ..self }
    }

    /// Attends within each sequence; drops weights, or keys, if `train` is true.
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
        let Sizes { hidden_size, num_heads, num_kv_heads, head_dim } = self.sizes;
        let (b, s) = match *xs.dims() {
            [b, s, width] if width == hidden_size => (b, s),
            _ => bail!(
                "{}: xs: expected [B, S, hidden_size] with hidden_size = {hidden_size}, got {:?}; reshape it",
                self.name,
                xs.dims()
            ),
        };
        let y = match &self.projections {
            Projections::Joint(qkv) => {
                let heads = num_heads + 2 * num_kv_heads;
                let qkv = qkv.forward(xs)?.reshape((b, s, heads, head_dim))?; // [B, S, H + 2 Hkv, D]
                let drop = self.drop.next_mask(&self.name, train)?;
                attention_qkv(&qkv, num_heads, config, &drop)? // [B, S, H, D]
            }
            Projections::Apart([q, k, v]) => {
                let heads = |projection: &Linear, heads: usize| {
                    projection.forward(xs)?.reshape((b, s, heads, head_dim))?.transpose(1, 2)
                };
                let (q, k, v) =
                    (heads(q, num_heads)?, heads(k, num_kv_heads)?, heads(v, num_kv_heads)?);
                let drop = self.drop.next_mask(&self.name, train)?;
                attention(&q, &k, &v, config, &drop)?.transpose(1, 2)? // [B, S, H, D]
            }
        };
        self.o_proj.forward(&y.reshape((b, s, num_heads * head_dim))?) // [B, S, C]
    }
}

module_methods!(MultiHeadAttention);

/// The path that all of these begin with.
fn common_path(paths: [String; 4]) -> String {
    let [first, others @ ..] = paths.each_ref().map(|path| path.split('.').collect::<Vec<_>>());
    let is_common = |at: &usize| others.iter().all(|other| other.get(*at) == first.get(*at));
    let common = (0..first.len()).take_while(is_common).count();
    first[..common].join(".")
}

impl Sizes {
    fn new(name: &str, config: &MultiHeadAttentionConfig) -> Result<Self> {
        let (hidden_size, num_heads) = (config.hidden_size, config.num_heads);
        let num_kv_heads = config.num_kv_heads.unwrap_or(num_heads);
        let sizes = [
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
        ];
        for (field, size) in sizes.into_iter().chain([("head_dim", config.head_dim.unwrap_or(1))]) {
            if size == 0 {
                bail!("{name}: {field}: expected at least 1, got 0; give the size of the model")
            }
        }
        if config.head_dim.is_none() && !hidden_size.is_multiple_of(num_heads) {
            bail!(
                "{name}: hidden_size: expected a multiple of num_heads = {num_heads}, got {hidden_size}; \
                 change one of the two, or set head_dim"
            )
        }
        if !num_heads.is_multiple_of(num_kv_heads) {
            bail!(
                "{name}: num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}; None means \
                 as many"
            )
        }
        let head_dim = config.head_dim.unwrap_or(hidden_size / num_heads);
        Ok(Self { hidden_size, num_heads, num_kv_heads, head_dim })
    }
}
