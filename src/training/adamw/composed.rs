use candle_core::{Result, Tensor, bail};

use super::args::AdamWArgs;
use super::cpu::advance;
use super::progress::Progress;
use super::{NAME, Step, Update};
use crate::composed::times;

pub(super) fn step(step: &Step<'_>, progress: &mut Progress) -> Result<()> {
    let Some(args) = advance(step, progress)? else { return Ok(()) };
    step.updates.iter().try_for_each(|update| of_variable(&args, update))
}

/// In the order of the pass on the CPU.
fn of_variable(args: &AdamWArgs, update: &Update<'_>) -> Result<()> {
    let (m, v) = (update.first_moment, update.second_moment);
    let grad = times(&update.grad.detach().to_dtype(m.dtype())?, args.factor)?;
    let new_m = (times(m, args.beta1)? + times(&grad, 1. - args.beta1)?)?;
    let new_v = (times(v, args.beta2)? + times(&grad.sqr()?, 1. - args.beta2)?)?;
    let (m_hat, v_hat) = (times(&new_m, args.scale_m)?, times(&new_v, args.scale_v)?);
    let weight = update.master.unwrap_or(update.param).detach().to_dtype(m.dtype())?;
    let moved = times(&(m_hat / (v_hat.sqrt()? + args.eps)?)?, update.lr)?;
    let weight = (times(&weight, update.kept())? - moved)?;
    write(m, &new_m)?;
    write(v, &new_v)?;
    if let Some(master) = update.master {
        write(master, &weight)?;
    }
    write(update.param, &weight.to_dtype(update.param.dtype())?)
}

/// Writes `x` where `to` lies.
fn write(to: &Tensor, x: &Tensor) -> Result<()> {
    if !to.is_contiguous() {
        let layout = to.layout();
        bail!(
            "{NAME}: tensor to write: expected a contiguous one, got {layout:?}; make the variable of a copy"
        )
    }
    to.detach().flatten_all()?.slice_set(&x.flatten_all()?, 0, 0)
}
