//! Several masks of one site and step: passes in one forward, samples of a head, passes that are held together.

mod mc_dropout;
mod mc_ops;
mod mc_prediction;
mod multi_sample_dropout;
mod r_drop;

use std::sync::Arc;

use candle_core::Result;
use candle_dropout::{MaskGenerator, MaskKey};

/// Of passes.
const SEED: u64 = 9;

/// The key of site `n` in pass `t`.
fn key(n: u64, t: usize) -> MaskKey {
    MaskKey::derive(SEED, n).draw(t as u64)
}

/// That of a model.
fn generator() -> Arc<MaskGenerator> {
    Arc::new(MaskGenerator::new(1))
}

/// The message of an error.
fn message<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}
