//! `candle_dropout::nn` in the place of `candle_nn`: which paths it has, that what it replaces computes the same with
//! gradients, and what it refuses.

mod activations;
mod agrees;
mod frozen;
mod idioms;
mod kv_cache;
mod listed;
mod paths;
mod refused;
mod rotations;
mod traps;
mod values;

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{Result, Tensor};

/// Asserts that a call fails and that its message holds every fragment.
#[track_caller]
fn fails(result: Result<Tensor>, fragments: &[&str]) {
    let error = result.expect_err("an error").to_string();
    for fragment in fragments {
        assert!(error.contains(fragment), "{fragment:?} is missing from: {error}");
    }
}

/// The tests that draw from the generator of the process do so one after the other.
fn process_wide_generator() -> MutexGuard<'static, ()> {
    static DRAWS: Mutex<()> = Mutex::new(());
    DRAWS.lock().unwrap_or_else(PoisonError::into_inner)
}
