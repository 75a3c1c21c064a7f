//! The formulas of `candle_dropout::Transformer` in the style of GPT-2 from candle's ops alone, its
//! own dropout included: what a user of candle writes without this crate. Same parameters under the
//! same names, so equal seeds give equal weights.

use candle_core::{D, DType, IndexOp, Result, Tensor};
use candle_dropout::TransformerConfig;
use candle_nn::{Init, VarBuilder, ops};

pub struct CandleGpt {
    config: TransformerConfig,
    wte: Tensor,
    wpe: Tensor,
    blocks: Vec<Block>,
    ln_f: [Tensor; 2],
}

/// Weights and biases.
struct Block {
    ln_1: [Tensor; 2],
    c_attn: [Tensor; 2],
    attn_proj: [Tensor; 2],
    ln_2: [Tensor; 2],
    c_fc: [Tensor; 2],
    mlp_proj: [Tensor; 2],
}

impl CandleGpt {
    pub fn new(config: &TransformerConfig, vb: VarBuilder) -> Result<Self> {
        let (c, stdev) = (config.hidden_size, config.initializer_range);
        let normal = |stdev| Init::Randn { mean: 0., stdev };
        let layer_norm = |vb: VarBuilder| -> Result<[Tensor; 2]> {
            Ok([
                vb.get_with_hints(c, "weight", Init::Const(1.))?,
                vb.get_with_hints(c, "bias", Init::Const(0.))?,
            ])
        };
        let linear =
            |inputs: usize, outputs: usize, stdev, vb: VarBuilder| -> Result<[Tensor; 2]> {
                Ok([
                    vb.get_with_hints((inputs, outputs), "weight", normal(stdev))?,
                    vb.get_with_hints(outputs, "bias", Init::Const(0.))?,
                ])
            };
        let to_stream = stdev / ((2 * config.num_hidden_layers) as f64).sqrt();
        let block = |layer: usize| -> Result<Block> {
            let vb = vb.pp(format!("h.{layer}"));
            Ok(Block {
                ln_1: layer_norm(vb.pp("ln_1"))?,
                c_attn: linear(c, 3 * c, stdev, vb.pp("attn.c_attn"))?,
                attn_proj: linear(c, c, to_stream, vb.pp("attn.c_proj"))?,
                ln_2: layer_norm(vb.pp("ln_2"))?,
                c_fc: linear(c, 4 * c, stdev, vb.pp("mlp.c_fc"))?,
                mlp_proj: linear(4 * c, c, to_stream, vb.pp("mlp.c_proj"))?,
            })
        };
        Ok(Self {
            wte: vb.get_with_hints((config.vocab_size, c), "wte.weight", normal(stdev))?,
            wpe: vb.get_with_hints(
                (config.max_position_embeddings, c),
                "wpe.weight",
                normal(stdev),
            )?,
            blocks: (0..config.num_hidden_layers).map(block).collect::<Result<_>>()?,
            ln_f: layer_norm(vb.pp("ln_f"))?,
            config: config.clone(),
        })
    }

    /// Logits `[B, T, V]` in training.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let (c, heads) = (self.config.hidden_size, self.config.num_attention_heads);
        let drop = |x: Tensor, drop_p: f32| match drop_p {
            0. => Ok(x),
            _ => ops::dropout(&x, drop_p),
        };
        let layer_norm = |x: &Tensor, [weight, bias]: &[Tensor; 2]| {
            ops::layer_norm_slow(x, weight, bias, self.config.norm_eps as f32)
        };
        let linear = |x: &Tensor, [weight, bias]: &[Tensor; 2]| -> Result<Tensor> {
            let y = x.flatten_to(1)?.matmul(weight)?.reshape((b, t, ()))?;
            y.broadcast_add(bias)
        };
        let future: Vec<f32> =
            (0..t * t).map(|at| if at % t > at / t { f32::NEG_INFINITY } else { 0. }).collect();
        let future = Tensor::from_vec(future, (t, t), ids.device())?.to_dtype(self.wte.dtype())?;

