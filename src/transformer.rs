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

mod checkpoint;
mod config;
mod generate;

use std::sync::Arc;

use candle_core::{D, DType, Device, Module, Result, Tensor, bail};
use candle_nn::kv_cache::KvCache;
use candle_nn::{Init, VarBuilder, ops as nn_ops, rotary_emb::rope_slow};

use crate::layers::{DropPath, Dropout, Rope, RopeConfig};
use crate::mask::{DropMask, MaskGenerator};
use crate::ops::{
    Activation, AttentionConfig, AttentionMask, Norm, RopeStyle, activation_dropout, attention,
    attention_qkv, drop_path_add, dropout, dropout_add_norm, linear, softmax_dropout,
};

pub use checkpoint::pretrained_var_builder;
pub use config::{Architecture, TransformerConfig};
pub use generate::GenerationConfig;

/// A norm that a fused op may apply, or candle's chain of ops; candle-nn's own layers would end the
/// graph.
#[derive(Debug)]
struct BranchNorm {
    norm: Norm,
    fused: bool,
}

impl BranchNorm {
    fn new(config: &TransformerConfig, vb: VarBuilder) -> Result<Self> {
        let (c, eps) = (config.hidden_size, config.norm_eps);
        let weight = vb.get_with_hints(c, "weight", Init::Const(1.0))?;
        let norm = match config.architecture {
            Architecture::Gpt2 => {
                let bias = vb.get_with_hints(c, "bias", Init::Const(0.0))?;
                Norm::layer_norm(weight, Some(bias), eps)
            }
            Architecture::Llama => Norm::rms_norm(weight, eps),
        };
        Ok(Self { norm, fused: config.fused })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.fused {
            return self.norm.forward(x);
        }
        let (weight, eps) = (self.norm.weight(), self.norm.eps() as f32);
        match self.norm.bias() {
            Some(bias) => nn_ops::layer_norm_slow(x, weight, bias, eps),
            None => nn_ops::rms_norm_slow(x, weight, eps),
        }
    }
}

/// `y = x W + b`, with `W [in, out]`: GPT-2's layout, and a view of LLaMA's. The bias is apart: a
/// fused op may add it.
#[derive(Debug)]
struct Projection {
    weight: Tensor,
    bias: Option<Tensor>,
    fused: bool,
}

impl Projection {
    fn new(
        config: &TransformerConfig,
        (inputs, outputs): (usize, usize),
        (stdev, has_bias): (f64, bool),
        vb: VarBuilder,
    ) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev };
        let weight = match config.architecture {
            Architecture::Gpt2 => vb.get_with_hints((inputs, outputs), "weight", init)?,
            Architecture::Llama => vb.get_with_hints((outputs, inputs), "weight", init)?.t()?,
        };
        let bias = has_bias.then(|| vb.get_with_hints(outputs, "bias", Init::Const(0.0)));
        Ok(Self { weight, bias: bias.transpose()?, fused: config.fused })
    }

    /// Whether a gradient reaches any part of it: a bias may train beside a frozen weight.
    fn is_trained(&self) -> bool {
        self.weight.track_op() || self.bias.as_ref().is_some_and(Tensor::track_op)
    }

    /// One projection that gives the outputs of all, in this order.
    fn side_by_side(parts: &[Self]) -> Result<Self> {
        let weights: Vec<&Tensor> = parts.iter().map(|part| &part.weight).collect();
        let biases: Option<Vec<&Tensor>> = parts.iter().map(|part| part.bias.as_ref()).collect();
        let bias = biases.map(|biases| Tensor::cat(&biases, 0)).transpose()?;
        let fused = parts.iter().all(|part| part.fused);
        Ok(Self { weight: Tensor::cat(&weights, 1)?, bias, fused })
    }

    /// `x W`, `[B, T, in] -> [B, T, out]`, as one matrix product over all tokens.
    fn matmul(&self, x: &Tensor) -> Result<Tensor> {
        if self.fused {
            return linear(x, &self.weight, None);
        }
        let (b, t, c) = x.dims3()?;
        x.reshape((b * t, c))?.matmul(&self.weight)?.reshape((b, t, ()))
    }

    fn add_bias(&self, y: Tensor) -> Result<Tensor> {
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.fused {
            return linear(x, &self.weight, self.bias.as_ref());
        }
        self.add_bias(self.matmul(x)?)
    }
}

