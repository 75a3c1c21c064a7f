//! `candle_nn::layer_norm`, with norms that have a gradient.

pub use candle_nn::layer_norm::*;

#[doc(inline)]
pub use crate::layers::{LayerNorm, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm};