        let tokens = self.wte.index_select(&ids.flatten_all()?, 0)?.reshape((b, t, c))?;
        let x = tokens.broadcast_add(&self.wpe.narrow(0, 0, t)?)?;
        let mut x = drop(x, self.config.embd_pdrop)?; // [B, T, C]
        for block in &self.blocks {
            let qkv = linear(&layer_norm(&x, &block.ln_1)?, &block.c_attn)?;
            let qkv = qkv.reshape((b, t, 3, heads, c / heads))?.permute((2, 0, 3, 1, 4))?;
            let (q, k, v) = (qkv.i(0)?.contiguous()?, qkv.i(1)?, qkv.i(2)?.contiguous()?);
            let scores = q.matmul(&k.transpose(2, 3)?.contiguous()?)?; // [B, H, T, T]
            let scale = ((c / heads) as f64).sqrt().recip();
            let scores = (scores * scale)?.broadcast_add(&future)?;
            let weights = drop(ops::softmax(&scores, D::Minus1)?, self.config.attn_pdrop)?;
            let y = weights.matmul(&v)?.transpose(1, 2)?.reshape((b, t, c))?;
            x = (x + drop(linear(&y, &block.attn_proj)?, self.config.resid_pdrop)?)?;
            let h = gelu(&linear(&layer_norm(&x, &block.ln_2)?, &block.c_fc)?)?;
            x = (x + drop(linear(&h, &block.mlp_proj)?, self.config.resid_pdrop)?)?;
        }
        let x = layer_norm(&x, &self.ln_f)?.reshape((b * t, c))?;
        x.matmul(&self.wte.t()?)?.reshape((b, t, ()))
    }
}

/// The formula of `Transformer` without its fused ops, so that tanh one element at a time is not
/// what is measured; halves stay halves here, where that goes through f32.
fn gelu(x: &Tensor) -> Result<Tensor> {
    let twice = 2. * std::f64::consts::FRAC_2_PI.sqrt();
    x * ops::sigmoid(&(x * x.sqr()?.affine(0.044715 * twice, twice)?)?)?
}

/// The matrix products of a training step alone: forward, and twice backward.
pub struct MatrixProducts(Vec<(Tensor, Tensor, usize)>);

impl MatrixProducts {
    pub fn new(
        config: &TransformerConfig,
        batch: usize,
        dtype: DType,
        like: &Tensor,
    ) -> Result<Self> {
        let (c, t, v) = (config.hidden_size, config.max_position_embeddings, config.vocab_size);
        let (tokens, heads, layers) =
            (batch * t, batch * config.num_attention_heads, config.num_hidden_layers);
        let head = c / config.num_attention_heads;
        // Products [n, m, k] x [n, k, j], and how many of them.
        let mut forward = vec![(1, tokens, c, v, 1)];
        forward.extend([
            (1, tokens, c, 3 * c, layers),
            (1, tokens, c, c, layers),
            (1, tokens, c, 4 * c, layers),
            (1, tokens, 4 * c, c, layers),
            (heads, t, head, t, layers),
            (heads, t, t, head, layers),
        ]);
        let random = |n: usize, rows: usize, cols: usize| {
            Tensor::randn(0f32, 1., (n, rows, cols), like.device())?.to_dtype(dtype)
        };
        let mut products = Vec::new();
        for (n, m, k, j, count) in forward {
            // y = x W, then dx = dy W', dW = x' dy.
            for (rows, inner, cols) in [(m, k, j), (m, j, k), (k, m, j)] {
                products.push((random(n, rows, inner)?, random(n, inner, cols)?, count));
            }
        }
        Ok(Self(products))
    }

    pub fn run(&self) -> Result<Vec<Tensor>> {
        let mut results = Vec::new();
        for (a, b, count) in &self.0 {
            for _ in 0..*count {
                results.push(a.matmul(b)?);
            }
        }
        Ok(results)
    }

    pub fn flop(&self) -> f64 {
        let flop = |(a, b, count): &(Tensor, Tensor, usize)| {
            2. * (a.elem_count() * b.dims()[2] * count) as f64
        };
        self.0.iter().map(flop).sum()
    }
}