/// Projections of one input: one matrix product for all, or `N` that are trained by themselves.
#[derive(Debug)]
enum Projections<const N: usize> {
    Joined(Projection),
    Apart([Projection; N]),
}

impl<const N: usize> Projections<N> {
    /// Joins them, once and for all, if none is trained.
    fn new(parts: [Projection; N]) -> Result<Self> {
        match parts.iter().any(Projection::is_trained) {
            true => Ok(Self::Apart(parts)),
            false => Projection::side_by_side(&parts).map(Self::Joined),
        }
    }
}

/// Adds a branch to the residual stream, `z = residual + drop_path(dropout(x W + b))`, and
/// normalises the sum for the next branch.
#[derive(Debug)]
struct ResidualBranch {
    proj: Projection,
    drop: Dropout,
    drop_path: DropPath,
    fused: bool,
}

impl ResidualBranch {
    /// `z` and `next(z)`, `[B, T, C]` each.
    fn forward(
        &self,
        x: &Tensor,
        residual: &Tensor,
        next: &BranchNorm,
        train: bool,
    ) -> Result<(Tensor, Tensor)> {
        let (drop, drop_path) = (self.drop.next_mask(train)?, self.drop_path.next_mask(train)?);
        let skips_samples = !drop_path.is_none();
        let y = self.proj.matmul(x)?; // [B, T, C]
        if self.fused && !skips_samples {
            let (residual, bias) = (Some(residual), self.proj.bias.as_ref());
            return dropout_add_norm(&y, residual, bias, &next.norm, &drop);
        }
        let y = dropout(&self.proj.add_bias(y)?, &drop)?; // [B, T, C]
        let z = if !skips_samples {
            (residual + y)? // [B, T, C]
        } else if self.fused {
            drop_path_add(&y, residual, self.drop_path.mode(), &drop_path)? // [B, T, C]
        } else {
            let b = y.dim(0)?;
            let ones = Tensor::ones((1, b), y.dtype(), y.device())?;
            let keep = dropout(&ones, &drop_path)?; // [1, B]
            (residual + y.broadcast_mul(&keep.reshape((b, 1, 1))?)?)? // [B, T, C]
        };
        let n = next.forward(&z)?; // [B, T, C]
        Ok((z, n))
    }
}

/// Grouped-query attention: `H / Hkv` heads of queries share one of keys and values.
#[derive(Debug)]
struct Attention {
    qkv: Projections<3>,
    rope: Option<Rope>,
    drop: Dropout,
    out: ResidualBranch,
    heads: usize,
    kv_heads: usize,
    head_size: usize,
    fused: bool,
    /// Fused as a whole, and not the softmax alone.
    flash: bool,
}

/// Each token sees itself and those before it.
fn causal() -> AttentionConfig {
    AttentionConfig { causal: true, ..Default::default() }
}

impl Attention {
    fn forward(
        &self,
        (x, n): (&Tensor, &Tensor),
        next: &BranchNorm,
        cache: Option<&mut KvCache>,
        train: bool,
    ) -> Result<(Tensor, Tensor)> {
        let (b, t, _) = n.dims3()?;
        if let (true, None, None, Projections::Joined(qkv)) =
            (self.flash, &self.rope, &cache, &self.qkv)
        {
            let qkv = qkv.forward(n)?.reshape((b, t, (), self.head_size))?; // [B, T, H + 2 Hkv, D]
            let (config, drop) = (causal(), self.drop.next_mask(train)?);
            let y = attention_qkv(&qkv, self.heads, &config, &drop)?; // [B, T, H, D]
            return self.out.forward(&y.reshape((b, t, ()))?, x, next, train);
        }
        let [q, k, v] = self.queries_keys_values(n)?; // [B, H, T, D], [B, Hkv, T, D] twice
        let start = cache.as_ref().map_or(0, |cache| cache.current_seq_len());
        let (q, k) = (self.rotate(q, start)?, self.rotate(k, start)?);
        let (k, v) = match cache {
            Some(cache) => cache.append(&k.contiguous()?, &v.contiguous()?)?, // [B, Hkv, S, D] each
            None => (k, v),
        };
        let drop = self.drop.next_mask(train)?;
        // One query has no tiles, and its scores are no longer than its keys.
        let y = match self.flash && t > 1 {
            true => attention(&q, &k, &v, &causal(), &drop)?, // [B, H, T, D]
            false => self.attend(&q, &k.contiguous()?, &v.contiguous()?, &drop)?, // [B, H, T, D]
        };
        let y = y.transpose(1, 2)?.reshape((b, t, ()))?; // [B, T, H D]
        self.out.forward(&y, x, next, train)
    }

