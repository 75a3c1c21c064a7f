//! AdamW, one pass over memory a step.
//!
//! One text, though long: the optimiser, its checks, and what a step is given.

mod args;
mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod groups;
mod loss_scale;
mod progress;
mod state;

use std::collections::HashSet;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_nn::{Optimizer, ParamsAdamW};

pub use args::{AdamWArgs, AdamWProgress, AdamWRule, AdamWTensor};
pub use groups::{ParamGroup, decay_groups};
pub use loss_scale::LossScale;

use crate::check::{check_device, check_dtype};
use crate::composed::composes;
use crate::graph::run_pass;
use crate::input::Input;
use progress::Progress;

const NAME: &str = "adamw";

/// AdamW, in the place of [`candle_nn::AdamW`].
///
/// ```text
/// g = grad / loss_scale * min(1, max_norm / norm)
/// m = beta1 * m + (1 - beta1) * g
/// v = beta2 * v + (1 - beta2) * g²
/// w = (1 - lr * weight_decay) * w - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
/// ```
///
/// A step reads weights, gradients and moments once and writes them once: in parallel on the CPU, on CUDA in one
/// launch, and one copy of a table, for every 1,024 variables of a dtype; candle's takes 15 operations and 3 copies
/// of each variable. On Metal a step is made of candle's operations, too. In f32 the results are candle's, bit for bit
/// but for the sign of a zero.
///
/// Moments are f32 whatever the dtype of a variable (f64 for f64). Candle's have its dtype: in f16 the
/// default `eps` of 1e-8 is 0 and a step makes NaN of what has no gradient; in bf16 `v` stalls, since
/// `beta2` rounds to 1.
///
/// On request,
/// - [`from_groups`](Self::from_groups): a decay and a share of the rate for each group, see
///   [`decay_groups`];
/// - [`with_clip_norm`](Self::with_clip_norm): gradients are clipped by their norm over all variables;
/// - [`with_master_weights`](Self::with_master_weights): f16 and bf16 variables keep their weights in f32,
///   too, so that small updates are not rounded away;
/// - [`with_loss_scale`](Self::with_loss_scale): for f16, where small gradients underflow;
/// - [`state`](Self::state) and [`restore`](Self::restore): a run that goes on as if it had not stopped.
///
/// A variable without a gradient is left as it is in that step. Without a loss scale, gradients that are
/// infinite or NaN make the weights so, as candle's do; with one such a step is skipped. No result depends on
/// the number of threads. On CUDA no step waits for the device; on Metal one does that clips or has a loss scale.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU; others than floats are passed over, as by candle's. Gradients of
/// another dtype than their variable's are taken in f32 (f64 for f64).
///
/// # Errors
/// New: a variable is given twice, or a name; its dtype is a float that nothing is computed in here; it lies
/// on another device than the first. A step: a gradient has another shape or device than its variable, in
/// which case no variable has changed.
///
/// Loshchilov and Hutter, [Decoupled weight decay regularization](https://arxiv.org/abs/1711.05101), 2019.
///
/// # Example
/// ```
/// use candle_core::{Device, Var};
/// use candle_dropout::training::{AdamW, Optimizer, ParamsAdamW};
///
/// # fn main() -> candle_core::Result<()> {
/// let w = Var::new(&[1f32, -2.], &Device::Cpu)?;
/// let mut adamw = AdamW::new(vec![w.clone()], ParamsAdamW { lr: 0.5, ..Default::default() })?;
/// adamw.backward_step(&w.sqr()?.sum_all()?)?;
/// // A first step goes by lr whatever the gradient, after a decay of lr * 0.01.
/// assert_eq!(w.to_vec1::<f32>()?, [0.495, -1.49]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AdamW {
    slots: Vec<Slot>,
    params: ParamsAdamW,
    max_norm: Option<f64>,
    loss_scale: Option<LossScale>,
    progress: Progress,
}

/// A variable and what belongs to it.
#[derive(Debug)]
struct Slot {
    name: String,
    var: Var,
    weight_decay: Option<f64>,
    lr_scale: f64,
    first_moment: Tensor,
    second_moment: Tensor,
    master: Option<Tensor>,
}

/// A variable, its gradient, and what else a step of it takes.
struct Update<'a> {
    param: &'a Tensor,
    grad: Tensor,
    first_moment: &'a Tensor,
    second_moment: &'a Tensor,
    master: Option<&'a Tensor>,
    lr: f64,
    weight_decay: f64,
}

impl Update<'_> {
    /// What decay leaves of a weight.
    fn kept(&self) -> f64 {
        1. - self.lr * self.weight_decay
    }
}

/// A step, checked.
struct Step<'a> {
    updates: Vec<Update<'a>>,
    params: &'a ParamsAdamW,
    rule: AdamWRule,
    needs_norm: bool,
    device: &'a Device,
}

impl Step<'_> {
    fn device(&self) -> &Device {
        self.device
    }
}

impl Optimizer for AdamW {
    type Config = ParamsAdamW;

