//! Where a model's variables come from: drawn from a seed and their names, or read from published files.

mod pretrained;
mod seeded;

use std::collections::HashMap;
use std::sync::MutexGuard;

use candle_core::{Result, Var, bail};
use candle_nn::VarMap;

pub use pretrained::{check_pretrained_vars, pretrained_var_builder};
pub(crate) use pretrained::{from_checkpoint, read_text};
pub use seeded::seeded_var_builder;

/// The variables by name, for `what` alone while the guard lives.
pub(crate) fn lock<'a>(
    vars: &'a VarMap,
    what: &str,
) -> Result<MutexGuard<'a, HashMap<String, Var>>> {
    match vars.data().lock() {
        Ok(vars) => Ok(vars),
        Err(_) => {
            bail!("{what}: the variable map is poisoned: a thread panicked while it held it")
        }
    }
}
