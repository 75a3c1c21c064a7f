//! AdamW on CUDA against the CPU, and on the CPU against candle's in f32 with all else done apart: bit for bit.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_dropout::training::{AdamW, LossScale, Optimizer, ParamsAdamW};
use cases::{bits, random};

use DType::{BF16, F16, F32};

/// Variables and their gradients, one pair after the other: each alone, then all in one optimiser.
const DTYPES: [&[(DType, DType)]; 6] = [
    &[(F32, F32)],
    &[(F16, F16)],
    &[(BF16, BF16)],
    &[(F16, F32)],
    &[(BF16, F32)],
    &[(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)],
];

/// One element, tails of a vector, a chunk of the kernel, several; for every pair.
const LENS: [usize; 6] = [1, 7, 2047, 8, 16_384, 32_775];
/// More than a launch takes, which is 1,024.
const MANY: usize = 1_100;

const STEPS: u64 = 5;
const OVERFLOW_AT: u64 = 2;
/// The optimiser is replaced before this one, halfway to a larger loss scale.
const RESTORED_AT: u64 = 4;

const SCALE: LossScale = LossScale { initial: 8., growth_interval: 2 };
/// Between the norm of the long variables, which is clipped, and that of many short ones.
const MAX_NORM: f64 = 16.;

#[derive(Debug)]
pub struct Trial {
    dtypes: &'static [(DType, DType)],
    many: bool,
    /// Clipping, a loss scale with an overflow, master weights.
    scaled: bool,
}

/// What came out, by name, bit for bit, where a zero has no sign.
type Bits = BTreeMap<String, Vec<u64>>;

pub fn trials() -> impl Iterator<Item = Trial> {
    let all = DTYPES.into_iter().flat_map(|dtypes| [false, true].map(|many| (dtypes, many)));
    all.flat_map(|(dtypes, many)| [false, true].map(|scaled| Trial { dtypes, many, scaled }))
}

impl Trial {
    /// The names of what differs: from the CPU, or on the CPU from candle's.
    pub fn disagreements(&self, device: &Device) -> Result<Vec<String>> {
        let expected = if device.is_cuda() { self.ours(&Device::Cpu)? } else { self.by_candle()? };
        let ours = self.ours(device)?;
        let differing = expected.iter().filter(|(name, bits)| ours.get(*name) != Some(bits));
        let names: Vec<&str> = differing.map(|(name, _)| name.as_str()).collect();
        let Some(first) = names.first() else { return Ok(vec![]) };
        Ok(vec![format!("{self:?}: {} of {} differ, first {first}", names.len(), expected.len())])
    }

    fn len(&self, at: usize) -> usize {
        if self.many { 3 } else { LENS[at / self.dtypes.len()] }
    }

    fn dtypes(&self, at: usize) -> (DType, DType) {
        self.dtypes[at % self.dtypes.len()]
    }

    fn places(&self) -> std::ops::Range<usize> {
        0..(if self.many { MANY } else { LENS.len() * self.dtypes.len() })
    }

    fn vars(&self) -> Result<Vec<Tensor>> {
        let var = |at| Ok(random(&[self.len(at)], self.dtypes(at).0, at as u64)?);
        self.places().map(var).collect()
    }

    /// Multiples of a power of two, so that in f64 the sum of their squares is exact in any order; in f32 finer
    /// than a half has them.
    fn grads(&self, step: u64) -> Result<Vec<Tensor>> {
        let grad = |at: usize| -> Result<Tensor> {
            let (len, dtype) = (self.len(at), self.dtypes(at).1);
            let grain = if dtype == F32 { 4096. } else { 64. };
            let grad = random(&[len], F32, (step + 1) << 32 | at as u64)?;
            let mut grad = ((grad * grain)?.round()? / grain)?;
            if self.scaled && step == OVERFLOW_AT && at == self.places().end / 2 {
                grad = (grad.ones_like()? / 0.)?;
            }
            Ok(grad.to_dtype(dtype)?)
        };
        self.places().map(grad).collect()
    }

