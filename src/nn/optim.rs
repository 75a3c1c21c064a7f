//! `candle_nn::optim`, with an AdamW that takes one pass over memory and keeps its moments in f32.

pub use candle_nn::optim::*;

#[doc(inline)]
pub use crate::training::AdamW;
