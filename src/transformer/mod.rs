//! A Transformer in the style of GPT-2 or of LLaMA, whose every dropout is one of this crate's ops.
//!
//! A pre-norm decoder (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners";
//! Touvron et al. 2023, arXiv 2302.13971; stochastic depth after Huang et al. 2016, arXiv
//! 1603.09382). The styles share attention, residual branches and generation; they differ in norm,
//! positions, MLP and in the names and layout of their weights, which are those of Hugging Face.
//!
//! Shapes: `B` sequences of `T` tokens, `C = hidden_size`, `H` heads of `D` elements, `Hkv` heads
//! of keys and values, `S` keys (`T`, or more with a cache), `I` columns inside the MLP, `V` tokens
//! in the vocabulary.
//!
//! One text, though long: it is read from the tokens to the logits, a shape on each line. Names and
//! layouts of the weights are in `weights.rs`, the ops in `functions.rs`, fused or not.

mod config;
mod functions;
mod generate;
mod hf_config;
mod unfused;
mod weights;

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use candle_nn::kv_cache::KvCache;

use crate::functional::{Activation, AttentionConfig, Norm, RopeStyle, attention, attention_qkv};
use crate::layers::{DropPath, Dropout, Rope, RopeConfig, ScheduledRate};
use crate::mask::{DropMask, MaskGenerator};
use crate::vars::from_checkpoint;
use functions::{FUSED, Functions, Joint, MATERIALISED, Stream};
use unfused::UNFUSED;
use weights::{BlockWeights, Projection, Projections, Weights};

pub use config::{Architecture, TransformerConfig};
pub use generate::GenerationConfig;

/// One pass through the model: by which functions, and whether it drops anything.
#[derive(Clone, Copy)]
struct Pass {
    functions: &'static Functions,
    train: bool,
}

/// Where the residual stream begins: `x = dropout(token + position)`.
#[derive(Debug)]
struct Embedding {
    tokens: Tensor,            // [V, C]
    positions: Option<Tensor>, // [max_positions, C]
    drop: Dropout,
    norm: Norm,
}

impl Embedding {
    /// `x` and `norm(x)`, `[B, T, C]` each, of tokens `[B, T]` at the positions from `start` on.
    fn forward(&self, ids: &Tensor, start: usize, pass: Pass) -> Result<Stream> {
        let (b, t) = ids.dims2()?;
        let e = self.tokens.index_select(&ids.flatten_all()?, 0)?; // [B*T, C]
        let mut e = e.reshape((b, t, ()))?; // [B, T, C]
        if let Some(positions) = &self.positions {
            e = e.broadcast_add(&positions.narrow(0, start, t)?)?; // [B, T, C]
        }
        let drop = self.drop.next_mask(pass.train)?;
        (pass.functions.embed)(&e, &self.norm, &drop)
    }
}

/// Where a branch joins the residual stream, `z = residual + drop_path(dropout(x W + b))`, and the
/// norm through which the branch after it sees the stream.
#[derive(Debug)]
struct ResidualBranch {
    proj: Projection,
    drop: Dropout,
    drop_path: DropPath,
    norm: Norm,
}

impl ResidualBranch {
    /// `z` and `norm(z)`, `[B, T, C]` each.
    fn forward(&self, x: &Tensor, residual: &Tensor, pass: Pass) -> Result<Stream> {
        let joint = Joint {
            bias: self.proj.bias.as_ref(),
            drop: self.drop.next_mask(pass.train)?,
            drop_path: self.drop_path.next_mask(pass.train)?,
            residual,
            norm: &self.norm,
        };
        let y = self.proj.matmul(x, pass.functions)?; // [B, T, C]
        (pass.functions.residual)(&y, &joint) // [B, T, C] each
    }
}

/// Grouped-query attention: `H / Hkv` heads of queries share one of keys and values.
#[derive(Debug)]
struct Attention {
    qkv: Projections<3>,
    qk_norms: Option<[Norm; 2]>,
    rope: Option<Rope>,
    /// Tokens that a query sees; `None`: all up to itself.
    window: Option<usize>,
    drop: Dropout,
    out: ResidualBranch,
    heads: usize,
    kv_heads: usize,
    head_size: usize,
}

