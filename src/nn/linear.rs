//! `candle_nn::linear`, with the projection of this crate.

#[doc(inline)]
pub use crate::layers::{Linear, linear, linear_b, linear_no_bias};