    /// The variables are named by their places: "0", "1", ..
    fn new(vars: Vec<Var>, params: ParamsAdamW) -> Result<Self> {
        let vars = vars.into_iter().enumerate().map(|(at, var)| (at.to_string(), var)).collect();
        Self::from_groups(vec![ParamGroup { vars, weight_decay: None, lr_scale: 1. }], params)
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        let rule = AdamWRule {
            beta1: self.params.beta1,
            beta2: self.params.beta2,
            max_norm: self.max_norm.unwrap_or(f64::INFINITY),
            growth_interval: self.loss_scale.map_or(0., |scale| f64::from(scale.growth_interval)),
        };
        let step = Step {
            updates: updates(&self.slots, &self.params, grads)?,
            params: &self.params,
            rule,
            needs_norm: self.needs_norm(),
            device: device(&self.slots),
        };
        if composes(step.device()) {
            return composed::step(&step, &mut self.progress);
        }
        run_pass!(NAME, step, step(&step, &mut self.progress))
    }

    fn learning_rate(&self) -> f64 {
        self.params.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.params.lr = lr
    }

    /// Backward of the loss, scaled if there is a loss scale, and a step.
    fn backward_step(&mut self, loss: &Tensor) -> Result<()> {
        let grads = self.scale_loss(loss)?.backward()?;
        self.step(&grads)
    }
}

impl AdamW {
    /// With the defaults of [`ParamsAdamW`] but for the learning rate.
    pub fn new_lr(vars: Vec<Var>, learning_rate: f64) -> Result<Self> {
        Self::new(vars, ParamsAdamW { lr: learning_rate, ..ParamsAdamW::default() })
    }

    /// Variables by name, in groups of their own decay and share of the learning rate.
    ///
    /// # Errors
    /// As those of [`AdamW`].
    pub fn from_groups(groups: Vec<ParamGroup>, params: ParamsAdamW) -> Result<Self> {
        let (mut slots, mut names, mut ids) = (Vec::<Slot>::new(), HashSet::new(), HashSet::new());
        for ParamGroup { vars, weight_decay, lr_scale } in groups {
            for (name, var) in vars {
                if !var.dtype().is_float() {
                    continue;
                }
                let arg = format!("variable {name}");
                check_dtype(NAME, &arg, &var)?;
                if let Some(first) = slots.first() {
                    check_device(NAME, &arg, &var, "the first", first.var.device())?;
                }
                if !names.insert(name.clone()) {
                    bail!("{NAME}: {arg}: expected each name once, got it twice; rename one")
                }
                if !ids.insert(var.id()) {
                    bail!("{NAME}: {arg}: expected each variable once, got it twice; leave one out")
                }
                let moment = || Tensor::zeros(var.shape(), moment_dtype(var.dtype()), var.device());
                let (first_moment, second_moment) = (moment()?, moment()?);
                slots.push(Slot {
                    name,
                    var,
                    weight_decay,
                    lr_scale,
                    first_moment,
                    second_moment,
                    master: None,
                });
            }
        }
        let progress = Progress::Host(AdamWProgress::new(1.));
        Ok(Self { slots, params, max_norm: None, loss_scale: None, progress })
    }

    /// Clips gradients: if the norm over those of all variables is above `max_norm`, all are multiplied by
    /// `max_norm / norm`. The norm is taken in f64, in an order that depends on the shapes alone; on CUDA it
    /// stays there.
    ///
    /// # Errors
    /// `max_norm` is not above 0.
    pub fn with_clip_norm(mut self, max_norm: f64) -> Result<Self> {
        if max_norm.is_nan() || max_norm <= 0. {
            bail!(
                "{NAME}: max_norm: expected a number above 0, got {max_norm}; leave with_clip_norm out \
                 to clip nothing"
            )
        }
        self.max_norm = Some(max_norm);
        self.place_progress()?;
        Ok(self)
    }

    /// Keeps the weights of f16 and bf16 variables in f32, too; a variable is their rounded copy.
    ///
    /// They start from the variables as they are now: what is set later, say by loading a checkpoint, the next
    /// step overwrites.
    pub fn with_master_weights(mut self) -> Result<Self> {
        for slot in &mut self.slots {
            if slot.var.dtype() != moment_dtype(slot.var.dtype()) {
                slot.master = Some(slot.var.detach().to_dtype(DType::F32)?);
            }
        }
        Ok(self)
    }

    /// Scales losses in [`backward_step`](Optimizer::backward_step) and [`scale_loss`](Self::scale_loss), and
    /// takes the scale out of the gradients in a step.
    ///
    /// # Errors
    /// The first scale is not between 2^-24 and 2^24, or it grows after 0 steps.
    pub fn with_loss_scale(mut self, loss_scale: LossScale) -> Result<Self> {
        let [least, most] = args::LOSS_SCALES;
        if !(least..=most).contains(&loss_scale.initial) {
            bail!(
                "{NAME}: loss_scale: expected {least:e} to {most:e} at first, got {}; \
                 LossScale::dynamic() starts from 65536",
                loss_scale.initial
            )
        }
        if loss_scale.growth_interval == 0 {
            bail!(
                "{NAME}: loss_scale: expected at least 1 step before it grows, got 0; \
                 LossScale::dynamic() waits for 2000"
            )
        }
        self.loss_scale = Some(loss_scale);
        let progress = AdamWProgress { loss_scale: loss_scale.initial, ..self.progress.read()? };
        self.progress = Progress::Host(progress);
        self.place_progress()?;
        Ok(self)
    }

