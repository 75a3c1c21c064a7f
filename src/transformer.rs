//! A GPT-2 style Transformer whose every dropout is one of this crate's ops.
//!
//! Pre-norm decoder with learned positions (Radford et al. 2019, "Language Models are Unsupervised
//! Multitask Learners"; stochastic depth after Huang et al. 2016, arXiv 1603.09382). Parameter
//! names, the `[in, out]` layout of the projections and the configuration's field names are those
//! of Hugging Face's GPT-2.
//!
//! The output head is tied to the token embedding, as in GPT-2 (Press & Wolf 2017, arXiv
//! 1608.05859): a published checkpoint has no other head, and a byte-level model as small as the
//! examples' would spend a tenth of its parameters on an untied one.

use std::sync::Arc;

use candle_core::{D, DType, IndexOp, Module, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder, ops as nn_ops};

use crate::layers::{DropPath, Dropout};
use crate::mask::{DropMask, MaskGenerator};
use crate::ops::{
    Activation, AttentionMask, Norm, activation_dropout, drop_path_add, dropout, dropout_add_norm,
    linear, softmax_dropout,
};

/// The hyperparameters of a [`Gpt`], with the names Hugging Face gives them.
#[derive(Debug, Clone, PartialEq)]
pub struct GptConfig {
    /// Number of tokens the model knows.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub n_positions: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Number of blocks.
    pub n_layer: usize,
    /// Number of attention heads; divides `n_embd`.
    pub n_head: usize,
    /// Added to the variance in every LayerNorm.
    pub layer_norm_epsilon: f64,
    /// Standard deviation of the initial weights. Projections that write to the residual stream
    /// start smaller, by `1 / sqrt(2 n_layer)`.
    pub initializer_range: f64,
    /// Drop probability of the sum of token and position embeddings.
    pub embd_pdrop: f32,
    /// Drop probability of attention weights.
    pub attn_pdrop: f32,
    /// Drop probability of what a residual branch adds to the stream.
    pub resid_pdrop: f32,
    /// Probability that the last block's branches are skipped for a sample; block `l` of `L` uses
    /// `l / L` of it.
    pub drop_path_rate: f32,
    /// Whether to run the fused ops (the default) or the same maths from candle's own ops around
    /// [`dropout`](crate::dropout()). Both draw the same masks; the second form is there to compare
    /// with.
    pub fused: bool,
}

impl Default for GptConfig {
    /// GPT-2 small (124M parameters) with its published dropout of 0.1 everywhere and no stochastic
    /// depth.
    fn default() -> Self {
        Self {
            vocab_size: 50257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            layer_norm_epsilon: 1e-5,
            initializer_range: 0.02,
            embd_pdrop: 0.1,
            attn_pdrop: 0.1,
            resid_pdrop: 0.1,
            drop_path_rate: 0.0,
            fused: true,
        }
    }
}

impl GptConfig {
    /// The same model with one drop probability at embedding, attention and residual, as `p` is
    /// usually swept.
    pub fn with_dropout(self, drop_p: f32) -> Self {
        Self { embd_pdrop: drop_p, attn_pdrop: drop_p, resid_pdrop: drop_p, ..self }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// A size is 0, `n_head` does not divide `n_embd`, a drop probability lies outside 0 to 1, or
    /// `layer_norm_epsilon` or `initializer_range` is not a positive number.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("n_positions", self.n_positions),
            ("n_embd", self.n_embd),
            ("n_layer", self.n_layer),
            ("n_head", self.n_head),
        ];
        for (name, size) in sizes {
            if size == 0 {
                bail!("gpt: {name}: expected at least 1, got 0")
            }
        }
        if !self.n_embd.is_multiple_of(self.n_head) {
            let (n_embd, n_head) = (self.n_embd, self.n_head);
            bail!(
                "gpt: n_embd: expected a multiple of n_head = {n_head}, got {n_embd}: change one of \
                 the two"
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
                bail!("gpt: {name}: expected a probability from 0 to 1, got {rate}")
            }
        }
        for (name, value) in [
            ("layer_norm_epsilon", self.layer_norm_epsilon),
            ("initializer_range", self.initializer_range),
        ] {
            if !(value.is_finite() && value > 0.0) {
                bail!("gpt: {name}: expected a positive number, got {value}")
            }
        }
        Ok(())
    }
}