impl Attention {
    /// Each token sees itself and those before it, as far as its window reaches.
    fn config(&self) -> AttentionConfig {
        let window = self.window.map(|window| (window - 1, 0));
        AttentionConfig { causal: true, window, ..Default::default() }
    }

    /// The stream after this branch, from that before it.
    fn forward(&self, (x, n): &Stream, cache: Option<&mut KvCache>, pass: Pass) -> Result<Stream> {
        let ((b, t, _), flash) = (n.dims3()?, pass.functions.flash);
        if let (true, None, None, Projections::Joined(qkv)) = (flash, &self.rope, &cache, &self.qkv)
        {
            let qkv = qkv.forward(n, pass.functions)?; // [B, T, (H + 2 Hkv) D]
            let qkv = qkv.reshape((b, t, (), self.head_size))?; // [B, T, H + 2 Hkv, D]
            let (config, drop) = (self.config(), self.drop.next_mask(pass.train)?);
            let y = attention_qkv(&qkv, self.heads, &config, &drop)?; // [B, T, H, D]
            return self.out.forward(&y.reshape((b, t, ()))?, x, pass);
        }
        let [q, k, v] = self.queries_keys_values(n, pass)?; // [B, H, T, D], [B, Hkv, T, D] twice
        let start = cache.as_ref().map_or(0, |cache| cache.current_seq_len());
        let (q, k) = (self.rotate(q, start, pass)?, self.rotate(k, start, pass)?);
        let (k, v) = match cache {
            Some(cache) => {
                let (k, v) = cache.append(&k.contiguous()?, &v.contiguous()?)?; // [B, Hkv, S, D] each
                (self.seen(k, t)?, self.seen(v, t)?)
            }
            None => (k, v),
        };
        let drop = self.drop.next_mask(pass.train)?;
        // One query has no tiles, and its scores are no longer than its keys.
        let y = match flash && t > 1 {
            true => attention(&q, &k, &v, &self.config(), &drop)?, // [B, H, T, D]
            false => self.attend([&q, &k.contiguous()?, &v.contiguous()?], &drop, pass)?, // [B, H, T, D]
        };
        let y = y.transpose(1, 2)?.reshape((b, t, ()))?; // [B, T, H D]
        self.out.forward(&y, x, pass)
    }

    /// Of cached keys or values `[B, Hkv, S, D]`, those that any of the last `t` queries sees.
    fn seen(&self, x: Tensor, t: usize) -> Result<Tensor> {
        let s = x.dim(2)?;
        match self.window.map(|window| window.saturating_add(t - 1)) {
            Some(seen) if seen < s => x.narrow(2, s - seen, seen),
            _ => Ok(x),
        }
    }

    /// `[B, H, T, D]`, and `[B, Hkv, T, D]` twice.
    fn queries_keys_values(&self, n: &Tensor, pass: Pass) -> Result<[Tensor; 3]> {
        let (b, t, _) = n.dims3()?;
        let heads = |proj: &Projection| {
            let y = proj.forward(n, pass.functions)?; // [B, T, .. D]
            y.reshape((b, t, (), self.head_size)) // [B, T, .., D]
        };
        let (h, hkv) = (self.heads, self.kv_heads);
        let [mut q, mut k, v] = match &self.qkv {
            Projections::Apart([q, k, v]) => [heads(q)?, heads(k)?, heads(v)?],
            Projections::Joined(qkv) => {
                let qkv = heads(qkv)?; // [B, T, H + 2 Hkv, D]
                [qkv.narrow(2, 0, h)?, qkv.narrow(2, h, hkv)?, qkv.narrow(2, h + hkv, hkv)?]
            }
        };
        if let Some([q_norm, k_norm]) = &self.qk_norms {
            q = (pass.functions.norm)(q_norm, &q)?; // [B, T, H, D]
            k = (pass.functions.norm)(k_norm, &k)?; // [B, T, Hkv, D]
        }
        Ok([q.transpose(1, 2)?, k.transpose(1, 2)?, v.transpose(1, 2)?])
    }

    /// Queries or keys, turned to their positions from `start` on.
    fn rotate(&self, x: Tensor, start: usize, pass: Pass) -> Result<Tensor> {
        match &self.rope {
            Some(rope) => (pass.functions.rotate)(rope, &x, start),
            None => Ok(x),
        }
    }