    /// The loss times the loss scale, in f32 if it is bf16; the loss itself if there is no scale. The next
    /// [`step`](Optimizer::step) takes gradients of this.
    ///
    /// # Errors
    /// There is a scale, and the loss is f16: its own gradient is the scale, and 65536 is infinite in f16. A
    /// loss that was f16 on its way is no better, and nothing tells it here; see [`LossScale`].
    pub fn scale_loss(&self, loss: &Tensor) -> Result<Tensor> {
        if self.loss_scale.is_none() {
            return Ok(loss.clone());
        }
        if loss.dtype() == DType::F16 {
            bail!(
                "{NAME}: loss: expected f32 under a loss scale, got F16, in which a gradient of 65536 is \
                 infinite; take the loss of logits.to_dtype(DType::F32), or candle_dropout::functional::cross_entropy, \
                 which is f32 whatever the logits are"
            )
        }
        let loss = loss.to_dtype(moment_dtype(loss.dtype()))?;
        let scale = self.progress.loss_scale()?.to_dtype(loss.dtype())?;
        loss.broadcast_mul(&scale.to_device(loss.device())?)
    }

    /// The norm of the last step's gradients, the loss scale taken out, before clipping; `None` if nothing
    /// asks for it, which [`with_clip_norm`](Self::with_clip_norm) and
    /// [`with_loss_scale`](Self::with_loss_scale) do, or before the first step. Waits for the device.
    pub fn last_grad_norm(&self) -> Result<Option<f64>> {
        if !self.needs_norm() {
            return Ok(None);
        }
        let norm = self.progress.read()?.norm;
        Ok((norm != AdamWProgress::NO_NORM).then_some(norm))
    }

    /// The loss scale as it is now; 1 if there is none. Waits for the device.
    pub fn loss_scale(&self) -> Result<f64> {
        Ok(self.progress.read()?.loss_scale)
    }

    /// Rate, decay and the rest.
    pub fn params(&self) -> &ParamsAdamW {
        &self.params
    }

    /// Replaces them for the steps to come.
    pub fn set_params(&mut self, params: ParamsAdamW) {
        self.params = params;
    }

    fn needs_norm(&self) -> bool {
        self.max_norm.is_some() || self.loss_scale.is_some()
    }

    fn place_progress(&mut self) -> Result<()> {
        let progress = self.progress.read()?;
        self.progress = Progress::on(device(&self.slots), progress, self.needs_norm())?;
        Ok(())
    }
}

/// What moments and updates of a variable are computed in.
fn moment_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// Where all variables lie.
fn device(slots: &[Slot]) -> &Device {
    slots.first().map_or(&Device::Cpu, |slot| slot.var.device())
}

/// Every variable with a gradient; checked, the gradients contiguous.
fn updates<'a>(
    slots: &'a [Slot],
    params: &ParamsAdamW,
    grads: &GradStore,
) -> Result<Vec<Update<'a>>> {
    let written: HashSet<_> =
        slots.iter().map(|slot| Input::new(NAME, &slot.var).storage_key()).collect();
    let mut updates = Vec::with_capacity(slots.len());
    for slot in slots {
        let Some(grad) = grads.get(&slot.var) else { continue };
        let arg = format!("gradient of {}", slot.name);
        if grad.dims() != slot.var.dims() {
            bail!(
                "{NAME}: {arg}: expected shape {:?} like the variable, got {:?}; reduce it to that",
                slot.var.dims(),
                grad.dims()
            )
        }
        check_dtype(NAME, &arg, grad)?;
        check_device(NAME, &arg, grad, "the variable", slot.var.device())?;
        if grad.elem_count() == 0 {
            continue; // candle lets nobody write where there is nothing
        }
        // In its own dtype, or in that of the moments.
        let moments = slot.first_moment.dtype();
        let grad = match grad.dtype() == slot.var.dtype() {
            true => grad.contiguous()?,
            false => grad.to_dtype(moments)?.contiguous()?,
        };
        // Nobody reads what is being written.
        let is_written = written.contains(&Input::new(NAME, &grad).storage_key());
        // Not `copy`, which on Metal shares the buffer; with -0 no bit changes.
        let grad = if is_written { grad.detach().affine(1., -0.)? } else { grad };
        updates.push(Update {
            param: &slot.var,
            grad,
            first_moment: &slot.first_moment,
            second_moment: &slot.second_moment,
            master: slot.master.as_ref(),
            lr: params.lr * slot.lr_scale,
            weight_decay: slot.weight_decay.unwrap_or(params.weight_decay),
        });
    }
    Ok(updates)
}
