//! The fused ops: one folder each, from the public function down to its CPU and CUDA passes.

mod activation_dropout;
mod attention;
mod cross_entropy;
mod drop_path_add;
mod drop_path_kept;
mod dropout;
mod dropout_add;
mod dropout_add_norm;
mod linear;
mod rope;
mod softmax_dropout;

pub use activation_dropout::{Activation, activation_dropout};
#[cfg(feature = "cuda")]
pub(crate) use attention::{AttentionArgs, AttentionLayout, HeadStrides};
pub use attention::{AttentionConfig, attention, attention_qkv};
#[cfg(feature = "cuda")]
pub(crate) use cross_entropy::CrossEntropyArgs;
pub use cross_entropy::{CrossEntropyConfig, cross_entropy};
pub use drop_path_add::{StochasticDepth, drop_path_add};
pub use drop_path_kept::drop_path_kept;
pub use dropout::dropout;
pub use dropout_add::dropout_add;
pub use dropout_add_norm::{Norm, dropout_add_norm, layer_norm, rms_norm};
pub use linear::linear;
#[cfg(feature = "cuda")]
pub(crate) use rope::RopeArgs;
pub use rope::{RopeStyle, rope};
#[cfg(feature = "cuda")]
pub(crate) use softmax_dropout::ScoreArgs;
pub use softmax_dropout::{AttentionMask, softmax_dropout};
