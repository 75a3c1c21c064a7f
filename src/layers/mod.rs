//! Modules that a model holds: each asks its generator for one key a call when training.

mod drop_path;
mod dropout;

pub use drop_path::DropPath;
pub use dropout::{Dropout, set_seed};