/// How [`Gpt::generate`] picks tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// Number of tokens to add to the prompt.
    pub max_new_tokens: usize,
    /// Divides the logits; 0 picks the likeliest token every time.
    pub temperature: f64,
    /// Sample from this many likeliest tokens only.
    pub top_k: Option<usize>,
    /// Seed of the sampler: equal seeds give equal text.
    pub seed: u64,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self { max_new_tokens: 50, temperature: 1.0, top_k: Some(50), seed: 0 }
    }
}

/// A norm that a fused op may apply, or candle's chain of ops; candle-nn's `LayerNorm` would end
/// the graph.
#[derive(Debug)]
struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    norm: Norm,
    fused: bool,
}

impl LayerNorm {
    fn new(config: &GptConfig, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(config.n_embd, "weight", Init::Const(1.0))?;
        let bias = vb.get_with_hints(config.n_embd, "bias", Init::Const(0.0))?;
        let norm = Norm::layer_norm(weight.clone(), Some(bias.clone()), config.layer_norm_epsilon);
        Ok(Self { weight, bias, norm, fused: config.fused })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.fused {
            true => self.norm.forward(x),
            false => nn_ops::layer_norm_slow(x, &self.weight, &self.bias, self.norm.eps() as f32),
        }
    }
}

/// `y = x W + b` with `W [in, out]`, GPT-2's layout. The bias is apart: a fused op may add it.
#[derive(Debug)]
struct Projection {
    weight: Tensor,
    bias: Tensor,
}

impl Projection {
    fn new(inputs: usize, outputs: usize, stdev: f64, vb: VarBuilder) -> Result<Self> {
        let weight =
            vb.get_with_hints((inputs, outputs), "weight", Init::Randn { mean: 0.0, stdev })?;
        let bias = vb.get_with_hints(outputs, "bias", Init::Const(0.0))?;
        Ok(Self { weight, bias })
    }

