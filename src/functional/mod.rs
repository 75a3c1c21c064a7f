//! The ops, as functions of tensors: each checks its arguments, computes in one pass on the device of its tensors,
//! and has gradients.
//!
//! Those that drop take a [`DropMask`](crate::DropMask). What they return depends on their arguments alone: on no
//! generator, no switch and no number of threads.

mod activation_dropout;
mod attention;
mod broadcast_dropout;
mod column_sums;
mod concrete_dropout;
mod cross_entropy;
mod drop_block;
mod drop_connect_conv2d;
mod drop_path_add;
mod drop_path_kept;
mod dropout;
mod dropout_add;
mod dropout_add_norm;
mod gaussian;
mod linear;
mod norm;
mod rope;
mod softmax_dropout;
mod zoneout;

pub use crate::check::expect_dims;
pub use activation_dropout::{Activation, activation_dropout, glu_dropout};
pub use attention::{
    AttentionArgs, AttentionConfig, AttentionLayout, AttentionPass, HeadStrides, attention,
    attention_qkv,
};
pub use broadcast_dropout::{
    alpha_dropout, broadcast_dropout, embedding_dropout, unscaled_dropout,
};
pub use column_sums::{ColumnSumsGrids, column_sums};
pub use concrete_dropout::concrete_dropout;
pub(crate) use concrete_dropout::{bounded, inverse};
pub use cross_entropy::{
    CrossEntropyArgs, CrossEntropyConfig, Reduction, counted_targets, cross_entropy,
};
pub use drop_block::{DropBlockArgs, DropBlockConfig, drop_block};
pub(crate) use drop_connect_conv2d::check_conv2d;
pub use drop_connect_conv2d::drop_connect_conv2d;
pub use drop_path_add::{StochasticDepth, drop_path, drop_path_add};
pub use drop_path_kept::drop_path_kept;
pub use dropout::dropout;
pub use dropout_add::dropout_add;
pub use dropout_add_norm::dropout_add_norm;
pub(crate) use gaussian::check_std;
pub use gaussian::{gaussian_dropout, gaussian_noise, reparameterize};
pub(crate) use linear::linear_out_in;
pub use linear::{drop_connect_linear, dropout_linear, linear};
pub(crate) use norm::check_eps;
pub use norm::{Norm, NormArgs, layer_norm, rms_norm};
pub(crate) use rope::composed::rope as composed_rope;
pub use rope::{RopeArgs, RopeStyle, rope};
pub use softmax_dropout::{AttentionMask, ScoreArgs, softmax_drop_key, softmax_dropout};
pub use zoneout::zoneout;
