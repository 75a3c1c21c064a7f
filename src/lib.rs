//! Every dropout worth having for [candle](https://github.com/huggingface/candle).
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

mod claim;
mod elem;
mod init;
mod lanes;
mod launch;
mod layers;
mod mask;
pub mod ops;
mod parallel;
#[doc(hidden)]
pub mod reference;
mod rows;
mod simd;
mod transformer;

pub use candle_nn::LayerNormConfig;
pub use init::seeded_var_builder;
pub use layers::{
    DropPath, Dropout, LayerNorm, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm, set_seed,
};
pub use mask::{DropMask, MaskGenerator, MaskKey, MaskState, Rate};
pub use ops::{
    Activation, AttentionMask, Norm, StochasticDepth, activation_dropout, drop_path_add, dropout,
    dropout_add, dropout_add_norm, softmax_dropout,
};
pub use transformer::{GenerationConfig, Gpt, GptConfig};