    /// `x W`, `[B, T, in] -> [B, T, out]`, as one matrix product over all tokens.
    fn matmul(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, None)
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, Some(&self.bias))
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
        next: &LayerNorm,
        train: bool,
    ) -> Result<(Tensor, Tensor)> {
        let (drop, drop_path) = (self.drop.next_mask(train)?, self.drop_path.next_mask(train)?);
        let skips_samples = !drop_path.is_none();
        let y = self.proj.matmul(x)?; // [B, T, C]
        if self.fused && !skips_samples {
            let (residual, bias) = (Some(residual), Some(&self.proj.bias));
            return dropout_add_norm(&y, residual, bias, &next.norm, &drop);
        }
        let y = dropout(&y.broadcast_add(&self.proj.bias)?, &drop)?; // [B, T, C]
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

#[derive(Debug)]
struct Attention {
    c_attn: Projection,
    c_proj: ResidualBranch,
    drop: Dropout,
    n_head: usize,
    fused: bool,
}

impl Attention {
    fn forward(
        &self,
        x: &Tensor,
        residual: &Tensor,
        next: &LayerNorm,
        train: bool,
    ) -> Result<(Tensor, Tensor)> {
        let (b, t, c) = x.dims3()?;
        let heads = (b, t, 3, self.n_head, c / self.n_head);
        let qkv = self.c_attn.forward(x)?.reshape(heads)?; // [B, T, 3, H, D]
        let qkv = qkv.permute((2, 0, 3, 1, 4))?; // [3, B, H, T, D]
        let (q, k) = (qkv.i(0)?.contiguous()?, qkv.i(1)?); // [B, H, T, D]
        let v = qkv.i(2)?.contiguous()?; // [B, H, T, D]
        let scores = q.matmul(&k.transpose(2, 3)?.contiguous()?)?; // [B, H, T, T]
        let weights = self.weights(&scores, &self.drop.next_mask(train)?)?; // [B, H, T, T]
        let y = weights.matmul(&v)?.transpose(1, 2)?.reshape((b, t, c))?; // [B, T, C]
        self.c_proj.forward(&y, residual, next, train)
    }

    /// `dropout(softmax(scores / sqrt(D) + causal mask))`, `[B, H, T, T]`.
    fn weights(&self, scores: &Tensor, drop: &DropMask) -> Result<Tensor> {
        let head_size = self.c_attn.weight.dim(0)? / self.n_head;
        let scale = 1.0 / (head_size as f64).sqrt();
        if self.fused {
            return softmax_dropout(scores, scale, &AttentionMask::Causal, drop); // [B, H, T, T]
        }
        let t = scores.dim(D::Minus1)?;
        let future: Vec<f32> =
            (0..t * t).map(|at| if at % t > at / t { f32::NEG_INFINITY } else { 0.0 }).collect();
        let future = Tensor::from_vec(future, (t, t), scores.device())?; // [T, T]
        let future = future.to_dtype(scores.dtype())?;
        let scores = (scores * scale)?.broadcast_add(&future)?; // [B, H, T, T]
        dropout(&nn_ops::softmax(&scores, D::Minus1)?, drop) // [B, H, T, T]
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
    ln_1: LayerNorm,
    attn: Attention,
    ln_2: LayerNorm,
    c_fc: Projection,
    c_proj: ResidualBranch,
    fused: bool,
}

impl Block {
    /// Block `layer` of `1..=n_layer`.
    fn new(
        config: &GptConfig,
        layer: usize,
        generator: &Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (c, stdev, fused) = (config.n_embd, config.initializer_range, config.fused);
        let drop = |drop_p| Dropout::with_generator(drop_p, generator.clone());
        let residual = |inputs, vb| -> Result<ResidualBranch> {
            let stdev = stdev / ((2 * config.n_layer) as f64).sqrt();
            let (n_layer, last_drop_p) = (config.n_layer, config.drop_path_rate);
            Ok(ResidualBranch {
                proj: Projection::new(inputs, c, stdev, vb)?,
                drop: drop(config.resid_pdrop),
                drop_path: DropPath::linear(layer, n_layer, last_drop_p, generator.clone())?,
                fused,
            })
        };
        let attn = Attention {
            c_attn: Projection::new(c, 3 * c, stdev, vb.pp("attn.c_attn"))?,
            c_proj: residual(c, vb.pp("attn.c_proj"))?,
            drop: drop(config.attn_pdrop),
            n_head: config.n_head,
            fused,
        };
        Ok(Self {
            ln_1: LayerNorm::new(config, vb.pp("ln_1"))?,
            attn,
            ln_2: LayerNorm::new(config, vb.pp("ln_2"))?,
            c_fc: Projection::new(c, 4 * c, stdev, vb.pp("mlp.c_fc"))?,
            c_proj: residual(4 * c, vb.pp("mlp.c_proj"))?,
            fused,
        })
    }

    /// The stream `x` and its norm `n`, of this block and then of what follows it, `[B, T, C]`
    /// each.
    fn forward(
        &self,
        (x, n): (Tensor, Tensor),
        next: &LayerNorm,
        train: bool,
    ) -> Result<(Tensor, Tensor)> {
        let (x, n) = self.attn.forward(&n, &x, &self.ln_2, train)?; // [B, T, C]
        self.c_proj.forward(&self.hidden(&n)?, &x, next, train) // [B, T, C]
    }

    /// `gelu(n W + b)`, `[B, T, 4C]`.
    fn hidden(&self, n: &Tensor) -> Result<Tensor> {
        let h = self.c_fc.matmul(n)?; // [B, T, 4C]
        if self.fused {
            let bias = Some(&self.c_fc.bias);
            return activation_dropout(&h, bias, Activation::GeluTanh, &DropMask::none());
        }
        gelu(&h.broadcast_add(&self.c_fc.bias)?)
    }
}

/// A GPT-2 style language model.
///
/// Dropout at the embedding, the attention weights and both residual branches, stochastic depth per
/// sample on the branches; rates come from [`GptConfig`]. The model owns its generator, so models
/// trained side by side do not disturb one another's masks. Every call with `train` draws `1 + 5
/// n_layer` keys whatever the rates are, a call without draws none.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Result, Tensor};
/// use candle_dropout::{Gpt, GptConfig, MaskGenerator, seeded_var_builder};
/// use candle_nn::VarMap;
///
/// # fn main() -> Result<()> {
/// let config = GptConfig {
///     vocab_size: 256,
///     n_positions: 8,
///     n_embd: 16,
///     n_layer: 2,
///     n_head: 4,
///     ..Default::default()
/// };
/// let vars = VarMap::new();
/// let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
/// let gpt = Gpt::new(&config, Arc::new(MaskGenerator::new(2)), vb)?;
///
/// let ids = Tensor::new(&[[104u32, 101, 108, 108, 111]], &Device::Cpu)?;
/// assert_eq!(gpt.forward(&ids, true)?.dims(), &[1, 5, 256]);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Gpt {
    wte: Tensor,
    wpe: Tensor,
    drop: Dropout,
    blocks: Vec<Block>,
    ln_f: LayerNorm,
}

impl Gpt {
    /// Builds the model from the variables of `vb`, creating those that do not exist.
    ///
    /// # Errors
    /// `config` is invalid (see [`GptConfig::validate`]), or `vb` lacks a variable or holds one of
    /// another shape.
    pub fn new(config: &GptConfig, generator: Arc<MaskGenerator>, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let init = Init::Randn { mean: 0.0, stdev: config.initializer_range };
        let block =
            |layer| Block::new(config, layer, &generator, vb.pp(format!("h.{}", layer - 1)));
        Ok(Self {
            wte: vb.get_with_hints((config.vocab_size, config.n_embd), "wte.weight", init)?,
            wpe: vb.get_with_hints((config.n_positions, config.n_embd), "wpe.weight", init)?,
            blocks: (1..=config.n_layer).map(block).collect::<Result<_>>()?,
            ln_f: LayerNorm::new(config, vb.pp("ln_f"))?,
            drop: Dropout::with_generator(config.embd_pdrop, generator),
        })
    }

    /// Logits of the next token at every position.
    ///
    /// # Shapes
    /// `ids [B, T]` of u32, `T <= n_positions` -> logits `[B, T, vocab_size]`.
    ///
    /// # Randomness
    /// With `train`, one key a dropout site, in the order embedding, then for each block attention
    /// weights, residual dropout and stochastic depth of the attention branch, residual dropout and
    /// stochastic depth of the MLP branch.
    ///
    /// # Errors
    /// `ids` is not `[B, T]`, is empty or is longer than `n_positions`; on the CPU also if it holds
    /// a token outside the vocabulary.
    ///
    /// On CUDA candle looks tokens up without asking the host: one outside the vocabulary fails an
    /// assertion in the kernel, a later call that waits for the device reports it, and nothing runs
    /// on that device any more until the process restarts. Check tokens of unknown origin on the
    /// host, as [`generate`](Self::generate) does. On every device candle takes `u32::MAX` for "no
    /// token", whose embedding is zero.
    pub fn forward(&self, ids: &Tensor, train: bool) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let (n_positions, c) = self.wpe.dims2()?;
        if b == 0 || t == 0 || t > n_positions {
            bail!(
                "gpt: ids: expected [B, T] with B >= 1 and 1 <= T <= n_positions = {n_positions}, \
                 got [{b}, {t}]"
            )
        }
        let tokens = self.wte.index_select(&ids.flatten_all()?, 0)?; // [B*T, C]
        let tokens = tokens.reshape((b, t, c))?; // [B, T, C]
        let x = tokens.broadcast_add(&self.wpe.narrow(0, 0, t)?)?; // [B, T, C]
        let drop = self.drop.next_mask(train)?;
        // Each branch is followed by the norm of the next one, the last by the final norm.
        let norm_of = |block: usize| self.blocks.get(block).map_or(&self.ln_f, |b| &b.ln_1);
        let first = norm_of(0);
        let mut state = if first.fused {
            dropout_add_norm(&x, None, None, &first.norm, &drop)? // [B, T, C] each
        } else {
            let x = dropout(&x, &drop)?; // [B, T, C]
            let n = first.forward(&x)?; // [B, T, C]
            (x, n)
        };
        for (at, block) in self.blocks.iter().enumerate() {
            let next = norm_of(at + 1);
            state = block.forward(state, next, train)?; // [B, T, C] each
        }
        let x = state.1.reshape((b * t, c))?; // [B*T, C]
        x.matmul(&self.wte.t()?)?.reshape((b, t, ())) // [B, T, V]
    }

    /// Continues `prompt` and returns prompt and continuation together.
    ///
    /// The whole visible context is computed for every token; once the text is longer than
    /// `n_positions` the model sees its last `n_positions` tokens.
    ///
    /// # Randomness
    /// Draws come from `config.seed` by the key derivation of the masks, so equal logits give equal
    /// text in every release. No dropout mask is drawn.
    ///
    /// # Errors
    /// `prompt` is empty or holds a token outside the vocabulary (found on the host, before any
    /// computing), `temperature` is negative or not finite, `top_k` is 0, or a logit is not finite.
    pub fn generate(&self, prompt: &[u32], config: &GenerationConfig) -> Result<Vec<u32>> {
        let (temperature, n_positions) = (config.temperature, self.wpe.dim(0)?);
        let vocab_size = self.wte.dim(0)?;
        if prompt.is_empty() {
            bail!("generate: prompt: expected at least 1 token, got none")
        }
        if let Some(at) = prompt.iter().position(|&token| token as usize >= vocab_size) {
            let token = prompt[at];
            bail!(
                "generate: prompt: expected tokens below vocab_size = {vocab_size}, got {token} at \
                 position {at}: was the text encoded for another vocabulary?"
            )
        }
        if !(temperature.is_finite() && temperature >= 0.0) {
            bail!(
                "generate: temperature: expected a finite number of at least 0, got {temperature}"
            )
        }
        if config.top_k == Some(0) {
            bail!(
                "generate: top_k: expected at least 1, got 0: use `None` to sample from all tokens"
            )
        }
        let draws = MaskGenerator::new(config.seed);
        let mut ids = prompt.to_vec();
        for _ in 0..config.max_new_tokens {
            let context = &ids[ids.len().saturating_sub(n_positions)..];
            let context = Tensor::new(context, self.wte.device())?.unsqueeze(0)?; // [1, T]
            let logits = self.forward(&context, false)?; // [1, T, V]
            let logits = logits.i((0, logits.dim(1)? - 1))?; // [V]
            ids.push(sample(&logits.to_dtype(DType::F32)?.to_vec1()?, config, &draws)?);
        }
        Ok(ids)
    }
}