    fn optimiser(&self, vars: &[Var]) -> Result<AdamW> {
        let adamw = AdamW::new(vars.to_vec(), params())?;
        if !self.scaled {
            return Ok(adamw);
        }
        Ok(adamw.with_clip_norm(MAX_NORM)?.with_loss_scale(SCALE)?.with_master_weights()?)
    }

    fn ours(&self, device: &Device) -> Result<Bits> {
        let vars = self.vars()?.into_iter().map(|var| Var::from_tensor(&var.to_device(device)?));
        let vars = vars.collect::<candle_core::Result<Vec<_>>>()?;
        let mut adamw = self.optimiser(&vars)?;
        for step in 0..STEPS {
            if step == RESTORED_AT {
                let state = adamw.state()?;
                adamw = self.optimiser(&vars)?;
                adamw.restore(&state)?;
            }
            let mut store = GradStore::default();
            for (var, grad) in vars.iter().zip(self.grads(step)?) {
                store.insert(var, grad.to_device(device)?);
            }
            adamw.step(&store)?;
        }
        let mut found = Bits::new();
        for (at, var) in vars.iter().enumerate() {
            found.insert(format!("weight.{at}"), unsigned(var)?);
        }
        for (name, tensor) in adamw.state()?.iter().filter(|(name, _)| name.contains('.')) {
            found.insert(name.clone(), unsigned(tensor)?);
        }
        if self.scaled {
            let norm = adamw.last_grad_norm()?.context("no norm")?;
            insert_numbers(&mut found, norm, adamw.loss_scale()?);
        }
        Ok(found)
    }

    /// The same in f32 by candle's AdamW: the norm, the scale, clipping and rounding are taken apart from it, and
    /// nothing is saved.
    fn by_candle(&self) -> Result<Bits> {
        let wide = self.vars()?.into_iter().map(|var| Var::from_tensor(&var.to_dtype(F32)?));
        let wide = wide.collect::<candle_core::Result<Vec<_>>>()?;
        let mut adamw = candle_nn::AdamW::new(wide.clone(), params())?;
        let (mut norm, mut scale, mut good_steps) = (0., SCALE.initial, 0);
        for step in 0..STEPS {
            let (grads, mut factor) = (self.grads(step)?, 1.);
            if self.scaled {
                let squares = grads.iter().map(|grad| -> Result<f64> {
                    Ok(grad.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?)
                });
                norm = squares.sum::<Result<f64>>()?.sqrt() / scale;
                if !norm.is_finite() {
                    (scale, good_steps) = (scale / 2., 0);
                    continue;
                }
                factor = (MAX_NORM / norm).min(1.) / scale;
                good_steps += 1;
                if good_steps == SCALE.growth_interval {
                    (scale, good_steps) = (2. * scale, 0);
                }
            }
            let mut store = GradStore::default();
            for (var, grad) in wide.iter().zip(grads) {
                store.insert(var, (grad.to_dtype(F32)? * factor)?);
            }
            adamw.step(&store)?;
            if !self.scaled {
                let halves = wide.iter().enumerate().filter(|(at, _)| self.dtypes(*at).0 != F32);
                for (at, var) in halves {
                    var.set(&var.to_dtype(self.dtypes(at).0)?.to_dtype(F32)?)?;
                }
            }
        }
        let mut found = Bits::new();
        for (at, var) in wide.iter().enumerate() {
            let dtype = self.dtypes(at).0;
            found.insert(format!("weight.{at}"), unsigned(&var.to_dtype(dtype)?)?);
            if self.scaled && dtype != F32 {
                found.insert(format!("master_weight.{at}"), unsigned(var)?);
            }
        }
        if self.scaled {
            insert_numbers(&mut found, norm, scale);
        }
        Ok(found)
    }
}

fn params() -> ParamsAdamW {
    ParamsAdamW { lr: 0.01, weight_decay: 0.1, ..Default::default() }
}

fn insert_numbers(found: &mut Bits, norm: f64, scale: f64) {
    found.insert("norm".into(), vec![norm.to_bits()]);
    found.insert("loss_scale".into(), vec![scale.to_bits()]);
}

fn unsigned(x: &Tensor) -> Result<Vec<u64>> {
    Ok(bits(&(x.to_device(&Device::Cpu)?.to_dtype(F32)? + 0.)?)?)
}
