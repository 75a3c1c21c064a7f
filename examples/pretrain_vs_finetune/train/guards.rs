//! The guards that stop the job when its promises do not hold.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_dropout::functional::dropout;
use candle_dropout::{DropMask, MaskGenerator};

use super::model::{Model, adamw, batch};
use super::order::window_order;
use super::{Phase, Run, Shared, Task};

/// Checks, on a few small steps, what every figure of the job rests on.
pub fn check_guards(task: &Task, shared: &Shared, rates: &[f32]) -> Result<()> {
    let largest = rates.iter().copied().fold(0.1, f32::max);
    let few_steps = |drop_p: f32, with_dropout: bool| -> Result<(Vec<u64>, Vec<Vec<u32>>)> {
        let run = Run { phase: Phase::Pretrain, drop_p, seed: 0 };
        let model = Model::new(shared, &run, None)?;
        let mut adamw = adamw(&model, &task.recipe)?;
        let mut losses = Vec::new();
        for chunk in
            window_order(&run, task, shared.model.max_position_embeddings)?.chunks(4).take(3)
        {
            let (inputs, targets) =
                batch(&task.train, chunk, shared.model.max_position_embeddings, &shared.device)?;
            if losses.is_empty() {
                model.check_gradients(&inputs, &targets).context("guard")?;
            }
            losses.push(model.step(&mut adamw, &inputs, &targets, with_dropout)?.to_bits());
        }
        let bits = |tensor: &Tensor| -> Result<Vec<u32>> {
            Ok(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
        };
        Ok((losses, model.weights()?.values().map(bits).collect::<Result<_>>()?))
    };
    ensure!(
        few_steps(0.0, true)? == few_steps(0.0, false)?,
        "guard: training with p = 0 is not training without dropout"
    );
    ensure!(
        few_steps(largest, true)? == few_steps(largest, true)?,
        "guard: two runs with one seed differ"
    );
    ensure!(
        few_steps(largest, true)? != few_steps(0.0, true)?,
        "guard: dropout with p = {largest} changes nothing"
    );
    for &drop_p in rates {
        check_keep_rate(drop_p, &shared.device)?;
    }
    Ok(())
}

/// The realised keep rate over a million elements lies within 4 standard deviations of the rate on
/// the mask's grid.
fn check_keep_rate(drop_p: f32, device: &Device) -> Result<()> {
    let n = 1 << 20;
    let drop = DropMask::new(drop_p, MaskGenerator::new(1).next_key())?;
    let kept = dropout(&Tensor::ones((1024, n / 1024), DType::F32, device)?, &drop)?;
    let kept = kept.ne(0f32)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()? as f64;
    let keep_p = match drop_p {
        0.0 | 1.0 => 1.0 - f64::from(drop_p),
        p => ((1.0 - f64::from(p)) * 65536.0 + 0.5).floor().clamp(1.0, 65535.0) / 65536.0,
    };
    let sigma = (n as f64 * keep_p * (1.0 - keep_p)).sqrt();
    let off = (kept - n as f64 * keep_p).abs();
    ensure!(
        off <= 4.0 * sigma,
        "guard: p = {drop_p} kept {kept} of {n}, {:.1} standard deviations off",
        off / sigma
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{shared, task};
    use super::*;

    #[test]
    fn the_guards_pass() {
        check_guards(&task(), &shared(), &[0.0, 0.1, 0.5]).unwrap();
    }
}