    /// `[B, H, T, D]`, and `[B, Hkv, T, D]` twice.
    fn queries_keys_values(&self, n: &Tensor) -> Result<[Tensor; 3]> {
        let (b, t, _) = n.dims3()?;
        let heads = |proj: &Projection| {
            let y = proj.forward(n)?.reshape((b, t, (), self.head_size))?; // [B, T, .., D]
            y.transpose(1, 2) // [B, .., T, D]
        };
        let qkv = match &self.qkv {
            Projections::Apart([q, k, v]) => return Ok([heads(q)?, heads(k)?, heads(v)?]),
            Projections::Joined(qkv) => heads(qkv)?, // [B, H + 2 Hkv, T, D]
        };
        let (h, hkv) = (self.heads, self.kv_heads);
        Ok([qkv.narrow(1, 0, h)?, qkv.narrow(1, h, hkv)?, qkv.narrow(1, h + hkv, hkv)?])
    }

    /// Queries or keys, turned to their positions from `start` on.
    fn rotate(&self, x: Tensor, start: usize) -> Result<Tensor> {
        let Some(rope) = &self.rope else { return Ok(x) };
        if self.fused {
            return rope.rotate(&x, start);
        }
        let (dtype, t) = (x.dtype(), x.dim(2)?);
        let angles = |table: &Tensor| table.narrow(0, start, t); // [T, D/2]
        let x = x.to_dtype(rope.cos().dtype())?;
        rope_slow(&x, &angles(rope.cos())?, &angles(rope.sin())?)?.to_dtype(dtype)
    }

    /// `dropout(softmax(q k' / sqrt(D) + causal mask)) v`, `[B, H, T, D]`.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, drop: &DropMask) -> Result<Tensor> {
        let (b, h, t, d) = q.dims4()?;
        let (kv_heads, s) = (k.dim(1)?, k.dim(2)?);
        // Queries that share their keys are the rows of one matrix.
        let rows = h / kv_heads * t;
        let q = q.reshape((b, kv_heads, rows, d))?;
        let scores = q.matmul(&k.t()?)?.reshape((b, h, t, s))?; // [B, H, T, S]
        let weights = self.weights(&scores, drop)?; // [B, H, T, S]
        weights.reshape((b, kv_heads, rows, s))?.matmul(v)?.reshape((b, h, t, d))
    }

    /// `dropout(softmax(scores / sqrt(D) + causal mask))`, `[B, H, T, S]`.
    fn weights(&self, scores: &Tensor, drop: &DropMask) -> Result<Tensor> {
        let scale = 1.0 / (self.head_size as f64).sqrt();
        if self.fused {
            return softmax_dropout(scores, scale, &AttentionMask::Causal, drop); // [B, H, T, S]
        }
        let (t, s) = (scores.dim(2)?, scores.dim(3)?);
        let is_future = |at: usize| at % s > at / s + s - t;
        let future: Vec<f32> =
            (0..t * s).map(|at| if is_future(at) { f32::NEG_INFINITY } else { 0.0 }).collect();
        let future = Tensor::from_vec(future, (t, s), scores.device())?; // [T, S]
        let future = future.to_dtype(scores.dtype())?;
        let scores = (scores * scale)?.broadcast_add(&future)?; // [B, H, T, S]
        dropout(&nn_ops::softmax(&scores, D::Minus1)?, drop) // [B, H, T, S]
    }
}

/// `act(n W + b) W' + b'`, gated or not.
#[derive(Debug)]
struct Mlp {
    /// Gate and values, or the one projection of an MLP without a gate.
    up: Projections<2>,
    down: ResidualBranch,
    act: Activation,
    fused: bool,
}