/// Draws a token from `softmax(logits / temperature)` over the `top_k` likeliest.
fn sample(logits: &[f32], config: &GenerationConfig, draws: &MaskGenerator) -> Result<u32> {
    if let Some(token) = logits.iter().position(|logit| !logit.is_finite()) {
        let logit = logits[token];
        bail!(
            "generate: logits: expected finite numbers, got {logit} for token {token}: has training \
             diverged?"
        )
    }
    let mut tokens: Vec<usize> = (0..logits.len()).collect();
    tokens.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let likeliest = tokens[0];
    if config.temperature == 0.0 {
        return Ok(likeliest as u32);
    }
    tokens.truncate(config.top_k.unwrap_or(logits.len()));
    let weight = |&token: &usize| {
        ((f64::from(logits[token]) - f64::from(logits[likeliest])) / config.temperature).exp()
    };
    // No generator or sampler of another crate: those may change between releases.
    let uniform = (draws.next_key().bits() >> 11) as f64 / (1u64 << 53) as f64;
    let mut left = uniform * tokens.iter().map(weight).sum::<f64>();
    let drawn = tokens.iter().find(|token| {
        left -= weight(token);
        left < 0.0
    });
    // Rounding may leave a rest after the last token.
    Ok(*drawn.unwrap_or(&likeliest) as u32)
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

    #[test]
    fn tokens_of_a_seed_are_pinned() -> Result<()> {
        // A changed token here means that equal seeds no longer give equal text.
        let (logits, draws) = ([0.5, -1.0, 2.0, 0.0, 1.5], MaskGenerator::new(7));
        let config = GenerationConfig { top_k: Some(4), ..Default::default() };
        let tokens: Vec<u32> =
            (0..16).map(|_| sample(&logits, &config, &draws)).collect::<Result<_>>()?;
        assert_eq!(tokens, [4, 2, 3, 0, 4, 2, 2, 4, 4, 2, 0, 2, 3, 4, 2, 4]);
        Ok(())
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() -> Result<()> {
        let draws = MaskGenerator::new(1);
        let logits = [0.0, f32::ln(3.0), -50.0, f32::ln(4.0)];
        let config = GenerationConfig { top_k: Some(3), ..Default::default() };
        let mut counts = [0f64; 4];
        for _ in 0..8000 {
            counts[sample(&logits, &config, &draws)? as usize] += 1.0;
        }
        for (count, p) in counts.into_iter().zip([0.125, 0.375, 0.0, 0.5]) {
            let variance: f64 = 8000.0 * p * (1.0 - p);
            assert!((count - 8000.0 * p).abs() <= 4.0 * variance.sqrt(), "{counts:?}");
        }
        Ok(())
    }

    #[test]
    fn logits_that_are_not_finite_are_an_error_at_every_temperature() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for temperature in [0.0, 1.0] {
                let config = GenerationConfig { temperature, top_k: Some(1), ..Default::default() };
                let draws = MaskGenerator::new(1);
                let error = sample(&[1.0, bad, 2.0], &config, &draws).unwrap_err().to_string();
                assert!(error.contains("logits: expected finite numbers, got"), "{error}");
                assert!(error.contains("for token 1"), "{error}");
            }
        }
    }
}
