use candle_core::{D, Module, ModuleT, Result, Tensor};
use candle_dropout::nn::{
    Dropout, Embedding, LayerNorm, Linear, VarBuilder, embedding, layer_norm, linear,
    linear_no_bias, ops::softmax_last_dim,
};

pub struct Config {
    pub vocab: usize,
    pub block: usize,
    pub layers: usize,
    pub heads: usize,
    pub width: usize,
    pub drop_p: f32,
}

/// nanoGPT's model: learnt positions, norms before attention and MLP, GELU.
pub struct Gpt {
    tokens: Embedding,
    positions: Embedding,
    dropout: Dropout,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
}

struct Block {
    norm_1: LayerNorm,
    qkv: Linear,
    attention_dropout: Dropout,
    projection: Linear,
    norm_2: LayerNorm,
    up: Linear,
    down: Linear,
    dropout: Dropout,
    heads: usize,
}

impl Block {
    fn new(c: &Config, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm_1: layer_norm(c.width, 1e-5, vb.pp("ln_1"))?,
            qkv: linear(c.width, 3 * c.width, vb.pp("c_attn"))?,
            attention_dropout: Dropout::new(c.drop_p),
            projection: linear(c.width, c.width, vb.pp("c_proj"))?,
            norm_2: layer_norm(c.width, 1e-5, vb.pp("ln_2"))?,
            up: linear(c.width, 4 * c.width, vb.pp("c_fc"))?,
            down: linear(4 * c.width, c.width, vb.pp("mlp_proj"))?,
            dropout: Dropout::new(c.drop_p),
            heads: c.heads,
        })
    }

    /// `x` is `[B, T, C]`, `causal` `[T, T]`: 0, or minus infinity where a query does not see a key.
    fn forward(&self, x: &Tensor, causal: &Tensor, train: bool) -> Result<Tensor> {
        let (b, t, c) = x.dims3()?;
        let qkv = self.norm_1.forward(x)?.apply(&self.qkv)?;
        let qkv = qkv.reshape((b, t, 3, self.heads, c / self.heads))?.permute((2, 0, 3, 1, 4))?; // [3, B, H, T, D]
        let (q, k, v) = (qkv.get(0)?, qkv.get(1)?, qkv.get(2)?);
        let scores =
            (q.contiguous()?.matmul(&k.t()?.contiguous()?)? / ((c / self.heads) as f64).sqrt())?;
        let probs = softmax_last_dim(&scores.broadcast_add(causal)?)?; // [B, H, T, T]
        let y = self.attention_dropout.forward(&probs, train)?.matmul(&v.contiguous()?)?;
        let y = y.transpose(1, 2)?.reshape((b, t, c))?.apply(&self.projection)?;
        let x = (x + self.dropout.forward(&y, train)?)?;
        let y = self.norm_2.forward(&x)?.apply(&self.up)?.gelu()?.apply(&self.down)?;
        x + self.dropout.forward(&y, train)?
    }
}

impl Gpt {
    pub fn new(c: &Config, vb: VarBuilder) -> Result<Self> {
        let blocks = (0..c.layers).map(|layer| Block::new(c, vb.pp("h").pp(layer)));
        Ok(Self {
            tokens: embedding(c.vocab, c.width, vb.pp("wte"))?,
            positions: embedding(c.block, c.width, vb.pp("wpe"))?,
            dropout: Dropout::new(c.drop_p),
            blocks: blocks.collect::<Result<_>>()?,
            norm: layer_norm(c.width, 1e-5, vb.pp("ln_f"))?,
            head: linear_no_bias(c.width, c.vocab, vb.pp("lm_head"))?,
        })
    }
}

impl ModuleT for Gpt {
    /// Logits `[B, T, V]` of tokens `[B, T]`.
    fn forward_t(&self, ids: &Tensor, train: bool) -> Result<Tensor> {
        let (t, device) = (ids.dim(D::Minus1)?, ids.device());
        let positions = self.positions.forward(&Tensor::arange(0, t as u32, device)?)?;
        let x = self.tokens.forward(ids)?.broadcast_add(&positions)?;
        let mut x = self.dropout.forward(&x, train)?;
        let hidden = (0..t * t).map(|at| if at % t > at / t { f32::NEG_INFINITY } else { 0. });
        let causal = Tensor::from_iter(hidden, device)?.reshape((t, t))?;
        for block in &self.blocks {
            x = block.forward(&x, &causal, train)?;
        }
        self.norm.forward(&x)?.apply(&self.head)
    }
}
