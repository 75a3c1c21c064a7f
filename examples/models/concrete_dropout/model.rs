use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::nn::{
    AdamW, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap, linear,
};
use candle_dropout::{ConcreteDropout, ConcreteDropoutConfig, MaskGenerator, seeded_var_builder};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const WIDTH: usize = 64;
const BATCH: usize = 32;

/// What the paper's synthetic data has: `y = 2 x + 8` and noise of variance 1, so a precision of 1.
const PRECISION: f64 = 1.;

/// Of the prior, as in the authors' code.
const LENGTH_SCALE: f64 = 1e-4;

/// Three layers, each behind a dropout with a rate of its own.
pub struct Regression {
    /// With the inputs of each.
    layers: Vec<(ConcreteDropout, Linear, usize)>,
}

impl Regression {
    /// To learn from so many samples.
    pub fn new(samples: usize, generator: &Arc<MaskGenerator>, vb: VarBuilder) -> Result<Self> {
        let config = ConcreteDropoutConfig {
            weight_regularizer: LENGTH_SCALE * LENGTH_SCALE / (PRECISION * samples as f64),
            dropout_regularizer: 2. / (PRECISION * samples as f64),
            ..Default::default()
        };
        let mut layers = Vec::new();
        for (at, (inputs, outputs)) in
            [(1, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)].into_iter().enumerate()
        {
            let vb = vb.pp(at);
            let dropout = ConcreteDropout::new(config, generator.clone(), vb.pp("dropout"))?;
            layers.push((dropout, linear(inputs, outputs, vb.pp("linear"))?, inputs));
        }
        Ok(Self { layers })
    }

    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let mut x = x.clone();
        for (at, (dropout, linear, _)) in self.layers.iter().enumerate() {
            x = linear.forward(&dropout.forward(&x, train)?)?;
            if at + 1 < self.layers.len() {
                x = x.relu()?;
            }
        }
        Ok(x)
    }

    /// The mean of squares and what weights and rates cost.
    pub fn loss(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let mut loss = (self.forward(x, true)? - y)?.sqr()?.mean_all()?;
        for (dropout, linear, inputs) in &self.layers {
            loss = (loss + dropout.regularizer(linear.weight(), *inputs)?)?;
        }
        Ok(loss)
    }

    /// The root of the mean square in evaluation.
    pub fn rmse(&self, x: &Tensor, y: &Tensor) -> Result<f32> {
        (self.forward(x, false)? - y)?.sqr()?.mean_all()?.sqrt()?.to_scalar()
    }

    /// The rates as they are now, layer by layer.
    pub fn drop_ps(&self) -> Result<Vec<f32>> {
        self.layers.iter().map(|(dropout, ..)| dropout.drop_p()).collect()
    }
}

/// So many samples of the paper's synthetic data.
fn samples(n: usize, random: &mut StdRng) -> Result<(Tensor, Tensor)> {
    // Box and Muller's two normal numbers of two uniform ones.
    let mut normals = || {
        let radius = (-2. * (1. - random.random::<f32>()).ln()).sqrt();
        let angle = std::f32::consts::TAU * random.random::<f32>();
        (radius * angle.cos(), radius * angle.sin())
    };
    let (x, y): (Vec<f32>, Vec<f32>) = (0..n)
        .map(|_| {
            let (x, noise) = normals();
            (x, 2. * x + 8. + noise)
        })
        .unzip();
    Ok((Tensor::from_vec(x, (n, 1), &Device::Cpu)?, Tensor::from_vec(y, (n, 1), &Device::Cpu)?))
}

/// What a model of `n` samples has learnt after so many steps: its rates, and its error on others.
pub fn learnt(n: usize, steps: usize, seed: u64) -> Result<(Vec<f32>, f32)> {
    let (vars, generator) = (VarMap::new(), Arc::new(MaskGenerator::new(seed)));
    let vb = seeded_var_builder(&vars, seed, DType::F32, &Device::Cpu);
    let model = Regression::new(n, &generator, vb)?;
    let params = ParamsAdamW { lr: 1e-2, weight_decay: 0., ..Default::default() };
    let mut adamw = AdamW::new(vars.all_vars(), params)?;
    let mut random = StdRng::seed_from_u64(seed);
    let (x, y) = samples(n, &mut random)?;
    for _ in 0..steps {
        let batch: Vec<u32> = (0..BATCH).map(|_| random.random_range(0..n as u32)).collect();
        let batch = Tensor::from_vec(batch, BATCH, &Device::Cpu)?;
        let loss = model.loss(&x.index_select(&batch, 0)?, &y.index_select(&batch, 0)?)?;
        adamw.backward_step(&loss)?;
    }
    let (x, y) = samples(1000, &mut random)?;
    Ok((model.drop_ps()?, model.rmse(&x, &y)?))
}
