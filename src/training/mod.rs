//! What a training loop needs beside model and loss: gradients that are checked, clipped and accumulated, an
//! optimiser, learning rates, and a state that survives. `docs/training.md` in the repository puts it together.

mod accumulate;
mod adamw;
mod clip;
mod gradients;
mod in_place;
mod max_norm;
mod r_drop;
mod schedule;
mod state;
mod sums;

use std::collections::BTreeMap;

use candle_core::{Result, Var};
use candle_nn::VarMap;

pub use accumulate::GradAccumulator;
pub use adamw::{AdamW, LossScale, ParamGroup, decay_groups};
#[doc(hidden)]
pub use adamw::{AdamWArgs, AdamWProgress, AdamWRule, AdamWTensor};
pub use candle_nn::{Optimizer, ParamsAdamW};
pub use clip::clip_grad_norm;
pub use gradients::check_gradients;
pub use max_norm::MaxNorm;
pub use r_drop::{r_drop_forward, r_drop_loss};
pub use schedule::{LrDecay, LrSchedule};
pub use state::{Progress, TrainingState};

/// Variables by name, as all of this module takes them: what goes over them goes in the order of
/// their names, and a hash map's order changes no sum.
pub type NamedVars = BTreeMap<String, Var>;

/// The variables of a map, by name.
///
/// # Errors
/// A thread panicked while it held the map.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Result};
/// use candle_dropout::{seeded_var_builder, training::named_vars};
/// use candle_nn::VarMap;
///
/// # fn main() -> Result<()> {
/// let map = VarMap::new();
/// let vb = seeded_var_builder(&map, 1, DType::F32, &Device::Cpu);
/// let head = candle_nn::linear(3, 2, vb.pp("head"))?;
/// assert!(named_vars(&map)?.keys().eq(["head.bias", "head.weight"]));
/// # Ok(()) }
/// ```
pub fn named_vars(vars: &VarMap) -> Result<NamedVars> {
    let vars = crate::vars::lock(vars, "training")?;
    Ok(vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect())
}
