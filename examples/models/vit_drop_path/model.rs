use std::sync::Arc;

use candle_core::{D, IndexOp, ModuleT, Result, Tensor};
use candle_dropout::nn::{
    Conv2d, Conv2dConfig, LayerNorm, Linear, Module, VarBuilder, conv2d, init, layer_norm, linear,
    ops::softmax_last_dim,
};
use candle_dropout::{DropPath, MaskGenerator};

const DEPTH: usize = 6;
const WIDTH: usize = 64;
const HEADS: usize = 2;
const PATCH: usize = 4;
const PATCHES: usize = (32 / PATCH) * (32 / PATCH);

/// A small ViT with stochastic depth: a block's branch is dropped for a whole image.
pub struct Vit {
    patches: Conv2d,
    class: Tensor,
    positions: Tensor,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
}

struct Block {
    norm_1: LayerNorm,
    qkv: Linear,
    projection: Linear,
    norm_2: LayerNorm,
    up: Linear,
    down: Linear,
    drop_path: DropPath,
}

impl Block {
    fn new(drop_path: DropPath, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm_1: layer_norm(WIDTH, 1e-6, vb.pp("norm1"))?,
            qkv: linear(WIDTH, 3 * WIDTH, vb.pp("qkv"))?,
            projection: linear(WIDTH, WIDTH, vb.pp("proj"))?,
            norm_2: layer_norm(WIDTH, 1e-6, vb.pp("norm2"))?,
            up: linear(WIDTH, 4 * WIDTH, vb.pp("fc1"))?,
            down: linear(4 * WIDTH, WIDTH, vb.pp("fc2"))?,
            drop_path,
        })
    }

    fn attention(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, c) = x.dims3()?;
        let qkv =
            x.apply(&self.qkv)?.reshape((b, t, 3, HEADS, c / HEADS))?.permute((2, 0, 3, 1, 4))?; // [3, B, H, T, D]
        let (q, k, v) = (qkv.get(0)?, qkv.get(1)?, qkv.get(2)?);
        let q = (q.contiguous()? / ((c / HEADS) as f64).sqrt())?;
        let probs = softmax_last_dim(&q.matmul(&k.t()?.contiguous()?)?)?; // [B, H, T, T]
        let y = probs.matmul(&v.contiguous()?)?.transpose(1, 2)?.reshape((b, t, c))?;
        y.apply(&self.projection)
    }

    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let branch = self.attention(&self.norm_1.forward(x)?)?;
        let x = self.drop_path.forward_add(&branch, x, train)?;
        let branch = self.norm_2.forward(&x)?.apply(&self.up)?.gelu()?.apply(&self.down)?;
        self.drop_path.forward_add(&branch, &x, train)
    }
}

impl Vit {
    /// The first block is never dropped, the last with probability `drop_p`.
    pub fn new(drop_p: f64, generator: &Arc<MaskGenerator>, vb: VarBuilder) -> Result<Self> {
        let patches = Conv2dConfig { stride: PATCH, ..Default::default() };
        let small = init::Init::Randn { mean: 0., stdev: 0.02 };
        let block = |at: usize| {
            let drop_path = DropPath::linspace(at, DEPTH, drop_p, generator.clone())?;
            Block::new(drop_path, vb.pp("blocks").pp(at))
        };
        Ok(Self {
            patches: conv2d(3, WIDTH, PATCH, patches, vb.pp("patch_embed"))?,
            class: vb.get_with_hints((1, 1, WIDTH), "cls_token", small)?,
            positions: vb.get_with_hints((1, 1 + PATCHES, WIDTH), "pos_embed", small)?,
            blocks: (0..DEPTH).map(block).collect::<Result<_>>()?,
            norm: layer_norm(WIDTH, 1e-6, vb.pp("norm"))?,
            head: linear(WIDTH, 10, vb.pp("head"))?,
        })
    }
}

impl ModuleT for Vit {
    /// Logits `[B, 10]` of images `[B, 3, 32, 32]`.
    fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let patches = images.apply(&self.patches)?.flatten_from(2)?.transpose(1, D::Minus1)?;
        let class = self.class.broadcast_as((images.dim(0)?, 1, WIDTH))?;
        let mut x = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.positions)?;
        for block in &self.blocks {
            x = block.forward(&x, train)?;
        }
        self.norm.forward(&x.i((.., 0))?)?.apply(&self.head)
    }
}
