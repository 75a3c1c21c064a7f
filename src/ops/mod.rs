//! The fused ops: one folder each, from the public function down to its CPU and CUDA passes.

mod activation_dropout;
mod attention;
mod column_sums;
mod cross_entropy;
mod drop_path_add;
mod drop_path_kept;
mod dropout;
mod dropout_add;
mod dropout_add_norm;
mod linear;
mod norm;
mod rope;
mod softmax_dropout;

pub use activation_dropout::{Activation, activation_dropout};
pub use attention::{
    AttentionArgs, AttentionConfig, AttentionLayout, AttentionPass, HeadStrides, attention,
    attention_qkv,
};
pub use column_sums::{ColumnSumsGrids, column_sums};
pub use cross_entropy::{CrossEntropyArgs, CrossEntropyConfig, cross_entropy};
pub use drop_path_add::{StochasticDepth, drop_path_add};
pub use drop_path_kept::drop_path_kept;
pub use dropout::dropout;
pub use dropout_add::dropout_add;
pub use dropout_add_norm::dropout_add_norm;
pub use linear::linear;
pub use norm::{Norm, NormArgs, layer_norm, rms_norm};
pub use rope::{RopeArgs, RopeStyle, rope};
pub use softmax_dropout::{AttentionMask, ScoreArgs, softmax_dropout};