impl Mlp {
    fn forward(
        &self,
        (x, n): (&Tensor, &Tensor),
        next: &BranchNorm,
        train: bool,
    ) -> Result<(Tensor, Tensor)> {
        self.down.forward(&self.hidden(n)?, x, next, train) // [B, T, C] each
    }

    /// `[B, T, I]`.
    fn hidden(&self, n: &Tensor) -> Result<Tensor> {
        let (b, t, c) = n.dims3()?;
        let joined;
        let up = match &self.up {
            Projections::Joined(up) => up,
            // Few tokens: what they give is copied side by side, not the weights.
            Projections::Apart([gate, up]) if b * t < c => {
                let h = Tensor::cat(&[gate.forward(n)?, up.forward(n)?], D::Minus1)?;
                return self.activate(h, None);
            }
            Projections::Apart(parts) => {
                joined = Projection::side_by_side(parts)?;
                &joined
            }
        };
        self.activate(up.matmul(n)?, up.bias.as_ref())
    }

    /// `act(h + bias)`, `[B, T, I]`; `h` is `[B, T, I]`, or `[B, T, 2 I]` of gate and values.
    fn activate(&self, h: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if self.fused {
            return activation_dropout(&h, bias, self.act, &DropMask::none());
        }
        match bias {
            Some(bias) => activate(&h.broadcast_add(bias)?, self.act),
            None => activate(&h, self.act),
        }
    }
}

/// An activation from candle's own ops.
fn activate(h: &Tensor, act: Activation) -> Result<Tensor> {
    let gated = |gate: fn(&Tensor) -> Result<Tensor>| {
        let half = h.dim(D::Minus1)? / 2;
        gate(&h.narrow(D::Minus1, 0, half)?)? * h.narrow(D::Minus1, half, half)?
    };
    match act {
        Activation::GeluTanh => gelu(h),
        Activation::GeluErf => h.gelu_erf(),
        Activation::Silu => h.silu(),
        Activation::Relu => h.relu(),
        Activation::SwiGlu => gated(Tensor::silu),
        Activation::GeGlu => gated(gelu),
    }
}

/// GELU's tanh form (Hendrycks & Gimpel 2016, arXiv 1606.08415), written `x sigmoid(2 u)` for the
/// same `u = sqrt(2 / pi) (x + 0.044715 x^3)`: candle's own evaluates tanh and powers one element
/// at a time, which took 40 % of a training step on the CPU.
///
/// Halves are computed in f32: the square of an f16 above 255 is infinite, and the gradient then no
/// number.
fn gelu(x: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = if dtype == DType::F64 { x.clone() } else { x.to_dtype(DType::F32)? };
    let twice = 2.0 * std::f64::consts::FRAC_2_PI.sqrt();
    let s = nn_ops::sigmoid(&(&x * x.sqr()?.affine(0.044715 * twice, twice)?)?)?;
    (x * s)?.to_dtype(dtype)
}

#[derive(Debug)]
struct Block {
    norm_1: BranchNorm,
    attn: Attention,
    norm_2: BranchNorm,
    mlp: Mlp,
}

