//! The variables of a model: their names and layouts, which are Hugging Face's, and first values.

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::functions::Functions;
use super::{Architecture, TransformerConfig};
use crate::functional::Norm;

/// All of them, made in the order in which they stand here.
pub(super) struct Weights {
    pub(super) positions: Option<Tensor>, // [max_positions, C]
    pub(super) tokens: Tensor,            // [V, C]
    pub(super) head: Tensor,              // [V, C]
    pub(super) blocks: Vec<BlockWeights>,
    /// Before the head.
    pub(super) norm: Norm,
}

/// Those of one block.
pub(super) struct BlockWeights {
    pub(super) qkv: Projections<3>,
    /// Of queries and of keys, each over a head.
    pub(super) qk_norms: Option<[Norm; 2]>,
    /// Gate and values, or the one projection of an MLP without a gate.
    pub(super) up: Projections<2>,
    pub(super) attn_out: Projection,
    pub(super) mlp_out: Projection,
    /// Before attention.
    pub(super) norm_1: Norm,
    /// Before the MLP.
    pub(super) norm_2: Norm,
}

impl Weights {
    pub(super) fn new(config: &TransformerConfig, vb: VarBuilder) -> Result<Self> {
        let (v, c, max_positions) =
            (config.vocab_size, config.hidden_size, config.max_position_embeddings);
        let init = Init::Randn { mean: 0.0, stdev: config.initializer_range };
        let (prefix, [tokens, blocks, last_norm]) = match config.architecture {
            Architecture::Gpt2 => ("transformer", ["wte.weight", "h", "ln_f"]),
            Architecture::Llama => ("model", ["embed_tokens.weight", "layers", "norm"]),
        };
        // Saved as the body of a model, the weights have no prefix, nor have new ones of GPT-2.
        let holds = |vb: &VarBuilder| {
            vb.contains_tensor(tokens) || vb.pp(last_norm).contains_tensor("weight")
        };
        let has_prefix = match config.architecture {
            Architecture::Gpt2 => holds(&vb.pp(prefix)),
            Architecture::Llama => holds(&vb.pp(prefix)) || !holds(&vb),
        };
        let body = if has_prefix { vb.pp(prefix) } else { vb.clone() };
        let positions = match config.architecture {
            Architecture::Gpt2 => {
                Some(body.get_with_hints((max_positions, c), "wpe.weight", init)?)
            }
            Architecture::Llama => None,
        };
        // As Hugging Face ties them: a head of other values stays a head of its own, and one without an
        // embedding beside it is the embedding.
        let head = "lm_head.weight";
        let is_apart = !config.tie_word_embeddings || vb.contains_tensor(head);
        let head = is_apart.then(|| vb.get_with_hints((v, c), head, init)).transpose()?;
        let (tokens, head) = match head {
            Some(head) if config.tie_word_embeddings && !body.contains_tensor(tokens) => {
                (head.clone(), head)
            }
            head => {
                let tokens = body.get_with_hints((v, c), tokens, init)?;
                (tokens.clone(), head.unwrap_or(tokens))
            }
        };
        let block = |at: usize| BlockWeights::new(config, body.pp(blocks).pp(at));
        let blocks = (0..config.num_hidden_layers).map(block).collect::<Result<_>>()?;
        let norm = norm(config, body.pp(last_norm))?;
        Ok(Self { positions, tokens, head, blocks, norm })
    }
}

impl BlockWeights {
    fn new(config: &TransformerConfig, vb: VarBuilder) -> Result<Self> {
        let (c, i, d) = (config.hidden_size, config.mlp_size(), config.head_size());
        let (q, kv) = (config.num_attention_heads * d, config.kv_heads() * d);
        let projection = |name: &str, sizes, stdev, has_bias| {
            Projection::new(config, sizes, (stdev, has_bias), vb.pp(name))
        };
        let (stdev, attn_bias) = (config.initializer_range, config.attention_bias);
        let attn_in = |name, outputs| projection(name, (c, outputs), stdev, attn_bias);
        let mlp_in = |name| projection(name, (c, i), stdev, config.mlp_bias);
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
        let ([norm_1, norm_2], [attn_out, mlp_out]) = match config.architecture {
            Architecture::Gpt2 => (["ln_1", "ln_2"], ["attn.c_proj", "mlp.c_proj"]),
            Architecture::Llama => (
                ["input_layernorm", "post_attention_layernorm"],
                ["self_attn.o_proj", "mlp.down_proj"],
            ),
        };
        let out_stdev = stdev / (2. * config.num_hidden_layers as f64).sqrt();
        let attn_out_bias = config.attention_out_bias.unwrap_or(attn_bias);
        let attn_out = projection(attn_out, (q, c), out_stdev, attn_out_bias)?;
        let mlp_out = projection(mlp_out, (i, c), out_stdev, config.mlp_bias)?;
        let norm = |name| norm(config, vb.pp(name));
        let (norm_1, norm_2) = (norm(norm_1)?, norm(norm_2)?);
        let head_norm = |name: &str| -> Result<Norm> {
            let weight = vb.pp(name).get_with_hints(d, "weight", Init::Const(1.0))?;
            Ok(Norm::rms_norm(weight, config.norm_eps))
        };
        let qk_norms = match config.qk_norm {
            true => Some([head_norm("self_attn.q_norm")?, head_norm("self_attn.k_norm")?]),
            false => None,
        };
        Ok(Self { qkv, qk_norms, up, attn_out, mlp_out, norm_1, norm_2 })
    }
}

fn norm(config: &TransformerConfig, vb: VarBuilder) -> Result<Norm> {
    let (c, eps) = (config.hidden_size, config.norm_eps);
    let weight = vb.get_with_hints(c, "weight", Init::Const(1.0))?;
    match config.architecture {
        Architecture::Gpt2 => {
            let bias = vb.get_with_hints(c, "bias", Init::Const(0.0))?;
            Ok(Norm::layer_norm(weight, Some(bias), eps))
        }
        Architecture::Llama => Ok(Norm::rms_norm(weight, eps)),
    }
}

/// `y = x W + b`, with `W [in, out]`: GPT-2's layout, and a view of LLaMA's. The bias is apart: a
/// fused op may add it.
#[derive(Debug)]
pub(super) struct Projection {
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
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
        Ok(Self { weight, bias: bias.transpose()? })
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
        Ok(Self { weight: Tensor::cat(&weights, 1)?, bias })
    }

    /// `x W`, `[B, T, in] -> [B, T, out]`.
    pub(super) fn matmul(&self, x: &Tensor, functions: &Functions) -> Result<Tensor> {
        (functions.linear)(x, &self.weight, None)
    }

    /// `x W + b`, `[B, T, in] -> [B, T, out]`.
    pub(super) fn forward(&self, x: &Tensor, functions: &Functions) -> Result<Tensor> {
        (functions.linear)(x, &self.weight, self.bias.as_ref())
    }
}

/// Projections of one input: one matrix product for all, or `N` that are trained by themselves.
#[derive(Debug)]
pub(super) enum Projections<const N: usize> {
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