    /// `dropout(softmax(q k' / sqrt(D) + mask)) v`, `[B, H, T, D]`.
    fn attend(&self, [q, k, v]: [&Tensor; 3], drop: &DropMask, pass: Pass) -> Result<Tensor> {
        let (b, h, t, d) = q.dims4()?;
        let (kv_heads, s) = (k.dim(1)?, k.dim(2)?);
        let scale = 1.0 / (d as f64).sqrt();
        // Queries that share their keys are the rows of one matrix.
        let rows = h / kv_heads * t;
        let q = q.reshape((b, kv_heads, rows, d))?;
        let scores = q.matmul(&k.t()?)?.reshape((b, h, t, s))?; // [B, H, T, S]
        let weights = (pass.functions.weights)(&scores, scale, self.window, drop)?; // [B, H, T, S]
        weights.reshape((b, kv_heads, rows, s))?.matmul(v)?.reshape((b, h, t, d))
    }
}

/// `act(n W + b) W' + b'`, gated or not.
#[derive(Debug)]
struct Mlp {
    /// Gate and values, or the one projection of an MLP without a gate.
    up: Projections<2>,
    act: Activation,
    down: ResidualBranch,
}

impl Mlp {
    /// The stream after this branch, from that before it.
    fn forward(&self, (x, n): &Stream, pass: Pass) -> Result<Stream> {
        self.down.forward(&self.hidden(n, pass.functions)?, x, pass)
    }

    /// `[B, T, I]`.
    fn hidden(&self, n: &Tensor, functions: &Functions) -> Result<Tensor> {
        match &self.up {
            Projections::Joined(up) => {
                let h = up.matmul(n, functions)?; // [B, T, I] or [B, T, 2 I]
                (functions.activate)(&h, up.bias.as_ref(), self.act)
            }
            Projections::Apart([gate, up]) => {
                let (gate, up) = (gate.forward(n, functions)?, up.forward(n, functions)?); // [B, T, I] each
                (functions.gate)(&gate, &up, self.act)
            }
        }
    }
}

#[derive(Debug)]
struct Block {
    attn: Attention,
    mlp: Mlp,
}

impl Block {
    /// Block `layer` of `1..=num_hidden_layers`; `next` is the norm of what follows it.
    fn new(
        config: &TransformerConfig,
        layer: usize,
        weights: BlockWeights,
        next: Norm,
        rope: Option<Rope>,
        generator: &Arc<MaskGenerator>,
    ) -> Result<Self> {
        let drop = |drop_p| Dropout::with_generator(drop_p, generator.clone());
        let branch = |proj, norm| -> Result<ResidualBranch> {
            let (n_layer, last_drop_p) = (config.num_hidden_layers, config.drop_path_rate);
            let drop_path = DropPath::linear(layer, n_layer, last_drop_p, generator.clone())?;
            Ok(ResidualBranch { proj, drop: drop(config.resid_pdrop)?, drop_path, norm })
        };
        let attn = Attention {
            qkv: weights.qkv,
            qk_norms: weights.qk_norms,
            rope,
            window: config.window(layer - 1),
            drop: drop(config.attn_pdrop)?,
            out: branch(weights.attn_out, weights.norm_2)?,
            heads: config.num_attention_heads,
            kv_heads: config.kv_heads(),
            head_size: config.head_size(),
        };
        let down = branch(weights.mlp_out, next)?;
        Ok(Self { attn, mlp: Mlp { up: weights.up, act: config.hidden_act, down } })
    }

    /// The stream after this block, from that before it.
    fn forward(&self, stream: &Stream, cache: Option<&mut KvCache>, pass: Pass) -> Result<Stream> {
        let stream = self.attn.forward(stream, cache, pass)?; // [B, T, C] each
        self.mlp.forward(&stream, pass) // [B, T, C] each
    }
}

/// The rates of a [`Transformer`] that follow schedules, under their names in its configuration; what is absent stays
/// as it is there.
#[derive(Clone, Debug, Default)]
pub struct TransformerRates {
    /// Of the embedding.
    pub embd_pdrop: Option<ScheduledRate>,
    /// Of the attention weights.
    pub attn_pdrop: Option<ScheduledRate>,
    /// Of the residual branches.
    pub resid_pdrop: Option<ScheduledRate>,
    /// Of stochastic depth in the last layer; the others have their share of it.
    pub drop_path_rate: Option<ScheduledRate>,
}