impl Block {
    /// Block `layer` of `1..=num_hidden_layers`.
    fn new(
        config: &TransformerConfig,
        layer: usize,
        generator: &Arc<MaskGenerator>,
        rope: Option<Rope>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (c, i, n_layer) = (config.hidden_size, config.mlp_size(), config.num_hidden_layers);
        let (heads, kv_heads, d) =
            (config.num_attention_heads, config.kv_heads(), config.head_size());
        let (q, kv) = (heads * d, kv_heads * d);
        let (stdev, fused) = (config.initializer_range, config.fused);
        let input = |name: &str, outputs, has_bias| {
            Projection::new(config, (c, outputs), (stdev, has_bias), vb.pp(name))
        };
        let attn_in = |name, outputs| input(name, outputs, config.attention_bias);
        let mlp_in = |name| input(name, i, config.mlp_bias);
        let (qkv, up) = match config.architecture {
            Architecture::Gpt2 => (
                Projections::Joined(attn_in("attn.c_attn", q + 2 * kv)?),
                Projections::Joined(mlp_in("mlp.c_fc")?),
            ),
            Architecture::Llama => (
                Projections::new([
                    attn_in("self_attn.q_proj", q)?,
                    attn_in("self_attn.k_proj", kv)?,
                    attn_in("self_attn.v_proj", kv)?,
                ])?,
                Projections::new([mlp_in("mlp.gate_proj")?, mlp_in("mlp.up_proj")?])?,
            ),
        };
        let drop = |drop_p| Dropout::with_generator(drop_p, generator.clone());
        let output = |name: &str, inputs, has_bias| -> Result<ResidualBranch> {
            let stdev = stdev / ((2 * n_layer) as f64).sqrt();
            let last_drop_p = config.drop_path_rate;
            Ok(ResidualBranch {
                proj: Projection::new(config, (inputs, c), (stdev, has_bias), vb.pp(name))?,
                drop: drop(config.resid_pdrop),
                drop_path: DropPath::linear(layer, n_layer, last_drop_p, generator.clone())?,
                fused,
            })
        };
        let ([norm_1, norm_2], [attn_out, mlp_out]) = match config.architecture {
            Architecture::Gpt2 => (["ln_1", "ln_2"], ["attn.c_proj", "mlp.c_proj"]),
            Architecture::Llama => (
                ["input_layernorm", "post_attention_layernorm"],
                ["self_attn.o_proj", "mlp.down_proj"],
            ),
        };
        let attn = Attention {
            qkv,
            rope,
            drop: drop(config.attn_pdrop),
            out: output(attn_out, q, config.attention_bias)?,
            heads,
            kv_heads,
            head_size: d,
            fused,
            flash: fused && config.flash_attention,
        };
        let down = output(mlp_out, i, config.mlp_bias)?;
        let mlp = Mlp { up, down, act: config.hidden_act, fused };
        let norm = |name| BranchNorm::new(config, vb.pp(name));
        Ok(Self { norm_1: norm(norm_1)?, attn, norm_2: norm(norm_2)?, mlp })
    }

    /// The stream `x` and its norm `n`, of this block and then of what follows it, `[B, T, C]`
    /// each.
    fn forward(
        &self,
        (x, n): (Tensor, Tensor),
        next: &BranchNorm,
        cache: Option<&mut KvCache>,
        train: bool,
    ) -> Result<(Tensor, Tensor)> {
        let (x, n) = self.attn.forward((&x, &n), &self.norm_2, cache, train)?; // [B, T, C] each
        self.mlp.forward((&x, &n), next, train) // [B, T, C] each
    }
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
    tokens: Tensor,            // [V, C]
    positions: Option<Tensor>, // [max_positions, C]
    drop: Dropout,
    blocks: Vec<Block>,
    norm: BranchNorm,
    head: Tensor, // [V, C]
    max_positions: usize,
}

