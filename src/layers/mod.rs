//! Modules that a model holds: each asks its generator for one key a call when training.

mod drop_path;
mod dropout;
mod multi_head_attention;
mod norm;
mod rope;
mod site;

pub use drop_path::DropPath;
pub use dropout::Dropout;
pub use multi_head_attention::{MultiHeadAttention, MultiHeadAttentionConfig};
pub use norm::{LayerNorm, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm};
pub use rope::{Rope, RopeConfig, RopeScaling};
pub use site::set_seed;
