//! Whether candle's chain is worth a comparison.

use candle_core::{DType, Result, Tensor, bail};

use crate::Case;

/// So many draws have a mean near the rate.
const ENOUGH_DRAWS: usize = 1 << 20;

/// Demands that candle's chain computes what the fused call does, if not with the same draws: that its output
/// has the same mean absolute value. Of few draws nothing is demanded.
pub fn check_chain(
    case: &dyn Case,
    size: &[usize],
    drop_p: f32,
    ours: &Tensor,
    theirs: &Tensor,
) -> Result<()> {
    let draws = case.mask_dims(size).filter(|_| drop_p > 0.).map(|dims| dims.iter().product());
    if draws.is_some_and(|draws: usize| draws < ENOUGH_DRAWS) {
        return Ok(());
    }
    let mean = |y: &Tensor| y.abs()?.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>();
    let ratio = mean(theirs)? / mean(ours)?;
    let tolerance = if case.is_loss() { 1e-4 } else { 0.02 };
    let is_close = (ratio - 1.).abs() < tolerance;
    if is_close {
        Ok(())
    } else {
        bail!("candle's chain for {case:?} computes something else: {ratio}")
    }
}