/// A language model in the style of GPT-2 or of LLaMA.
///
/// Dropout at the embedding, the attention weights and both residual branches, stochastic depth per
/// sample on the branches; rates come from [`TransformerConfig`]. The model owns its generator, so
/// models trained side by side do not disturb one another's masks. Every call with `train` draws
/// `1 + 5 num_hidden_layers` keys whatever the rates are, a call without draws none.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Result, Tensor};
/// use candle_dropout::{MaskGenerator, Transformer, TransformerConfig, seeded_var_builder};
/// use candle_nn::VarMap;
///
/// # fn main() -> Result<()> {
/// let config = TransformerConfig {
///     vocab_size: 256,
///     max_position_embeddings: 8,
///     hidden_size: 16,
///     num_hidden_layers: 2,
///     num_attention_heads: 4,
///     ..TransformerConfig::gpt2()
/// };
/// let vars = VarMap::new();
/// let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
/// let model = Transformer::new(&config, Arc::new(MaskGenerator::new(2)), vb)?;
///
/// let ids = Tensor::new(&[[104u32, 101, 108, 108, 111]], &Device::Cpu)?;
/// assert_eq!(model.forward(&ids, true)?.dims(), &[1, 5, 256]);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Transformer {
    functions: &'static Functions,
    embedding: Embedding,
    blocks: Vec<Block>,
    head: Tensor, // [V, C]
    max_positions: usize,
}

