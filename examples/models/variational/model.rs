use std::sync::Arc;

use candle_core::{DType, Device, ModuleT, Result, Tensor};
use candle_dropout::nn::{self, Linear, Optimizer, VarBuilder, VarMap};
use candle_dropout::training::{AdamW, ParamsAdamW};
use candle_dropout::{MaskGenerator, VariationalLinear, kl_weight, seeded_var_builder};
use candle_dropout_models::Images;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Images and classes: to learn, and to ask about.
pub const FILES: [&str; 4] = [
    "mnist/train-images-idx3-ubyte.gz",
    "mnist/train-labels-idx1-ubyte.gz",
    "mnist/t10k-images-idx3-ubyte.gz",
    "mnist/t10k-labels-idx1-ubyte.gz",
];

/// Names, inputs and outputs of the layers: LeNet-300-100.
const LAYERS: [(&str, usize, usize); 3] =
    [("hidden_1", 28 * 28, 300), ("hidden_2", 300, 100), ("head", 100, 10)];

const BATCH: usize = 100;

/// Of the first step; it falls to 0 on a straight line, as in the authors' code. High, for the noise begins far below
/// the weights, and each step of Adam moves it by no more than the rate.
const LEARNING_RATE: f64 = 5e-3;

/// A multilayer perceptron of layers of one kind.
pub struct Mlp<L> {
    layers: Vec<L>,
}

impl<L: ModuleT> Mlp<L> {
    fn new(layer: impl Fn(usize, usize, VarBuilder) -> Result<L>, vb: &VarBuilder) -> Result<Self> {
        let layers = LAYERS.map(|(name, inputs, outputs)| layer(inputs, outputs, vb.pp(name)));
        Ok(Self { layers: layers.into_iter().collect::<Result<_>>()? })
    }

    /// Logits `[B, 10]` of images `[B, 1, 28, 28]`.
    pub fn forward(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        // From 0 to 1: a weight of a pixel that is always blank has nothing to keep it.
        let mut x = ((images.flatten_from(1)? + 1.)? / 2.)?; // [B, 784]
        for (at, layer) in self.layers.iter().enumerate() {
            if at > 0 {
                x = x.relu()?;
            }
            x = layer.forward_t(&x, train)?;
        }
        Ok(x)
    }
}

impl Mlp<VariationalLinear> {
    /// The divergence of all layers from their priors.
    fn kl(&self) -> Result<Tensor> {
        let layers = self.layers.iter().map(|layer| layer.kl()).collect::<Result<Vec<_>>>()?;
        Tensor::stack(&layers, 0)?.sum_all()
    }

    /// The share of weights that are pruned: of each layer, and of all.
    pub fn sparsity(&self) -> Result<(Vec<f64>, f64)> {
        let shares =
            self.layers.iter().map(|layer| layer.sparsity()).collect::<Result<Vec<_>>>()?;
        let sizes = LAYERS.map(|(_, inputs, outputs)| (inputs * outputs) as f64);
        let pruned = shares.iter().zip(&sizes).map(|(share, size)| share * size).sum::<f64>();
        Ok((shares, pruned / sizes.iter().sum::<f64>()))
    }

    /// Plain layers, with zeros where a weight is pruned.
    pub fn pruned(&self) -> Result<Mlp<Linear>> {
        let layers = self.layers.iter().map(|layer| layer.prune());
        Ok(Mlp { layers: layers.collect::<Result<_>>()? })
    }

    /// Plain layers with the means of all weights.
    pub fn unpruned(&self) -> Mlp<Linear> {
        let plain =
            |layer: &VariationalLinear| Linear::new(layer.weight().clone(), layer.bias().cloned());
        Mlp { layers: self.layers.iter().map(plain).collect() }
    }
}

/// Weights that learn their noise.
pub fn variational(images: &Images, steps: usize, seed: u64) -> Result<Mlp<VariationalLinear>> {
    let generator = Arc::new(MaskGenerator::new(seed));
    let layer = |inputs, outputs, vb: VarBuilder| {
        VariationalLinear::new(inputs, outputs, generator.clone(), vb)
    };
    // A tenth of the steps for the weights alone; then the divergence grows to the end.
    let (samples, begin) = (images.classes.elem_count() as f64, steps / 10);
    trained(images, steps, seed, layer, |mlp, cross_entropy, step| {
        let weight = kl_weight(step, begin, steps - begin);
        cross_entropy + (mlp.kl()? * (weight / samples))?
    })
}

/// The same first weights and batches, and no noise.
pub fn plain(images: &Images, steps: usize, seed: u64) -> Result<Mlp<Linear>> {
    trained(images, steps, seed, nn::linear, |_, cross_entropy, _| Ok(cross_entropy))
}

/// An MLP that has seen `steps` batches; the same for the same seed.
fn trained<L: ModuleT>(
    images: &Images,
    steps: usize,
    seed: u64,
    layer: impl Fn(usize, usize, VarBuilder) -> Result<L>,
    loss: impl Fn(&Mlp<L>, Tensor, usize) -> Result<Tensor>,
) -> Result<Mlp<L>> {
    let vars = VarMap::new();
    let mlp = Mlp::new(layer, &seeded_var_builder(&vars, seed, DType::F32, &Device::Cpu))?;
    let params = ParamsAdamW { lr: LEARNING_RATE, weight_decay: 0., ..Default::default() };
    let mut adamw = AdamW::new(vars.all_vars(), params)?;
    let mut batches = StdRng::seed_from_u64(seed);
    for step in 0..steps {
        adamw.set_learning_rate(LEARNING_RATE * (1. - step as f64 / steps as f64));
        let (images, classes) = images.batch(BATCH, &mut batches)?;
        let cross_entropy = nn::loss::cross_entropy(&mlp.forward(&images, true)?, &classes)?;
        adamw.backward_step(&loss(&mlp, cross_entropy, step)?)?;
    }
    Ok(mlp)
}
