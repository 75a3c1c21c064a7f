//! What models hold, under names that clash with none of candle's: `use candle_dropout::prelude::*;` beside
//! `use candle_core::*;` and `use candle_nn::*;`, or beside `use candle_dropout::nn::*;`.
//!
//! Ops stay behind their module, `functional`, and what replaces an item of candle's stays in
//! [`nn`](crate::nn), so that no name depends on which import came first.

pub use crate::functional;
pub use crate::layers::{
    AlphaDropout, BroadcastDropout, ClassicDropout, ConcreteDropout, ConcreteDropoutConfig, Cutout,
    DropBlock2d, DropConnectConv2d, DropConnectLinear, DropHead, DropPath, Dropout1d, Dropout2d,
    Dropout3d, EmbeddingDropout, EvalGuard, FeatureAlphaDropout, GaussianDropout, GaussianNoise,
    Gru, LayerDrop, LockedDropout, LoraConfig, LoraLinear, Lstm, MaskPer, McDropout, McPrediction,
    MultiHeadAttention, MultiHeadAttentionConfig, MultiSampleDropout, RateClock, RateSchedule,
    RecurrentDropout, RecurrentMasks, Rope, RopeConfig, RopeScaling, ScheduledRate, Switched,
    TokenDropout, TrainMode, VariationalConv2d, VariationalLinear, Zoneout, kl_weight, set_seed,
};
pub use crate::mask::{DropMask, MaskGenerator, MaskKey, MaskState, NoiseKey, Rate};
pub use crate::transformer::{
    Architecture, GenerationConfig, Transformer, TransformerConfig, TransformerRates,
};
pub use crate::vars::{check_pretrained_vars, pretrained_var_builder, seeded_var_builder};
