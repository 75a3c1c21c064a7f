use std::sync::Arc;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_dropout::nn::{self, Linear, Module, Optimizer, VarBuilder};
use candle_dropout::{Dropout, MaskGenerator, McDropout, seeded_var_builder};
use candle_dropout_models::Images;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Digits to learn, digits to ask about, clothes to ask about: images and classes of each.
pub const FILES: [&str; 6] = [
    "mnist/train-images-idx3-ubyte.gz",
    "mnist/train-labels-idx1-ubyte.gz",
    "mnist/t10k-images-idx3-ubyte.gz",
    "mnist/t10k-labels-idx1-ubyte.gz",
    "fashion_ood/fashion900-images-idx3-ubyte.gz",
    "fashion_ood/fashion900-labels-idx1-ubyte.gz",
];

const BATCH: usize = 64;

/// Passes of a prediction.
const PASSES: usize = 32;

/// Two hidden layers, each with a dropout behind it.
pub struct Mlp {
    layers: [Linear; 3],
    dropout: Dropout,
}

impl Mlp {
    pub fn new(generator: Arc<MaskGenerator>, vb: VarBuilder) -> candle_core::Result<Self> {
        let layer = |inputs, outputs, name: &str| nn::linear(inputs, outputs, vb.pp(name));
        Ok(Self {
            layers: [
                layer(28 * 28, 256, "hidden_1")?,
                layer(256, 256, "hidden_2")?,
                layer(256, 10, "head")?,
            ],
            dropout: Dropout::with_generator(0.5, generator)?,
        })
    }

    /// Logits `[B, 10]` of images `[B, 1, 28, 28]`.
    pub fn forward(&self, images: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let [hidden_1, hidden_2, head] = &self.layers;
        // From 0 to 1: what is blank says nothing.
        let x = ((images.flatten_from(1)? + 1.)? / 2.)?; // [B, 784]
        let x = hidden_1.forward(&x)?.relu()?;
        let x = hidden_2.forward(&self.dropout.forward(&x, train)?)?.relu()?;
        head.forward(&self.dropout.forward(&x, train)?)
    }
}

/// A model that has seen `steps` batches; the same for the same seed.
pub fn trained(images: &Images, steps: usize, seed: u64) -> Result<Mlp> {
    let vars = nn::VarMap::new();
    let vb = seeded_var_builder(&vars, seed, DType::F32, &Device::Cpu);
    let model = Mlp::new(Arc::new(MaskGenerator::new(seed)), vb)?;
    let mut adamw = nn::AdamW::new_lr(vars.all_vars(), 1e-3)?;
    let mut batches = StdRng::seed_from_u64(seed);
    for _ in 0..steps {
        let (images, classes) = images.batch(BATCH, &mut batches)?;
        let loss = nn::loss::cross_entropy(&model.forward(&images, true)?, &classes)?;
        adamw.backward_step(&loss)?;
    }
    Ok(model)
}

/// What a model does not know of each image, in nats.
pub struct Uncertainty {
    /// Of the class and the weights: what is the model's.
    pub information: Vec<f32>,
    /// Of the class, for whatever reason.
    pub predictive: Vec<f32>,
}

impl Uncertainty {
    /// Of `[N, 1, 28, 28]`, in batches.
    pub fn of(model: &Mlp, images: &Tensor, seed: u64) -> Result<Self> {
        let (mc, n) = (McDropout::new(PASSES, seed)?, images.dim(0)?);
        let mut uncertainty = Self { information: Vec::new(), predictive: Vec::new() };
        for first in (0..n).step_by(BATCH) {
            let batch = images.narrow(0, first, BATCH.min(n - first))?;
            let prediction = mc.predict(&batch, first, |xs, train| model.forward(xs, train))?;
            uncertainty.information.extend(prediction.mutual_information()?.to_vec1::<f32>()?);
            uncertainty.predictive.extend(prediction.predictive_entropy()?.to_vec1::<f32>()?);
        }
        Ok(uncertainty)
    }
}

pub fn mean(numbers: &[f32]) -> f64 {
    numbers.iter().copied().map(f64::from).sum::<f64>() / numbers.len() as f64
}

/// In which share of pairs the second is higher than the first: the area under the ROC curve of a detector.
pub fn auroc(low: &[f32], high: &[f32]) -> f64 {
    let higher = |low: &f32| high.iter().filter(|high| *high > low).count();
    low.iter().map(higher).sum::<usize>() as f64 / (low.len() * high.len()) as f64
}
