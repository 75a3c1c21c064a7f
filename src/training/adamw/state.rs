//! What an optimiser is saved as, and taken back.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_nn::ParamsAdamW;

use super::args::{AdamWProgress, LOSS_SCALES};
use super::progress::Progress;
use super::{AdamW, NAME, Slot, device};

const STEP: &str = "step";
const LOSS_SCALE: &str = "loss_scale";
const GOOD_STEPS: &str = "good_steps";

/// Steps that f64 and safetensors' i64 both count.
const MOST_STEPS: i64 = 1 << 53;

/// The tensors of a variable and what they are called.
fn tensors(slot: &Slot) -> impl Iterator<Item = (String, &Tensor)> {
    let first = ("first_moment", Some(&slot.first_moment));
    let second = ("second_moment", Some(&slot.second_moment));
    let master = ("master_weight", slot.master.as_ref());
    let tensors = [first, second, master].into_iter();
    tensors.filter_map(|(what, tensor)| Some((format!("{what}.{}", slot.name), tensor?)))
}

impl AdamW {
    /// Its variables and the names by which it knows them.
    pub(in crate::training) fn named_vars(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.slots.iter().map(|slot| (slot.name.as_str(), &slot.var))
    }

    /// What it was built with, but for the rate, in words: a run that goes on with other numbers is another run.
    pub(in crate::training) fn settings(&self) -> BTreeMap<String, String> {
        let ParamsAdamW { lr: _, beta1, beta2, eps, weight_decay } = &self.params;
        let numbers = [
            ("beta1", Some(*beta1)),
            ("beta2", Some(*beta2)),
            ("eps", Some(*eps)),
            ("weight_decay", Some(*weight_decay)),
            ("max_norm", self.max_norm),
            ("growth_interval", self.loss_scale.map(|scale| scale.growth_interval.into())),
        ];
        let mut settings = BTreeMap::new();
        let mut insert = |name: String, number: Option<f64>| {
            settings
                .insert(name, number.map_or("none".to_string(), |number| format!("{number:?}")));
        };
        numbers.into_iter().for_each(|(name, number)| insert(name.to_string(), number));
        for slot in &self.slots {
            // Of a group of its own.
            if slot.weight_decay.is_some() {
                insert(format!("weight_decay.{}", slot.name), slot.weight_decay);
            }
            if slot.lr_scale != 1. {
                insert(format!("lr_scale.{}", slot.name), Some(slot.lr_scale));
            }
        }
        settings
    }