impl Transformer {
    /// Builds the model from the variables of `vb`, creating those that do not exist.
    ///
    /// They have the names that Hugging Face gives them: GPT-2's with or without the prefix
    /// `transformer.`, whichever `vb` holds; LLaMA's with `model.`. Projections that share an input
    /// and track no gradient are joined for speed, and so copied.
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
        let (v, c, max_positions) =
            (config.vocab_size, config.hidden_size, config.max_position_embeddings);
        let init = Init::Randn { mean: 0.0, stdev: config.initializer_range };
        let (body, [tokens, blocks, norm]) = match config.architecture {
            Architecture::Gpt2 => {
                let is_whole = vb.contains_tensor("transformer.wte.weight");
                let body = if is_whole { vb.pp("transformer") } else { vb.clone() };
                (body, ["wte.weight", "h", "ln_f"])
            }
            Architecture::Llama => (vb.pp("model"), ["embed_tokens.weight", "layers", "norm"]),
        };
        let (positions, rope) = match config.architecture {
            Architecture::Gpt2 => {
                (Some(body.get_with_hints((max_positions, c), "wpe.weight", init)?), None)
            }
            Architecture::Llama => {
                let rope = RopeConfig {
                    head_size: config.head_size(),
                    max_positions,
                    theta: config.rope_theta,
                    scaling: config.rope_scaling,
                    style: RopeStyle::HalfSplit,
                };
                (None, Some(Rope::new(&rope, vb.dtype(), vb.device())?))
            }
        };
        let tokens = body.get_with_hints((v, c), tokens, init)?;
        let head = match config.tie_word_embeddings {
            true => tokens.clone(),
            false => vb.get_with_hints((v, c), "lm_head.weight", init)?,
        };
        let block = |layer: usize| {
            let vb = body.pp(blocks).pp(layer - 1);
            Block::new(config, layer, &generator, rope.clone(), vb)
        };
        Ok(Self {
            tokens,
            positions,
            blocks: (1..=config.num_hidden_layers).map(block).collect::<Result<_>>()?,
            norm: BranchNorm::new(config, body.pp(norm))?,
            head,
            max_positions,
            drop: Dropout::with_generator(config.embd_pdrop, generator),
        })
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
        let (b, t) = ids.dims2()?;
        let (c, max_positions) = (self.tokens.dim(1)?, self.max_positions);
        let start = caches.first().map_or(0, |cache| cache.current_seq_len());
        if b == 0 || t == 0 || start + t > max_positions {
            bail!(
                "transformer: ids: expected [B, T] with B >= 1, T >= 1 and {start} cached + T <= \
                 max_position_embeddings = {max_positions}, got [{b}, {t}]"
            )
        }
        let x = self.tokens.index_select(&ids.flatten_all()?, 0)?; // [B*T, C]
        let mut x = x.reshape((b, t, c))?; // [B, T, C]
        if let Some(positions) = &self.positions {
            x = x.broadcast_add(&positions.narrow(0, start, t)?)?; // [B, T, C]
        }
        let drop = self.drop.next_mask(train)?;
        // Each branch is followed by the norm of the next one, the last by the final norm.
        let norm_of = |block: usize| self.blocks.get(block).map_or(&self.norm, |b| &b.norm_1);
        let first = norm_of(0);
        let mut state = if first.fused {
            dropout_add_norm(&x, None, None, &first.norm, &drop)? // [B, T, C] each
        } else {
            let x = dropout(&x, &drop)?; // [B, T, C]
            let n = first.forward(&x)?; // [B, T, C]
            (x, n)
        };
        for (at, block) in self.blocks.iter().enumerate() {
            let (next, cache) = (norm_of(at + 1), caches.get_mut(at));
            state = block.forward(state, next, cache, train)?; // [B, T, C] each
        }
        Ok(state.1)
    }

    /// `[B, T, C] -> [B, T, V]`.
    fn logits(&self, n: &Tensor) -> Result<Tensor> {
        if self.norm.fused {
            return linear(n, &self.head.t()?, None);
        }
        let (b, t, c) = n.dims3()?;
        n.reshape((b * t, c))?.matmul(&self.head.t()?)?.reshape((b, t, ()))
    }

    fn vocab_size(&self) -> Result<usize> {
        self.tokens.dim(0)
    }

    fn device(&self) -> &Device {
        self.tokens.device()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn gelu_and_its_gradient_are_candles() -> Result<()> {
        let x = Var::new(&[-30f32, -5.0, -1.5, -0.1, 0.0, 0.1, 0.7, 2.0, 6.0, 30.0], &Device::Cpu)?;
        let with_gradient = |y: Tensor| -> Result<Vec<f32>> {
            let grads = y.backward()?;
            let Some(grad) = grads.get(&x) else { bail!("no gradient") };
            Tensor::cat(&[&y, grad], 0)?.to_vec1()
        };
        for (ours, candles) in with_gradient(gelu(&x)?)?.iter().zip(with_gradient(x.gelu()?)?) {
            assert!((ours - candles).abs() < 1e-5, "{ours}, not {candles}");
        }
        Ok(())
    }

    #[test]
    fn gelu_of_large_inputs_has_a_gradient_in_every_dtype() -> Result<()> {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let x = Tensor::new(&[-6e4f32, -257., 257., 6e4], &Device::Cpu)?.to_dtype(dtype)?;
            let x = Var::from_tensor(&x)?;
            let grads = gelu(&x)?.backward()?;
            let Some(grad) = grads.get(&x) else { bail!("no gradient") };
            assert_eq!(grad.to_dtype(DType::F32)?.to_vec1::<f32>()?, [0., 0., 1., 1.], "{dtype:?}");
        }
        Ok(())
    }
}
