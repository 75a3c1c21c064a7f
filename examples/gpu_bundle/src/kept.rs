//! An MLP as a residual branch under stochastic depth per sample: all samples computed and then masked,
//! only the kept ones computed, and candle's own chain.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_dropout::functional::{
    Activation, StochasticDepth, activation_dropout, drop_path_add, drop_path_kept,
};
use candle_dropout::{DropMask, MaskKey};

use cases::random;

/// Who skips what.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// `drop_path_kept`.
    Kept,
    /// `drop_path_add` of the whole branch.
    Masked,
    /// candle's ops; its draws differ.
    Candle,
}

pub const FORMS: [Form; 3] = [Form::Kept, Form::Masked, Form::Candle];

impl Form {
    /// Library and variant.
    pub fn names(self) -> [&'static str; 2] {
        match self {
            Self::Kept => ["candle-dropout", "kept samples"],
            Self::Masked => ["candle-dropout", "masked"],
            Self::Candle => ["candle", "chain"],
        }
    }
}

pub const DROP_PS: [f32; 2] = [0.1, 0.4];

/// `x + drop_path(gelu(x W1) W2)`.
pub struct Branch {
    x: Var,
    up: Var,
    down: Var,
}

impl Branch {
    /// 64 samples of 64 tokens, 256 wide (256 tokens, 768 wide on CUDA); or much less.
    pub fn new(dtype: DType, small: bool, device: &Device) -> Result<Self> {
        let [t, c] = match (small, device.is_cuda()) {
            (true, _) => [8, 16],
            (false, false) => [64, 256],
            (false, true) => [256, 768],
        };
        let var = |dims: &[usize], scale: f64, seed| -> Result<Var> {
            let x = (random(dims, DType::F32, seed)? * scale)?;
            Ok(Var::from_tensor(&x.to_dtype(dtype)?.to_device(device)?)?)
        };
        let scale = 1. / (c as f64).sqrt();
        Ok(Self {
            x: var(&[64, t, c], 1., 1)?,
            up: var(&[c, 4 * c], scale, 2)?,
            down: var(&[4 * c, c], scale / 2., 3)?,
        })
    }

    pub fn dims(&self) -> &[usize] {
        self.x.dims()
    }

    fn mlp(&self, form: Form, x: &Tensor) -> candle_core::Result<Tensor> {
        let (b, t, c) = x.dims3()?;
        let h = x.reshape((b * t, c))?.matmul(&self.up)?;
        let h = match form {
            Form::Candle => h.gelu()?,
            _ => activation_dropout(&h, None, Activation::GeluTanh, &DropMask::none())?,
        };
        h.matmul(&self.down)?.reshape((b, t, c))
    }

    pub fn forward(&self, form: Form, drop_p: f32) -> candle_core::Result<Tensor> {
        let (x, row) = (self.x.as_tensor(), StochasticDepth::Row);
        let drop = DropMask::new(drop_p, MaskKey::new(42))?;
        match form {
            Form::Kept => drop_path_kept(x, x, row, &drop, |kept| self.mlp(form, kept)),
            Form::Masked => drop_path_add(&self.mlp(form, x)?, x, row, &drop),
            Form::Candle => {
                let ones = Tensor::ones((x.dim(0)?, 1, 1), x.dtype(), x.device())?;
                let keep = candle_nn::ops::dropout(&ones, drop_p)?;
                x + self.mlp(form, x)?.broadcast_mul(&keep)?
            }
        }
    }

    /// Demands that the kept samples alone give what masking gives, forward and backward.
    pub fn check(&self, drop_p: f32, tolerance: f64) -> Result<()> {
        let results = |form: Form| -> Result<Vec<Tensor>> {
            let y = self.forward(form, drop_p)?;
            let grads = y.backward()?;
            let mut results = vec![y];
            for var in [&self.x, &self.up, &self.down] {
                results.push(grads.get(var).context("no gradient")?.clone());
            }
            Ok(results)
        };
        for (ours, other) in results(Form::Kept)?.iter().zip(results(Form::Masked)?) {
            let norm = |x: &Tensor| -> Result<f32> {
                Ok(x.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt())
            };
            let (off, size) = (norm(&(ours - &other)?)?, norm(&other)?);
            ensure!(
                f64::from(off) <= tolerance * f64::from(size),
                "drop_path_kept at p = {drop_p} is off by {off} of {size}"
            );
        }
        Ok(())
    }
}