impl Transformer {
    /// Builds the model from the variables of `vb`, creating those that do not exist.
    ///
    /// They have the names that Hugging Face gives them: GPT-2's with or without the prefix
    /// `transformer.`, LLaMA's with or without `model.`, whichever `vb` holds; new ones are
    /// GPT-2's without and LLaMA's with it. A tied head that `vb` holds beside the embedding is used,
    /// and one that it holds alone is the embedding too. Projections that share an input and track no
    /// gradient are joined for speed, and so copied.
    ///
    /// # Errors
    /// `config` is invalid (see [`TransformerConfig::validate`]), or `vb` lacks a variable or holds
    /// one of another shape.
    pub fn new(
        config: &TransformerConfig,
        generator: Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Self> {
        config.validate()?;
        let (dtype, device) = (vb.dtype(), vb.device().clone());
        let Weights { tokens, positions, blocks, norm, head } = Weights::new(config, vb)?;
        // After the weights: they have checked the sizes that the configuration claims.
        let rope = match config.architecture {
            Architecture::Gpt2 => None,
            Architecture::Llama => {
                let rope = RopeConfig {
                    head_size: config.head_size(),
                    max_positions: config.max_position_embeddings,
                    theta: config.rope_theta,
                    scaling: config.rope_scaling,
                    style: RopeStyle::HalfSplit,
                };
                Some(Rope::new(&rope, dtype, &device)?)
            }
        };
        // Whatever writes to the stream owns the norm through which the next part sees it.
        let norms: Vec<Norm> =
            blocks.iter().map(|block| block.norm_1.clone()).chain([norm]).collect();
        let drop = Dropout::with_generator(config.embd_pdrop, generator.clone())?;
        let embedding = Embedding { tokens, positions, drop, norm: norms[0].clone() };
        let block = |(at, weights): (usize, BlockWeights)| {
            Block::new(config, at + 1, weights, norms[at + 1].clone(), rope.clone(), &generator)
        };
        Ok(Self {
            functions: match (config.fused, config.flash_attention) {
                (true, true) => &FUSED,
                (true, false) => &MATERIALISED,
                (false, _) => &UNFUSED,
            },
            embedding,
            blocks: blocks.into_iter().enumerate().map(block).collect::<Result<_>>()?,
            head,
            max_positions: config.max_position_embeddings,
        })
    }

    /// The same model, with rates that follow schedules: a training loop sets the step of their clock.
    ///
    /// # Example
    /// ```
    /// # use std::sync::Arc;
    /// # use candle_core::{DType, Device, Result};
    /// use candle_dropout::{
    ///     MaskGenerator, RateClock, RateSchedule, Transformer, TransformerConfig, TransformerRates,
    ///     seeded_var_builder,
    /// };
    /// # use candle_nn::VarMap;
    /// # fn main() -> Result<()> {
    /// # let config = TransformerConfig {
    /// #     vocab_size: 16, max_position_embeddings: 8, hidden_size: 8, num_hidden_layers: 2,
    /// #     num_attention_heads: 2, ..TransformerConfig::gpt2()
    /// # };
    /// # let (map, masks) = (VarMap::new(), Arc::new(MaskGenerator::new(42)));
    /// # let vb = seeded_var_builder(&map, 42, DType::F32, &Device::Cpu);
    /// let clock = RateClock::new();
    /// let rates = TransformerRates {
    ///     resid_pdrop: Some(clock.rate(RateSchedule::early(0.1, 1000)?)),
    ///     ..Default::default()
    /// };
    /// let model = Transformer::new(&config, masks, vb)?.following(&rates)?;
    /// # let _ = model;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// None but those of [`ScheduledRate::at_layer`], which layers that are there do not meet.
    pub fn following(mut self, rates: &TransformerRates) -> Result<Self> {
        let n_layer = self.blocks.len();
        if let Some(rate) = &rates.embd_pdrop {
            self.embedding.drop = self.embedding.drop.following(rate);
        }
        for (at, block) in self.blocks.iter_mut().enumerate() {
            if let Some(rate) = &rates.attn_pdrop {
                block.attn.drop = block.attn.drop.clone().following(rate);
            }
            for branch in [&mut block.attn.out, &mut block.mlp.down] {
                if let Some(rate) = &rates.resid_pdrop {
                    branch.drop = branch.drop.clone().following(rate);
                }
                if let Some(rate) = &rates.drop_path_rate {
                    let rate = rate.at_layer(at + 1, n_layer)?;
                    branch.drop_path = branch.drop_path.clone().following(&rate);
                }
            }
        }
        Ok(self)
    }

    /// A published model, for use: its weights are constants. To train it on, see
    /// [`pretrained_var_builder`](crate::pretrained_var_builder).
    ///
    /// # Errors
    /// Those of [`TransformerConfig::from_pretrained`] and
    /// [`pretrained_var_builder`](crate::pretrained_var_builder), and of [`new`](Self::new): the file
    /// lacks a weight, holds one of another shape, or one that this model does not have (see
    /// [`check_pretrained_vars`](crate::check_pretrained_vars)).
    pub fn from_pretrained(dir: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        let config = TransformerConfig::from_pretrained(&dir)?;
        let masks = Arc::new(MaskGenerator::new(0));
        from_checkpoint(dir, dtype, device, |vb| Self::new(&config, masks, vb))
    }

    /// Logits of the next token at every position.
    ///
    /// # Shapes
    /// `ids [B, T]` of u32, `T <= max_position_embeddings` -> logits `[B, T, vocab_size]`.
    ///
    /// # Randomness
    /// With `train`, one key a dropout site, in the order embedding, then for each block attention
    /// weights, residual dropout and stochastic depth of the attention branch, residual dropout and
    /// stochastic depth of the MLP branch.
    ///
    /// # Errors
    /// `ids` is not `[B, T]`, is empty or is longer than `max_position_embeddings`; on the CPU also
    /// if it holds a token outside the vocabulary.
    ///
    /// On CUDA candle looks tokens up without asking the host: one outside the vocabulary fails an
    /// assertion in the kernel, a later call that waits for the device reports it, and nothing runs
    /// on that device any more until the process restarts. Check tokens of unknown origin on the
    /// host, as [`generate`](Self::generate) does. On every device candle takes `u32::MAX` for "no
    /// token", whose embedding is zero.
    pub fn forward(&self, ids: &Tensor, train: bool) -> Result<Tensor> {
        self.logits(&self.hidden(ids, &mut [], train)?)
    }

    /// Empty caches of keys and values, one a block, with room for `capacity` tokens; they grow by
    /// as much when full.
    pub fn kv_caches(&self, capacity: usize) -> Vec<KvCache> {
        self.blocks.iter().map(|_| KvCache::new(2, capacity.max(1))).collect()
    }

    /// Logits of the token that follows `ids`, which follow the tokens in the caches and are added
    /// to them. No dropout is applied. It is made for generation: no gradient passes through cached
    /// keys and values, so train with [`forward`](Self::forward).
    ///
    /// # Shapes
    /// `ids [B, T]` of u32 with the `B` of the caches -> logits `[B, vocab_size]`.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward), where `T` counts the cached tokens too; `caches` is not
    /// one a block, see [`kv_caches`](Self::kv_caches). Reset them after an error.
    ///
    /// # Example
    /// ```
    /// # use std::sync::Arc;
    /// # use candle_core::{DType, Device, Result, Tensor};
    /// # use candle_dropout::{MaskGenerator, Transformer, TransformerConfig, seeded_var_builder};
    /// # fn main() -> Result<()> {
    /// # let config = TransformerConfig {
    /// #     vocab_size: 9,
    /// #     max_position_embeddings: 8,
    /// #     hidden_size: 8,
    /// #     num_hidden_layers: 1,
    /// #     num_attention_heads: 2,
    /// #     ..TransformerConfig::gpt2()
    /// # };
    /// # let vb = seeded_var_builder(&candle_nn::VarMap::new(), 1, DType::F32, &Device::Cpu);
    /// # let model = Transformer::new(&config, Arc::new(MaskGenerator::new(2)), vb)?;
    /// let mut caches = model.kv_caches(8);
    /// let mut ids = vec![3u32, 1, 4];
    /// for _ in 0..5 {
    ///     let new = &ids[caches[0].current_seq_len()..];
    ///     let new = Tensor::new(new, &Device::Cpu)?.unsqueeze(0)?;
    ///     let logits = model.forward_cached(&new, &mut caches)?;
    ///     ids.push(logits.squeeze(0)?.argmax(0)?.to_scalar()?);
    /// }
    /// assert_eq!(ids.len(), 8);
    /// # Ok(()) }
    /// ```
    pub fn forward_cached(&self, ids: &Tensor, caches: &mut [KvCache]) -> Result<Tensor> {
        if caches.len() != self.blocks.len() {
            bail!(
                "transformer: caches: expected {}, one a block, got {}: make them with `kv_caches`",
                self.blocks.len(),
                caches.len()
            )
        }
        let cached = caches.first().and_then(|cache| cache.k_cache().all_data().as_ref());
        if let Some(cached) = cached
            && cached.dim(0)? != ids.dim(0)?
        {
            bail!(
                "transformer: ids: expected {} sequences like the caches hold, got {:?}: reset the \
                 caches for another batch",
                cached.dim(0)?,
                ids.dims()
            )
        }
        let n = self.hidden(ids, caches, false)?; // [B, T, C]
        let last = n.narrow(1, n.dim(1)? - 1, 1)?; // [B, 1, C]
        self.logits(&last)?.squeeze(1) // [B, V]
    }

    /// What the head sees, `[B, T, C]`. Without caches, all there is to see is `ids`.
    fn hidden(&self, ids: &Tensor, caches: &mut [KvCache], train: bool) -> Result<Tensor> {
        let ((b, t), max_positions) = (ids.dims2()?, self.max_positions);
        let start = caches.first().map_or(0, |cache| cache.current_seq_len());
        if b == 0 || t == 0 || start + t > max_positions {
            bail!(
                "transformer: ids: expected [B, T] with B >= 1, T >= 1 and {start} cached + T <= \
                 max_position_embeddings = {max_positions}, got [{b}, {t}]"
            )
        }
        let pass = Pass { functions: self.functions, train };
        let mut stream = self.embedding.forward(ids, start, pass)?; // [B, T, C] each
        for (at, block) in self.blocks.iter().enumerate() {
            stream = block.forward(&stream, caches.get_mut(at), pass)?; // [B, T, C] each
        }
        Ok(stream.1)
    }

    /// `[B, T, C] -> [B, T, V]`.
    fn logits(&self, n: &Tensor) -> Result<Tensor> {
        (self.functions.linear)(n, &self.head.t()?, None)
    }

    fn vocab_size(&self) -> Result<usize> {
        self.embedding.tokens.dim(0)
    }

    fn device(&self) -> &Device {
        self.embedding.tokens.device()
    }
}