    /// What the steps to come depend on beside weights, gradients and parameters, by name, on the CPU:
    /// `first_moment.<name>`, `second_moment.<name>` and, where there are any, `master_weight.<name>` of each
    /// variable, `step`, `loss_scale` and `good_steps`. `candle_core::safetensors::save` writes it. Waits for
    /// the device.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for (name, tensor) in self.slots.iter().flat_map(tensors) {
            // A copy, since the next step writes the tensor.
            state.insert(name, on(&Device::Cpu, tensor)?);
        }
        let progress = self.progress.read()?;
        state.insert(STEP.into(), Tensor::new(progress.step as i64, &Device::Cpu)?);
        if self.loss_scale.is_some() {
            state.insert(LOSS_SCALE.into(), Tensor::new(progress.loss_scale, &Device::Cpu)?);
            state.insert(GOOD_STEPS.into(), Tensor::new(progress.good_steps as i64, &Device::Cpu)?);
        }
        Ok(state)
    }

    /// Shape and dtype of each tensor of [`state`](Self::state), without a copy of it.
    pub(in crate::training) fn state_layout(&self) -> Vec<(String, Vec<usize>, DType)> {
        let tensors = self.slots.iter().flat_map(tensors);
        let mut layout: Vec<_> =
            tensors.map(|(name, tensor)| (name, tensor.dims().to_vec(), tensor.dtype())).collect();
        let mut number = |name: &str, dtype| layout.push((name.to_string(), Vec::new(), dtype));
        number(STEP, DType::I64);
        if self.loss_scale.is_some() {
            number(LOSS_SCALE, DType::F64);
            number(GOOD_STEPS, DType::I64);
        }
        layout
    }

    /// Takes back a [`state`](Self::state) of an optimiser that was built the same way; it goes on bit for bit
    /// as that one. Weights and parameters are the caller's to take back.
    ///
    /// # Errors
    /// A name is missing, or none of this optimiser's; a tensor has another shape or dtype; a number is
    /// impossible. Nothing has changed then.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let get = |name: &str| match state.get(name) {
            Some(tensor) => Ok(tensor),
            None => bail!(
                "{NAME}: restore: {name}: expected this name, got none; is it the state of another model, \
                 or of an optimiser that was built in another way?"
            ),
        };
        let count = |name: &str| -> Result<f64> {
            match number(name, get(name)?, DType::I64)?.to_scalar::<i64>()? {
                count @ 0..=MOST_STEPS => Ok(count as f64),
                count => bail!(
                    "{NAME}: restore: {name}: expected 0 to 2^53, got {count}; take what AdamW::state gave"
                ),
            }
        };
        let mut known = 1;
        let mut progress = AdamWProgress::new(1.);
        progress.step = count(STEP)?;
        if self.loss_scale.is_some() {
            known += 2;
            progress.good_steps = count(GOOD_STEPS)?;
            let scale = number(LOSS_SCALE, get(LOSS_SCALE)?, DType::F64)?;
            progress.loss_scale = scale.to_scalar()?;
            let [least, most] = LOSS_SCALES;
            if !(least..=most).contains(&progress.loss_scale) {
                bail!(
                    "{NAME}: restore: {LOSS_SCALE}: expected {least:e} to {most:e}, got {}; take what \
                     AdamW::state gave",
                    progress.loss_scale
                )
            }
        }
        for (name, ours) in self.slots.iter().flat_map(tensors) {
            let theirs = get(&name)?;
            if theirs.dims() != ours.dims() || theirs.dtype() != ours.dtype() {
                bail!(
                    "{NAME}: restore: {name}: expected shape {:?} of {:?}, got {:?} of {:?}; is it the state \
                     of another model?",
                    ours.dims(),
                    ours.dtype(),
                    theirs.dims(),
                    theirs.dtype()
                )
            }
            known += 1;
        }
        if state.len() != known {
            let ours: Vec<_> = self.slots.iter().flat_map(tensors).map(|(name, _)| name).collect();
            let is_known = |name: &String| {
                let of_scale = [LOSS_SCALE, GOOD_STEPS].contains(&name.as_str());
                name == STEP || of_scale && self.loss_scale.is_some() || ours.contains(name)
            };
            let other = state.keys().find(|name| !is_known(name)).map_or("", |name| name);
            bail!(
                "{NAME}: restore: {other}: expected names of this optimiser only; was the other built with a \
                 loss scale or with master weights, or is it that of another model?"
            )
        }

        // What can fail comes first.
        let device = device(&self.slots);
        let restored = |(name, _): (String, &Tensor)| on(device, get(&name)?);
        let restored: Result<Vec<_>> = self.slots.iter().flat_map(tensors).map(restored).collect();
        let progress = match &self.progress {
            Progress::Host(_) => Progress::Host(progress),
            Progress::Cuda(_) => Progress::on(device, progress, true)?,
        };
        let mut restored = restored?.into_iter();
        for slot in &mut self.slots {
            let master = slot.master.as_mut();
            let ours = [Some(&mut slot.first_moment), Some(&mut slot.second_moment), master];
            for (ours, theirs) in ours.into_iter().flatten().zip(restored.by_ref()) {
                *ours = theirs;
            }
        }
        self.progress = progress;
        Ok(())
    }
}

/// A copy of a tensor, contiguous, on a device.
fn on(device: &Device, tensor: &Tensor) -> Result<Tensor> {
    match tensor.device().same_device(device) {
        true => tensor.force_contiguous(),
        false => tensor.to_device(device)?.contiguous(),
    }
}

/// Checks that a tensor is one number of this dtype.
fn number<'a>(name: &str, tensor: &'a Tensor, dtype: DType) -> Result<&'a Tensor> {
    if tensor.rank() != 0 || tensor.dtype() != dtype {
        bail!(
            "{NAME}: restore: {name}: expected one number of {dtype:?}, got shape {:?} of {:?}; take what \
             AdamW::state gave",
            tensor.dims(),
            tensor.dtype()
        )
    }
    Ok(tensor)
}
