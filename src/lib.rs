//! Every dropout worth having for [candle](https://github.com/huggingface/candle).
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

mod elem;
mod init;
mod launch;
mod layers;
mod mask;
mod ops;
mod parallel;
pub mod reference;
mod rows;
mod simd;
mod transformer;

pub use init::seeded_var_builder;
pub use layers::{DropPath, Dropout, set_seed};
pub use mask::{DropMask, MaskGenerator, MaskKey, MaskState, Rate};
pub use ops::{
    AttentionMask, StochasticDepth, drop_path_add, dropout, dropout_add, softmax_dropout,
};
pub use transformer::{GenerationConfig, Gpt, GptConfig};
