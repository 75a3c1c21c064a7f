//! The public paths of candle-nn, and what `nn` makes of each.
//!
//! One text, since it is one list. `same` is candle's own item; `ours` is this crate's; `refuses` is this crate's, which
//! calls candle's and refuses what tracks a gradient; `there` is a module, which may hold any of these. An item with
//! parameters is listed for the types in brackets.
#![allow(deprecated)] // candle's run_flash_attn_cpu, and ours

use std::any::{type_name, type_name_of_val};

use candle_core::{Result, Tensor};

/// The candle-nn that this is the list of.
pub const VERSION: &str = "0.11.1";

pub struct Entry {
    pub path: String,
    pub kind: &'static str,
    pub verdict: &'static str,
    /// The item as `nn` has it, and as candle-nn has it; nothing where an item has no name at run time.
    pub names: Option<(&'static str, &'static str)>,
}

/// `listed!(verdict kind path [parameters]; ..)` is a function that returns the entries. It compiles only if both
/// crates have every path.
macro_rules! listed {
    ($($verdict:ident $kind:ident $($segment:ident)::+ $([$($type:ty),+])?;)*) => {
        pub fn listed() -> Vec<Entry> {
            vec![$(Entry {
                path: [$(stringify!($segment)),+].join("::"),
                kind: stringify!($kind),
                verdict: stringify!($verdict),
                names: names!($kind [$($segment)::+] [$($($type),+)?]),
            }),*]
        }
    };
}

macro_rules! names {
    (function [$($s:ident)::+] []) => {
        Some((type_name_of_val(&candle_dropout::nn::$($s)::+), type_name_of_val(&candle_nn::$($s)::+)))
    };
    (function [$($s:ident)::+] [$($type:ty),+]) => {
        Some((
            type_name_of_val(&candle_dropout::nn::$($s)::+::<$($type),+>),
            type_name_of_val(&candle_nn::$($s)::+::<$($type),+>),
        ))
    };
    (type [$($s:ident)::+] []) => {
        Some((type_name::<candle_dropout::nn::$($s)::+>(), type_name::<candle_nn::$($s)::+>()))
    };
    (type [$($s:ident)::+] [$($type:ty),+]) => {
        Some((
            type_name::<candle_dropout::nn::$($s)::+<$($type),+>>(),
            type_name::<candle_nn::$($s)::+<$($type),+>>(),
        ))
    };
    // A module, a trait, a constant.
    ($kind:ident [$($s:ident)::+] []) => {{
        #[allow(unused_imports)]
        use {candle_dropout::nn::$($s)::+ as _, candle_nn::$($s)::+ as _};
        None
    }};
}

listed! {
    ours type Activation;
    ours type AdamW;
    same type BatchNorm;
    same type BatchNormConfig;
    ours type Conv1d;
    same type Conv1dConfig;
    same type Conv2d;
    same type Conv2dConfig;
    ours type ConvTranspose1d;
    same type ConvTranspose1dConfig;
    same type ConvTranspose2d;
    same type ConvTranspose2dConfig;
    ours type Dropout;
    same type Embedding;
    same type Func;
    same type FuncT;
    same type GRU;
    same type GRUConfig;
    same type GroupNorm;
    same type Init;
    same type LSTM;
    same type LSTMConfig;
    ours type LayerNorm;
    same type LayerNormConfig;
    ours type Linear;
    same trait Module;
    same trait ModuleT;
    same trait Optimizer;
    same type PReLU;
    same type ParamsAdamW;
    same trait RNN;
    ours type RmsNorm;
    same type SGD;
    same type Sequential;
    same type VarBuilder;
    same type VarMap;
    there module activation;
    there module attention;
    same function batch_norm [f64];
    there module batch_norm;
    there module conv;
    ours function conv1d;
    ours function conv1d_no_bias;
    same function conv2d;
    same function conv2d_no_bias;
    ours function conv_transpose1d;
    ours function conv_transpose1d_no_bias;
    same function conv_transpose2d;
    same function conv_transpose2d_no_bias;
    there module cpu_flash_attention;
    same function embedding;
    there module embedding;
    there module encoding;
    same function func [fn(&Tensor) -> Result<Tensor>];
    there module func;
    same function func_t [fn(&Tensor, bool) -> Result<Tensor>];
    same function group_norm;
    there module group_norm;
    same function gru;
    there module init;
    there module kv_cache;
    ours function layer_norm [f64];
    there module layer_norm;
    ours function layer_norm_no_bias;
    ours function linear;
    there module linear;
    ours function linear_b;
    ours function linear_no_bias;
    there module loss;
    same function lstm;
    there module moe;
    there module ops;
    there module optim;
    same function prelu;
    ours function rms_norm;
    there module rnn;
    there module rotary_emb;
    there module sampling;
    same function seq;
    there module sequential;
    there module var_builder;
    there module var_map;
    there module varlen_attention;
    ours type activation::Activation;
    same type activation::PReLU;
    same function activation::prelu;
    same type attention::AttnMask;
    there module attention::cpu_flash;
    refuses function attention::flash_attn [f32];
    refuses function attention::flash_attn_varlen_cpu;
    refuses function attention::flash_attn_varlen_unfused;
    there module attention::varlen;
    there module attention::cpu_flash::causal;
    refuses function attention::cpu_flash::flash_attn [f32];
    there module attention::cpu_flash::standard;
    there module attention::cpu_flash::varlen;
    same function attention::cpu_flash::causal::causal_decode_f32_interleaved;
    refuses function attention::cpu_flash::causal::run_causal_attn_cpu [f32];
    refuses function attention::cpu_flash::standard::run_flash_attn_cpu [f32];
    refuses function attention::cpu_flash::varlen::flash_attn_varlen_cpu;
    refuses function attention::varlen::flash_attn_varlen_unfused;
    same type batch_norm::BatchNorm;
    same type batch_norm::BatchNormConfig;
    same function batch_norm::batch_norm [f64];
    ours type conv::Conv1d;
    same type conv::Conv1dConfig;
    same type conv::Conv2d;
    same type conv::Conv2dConfig;
    ours type conv::ConvTranspose1d;
    same type conv::ConvTranspose1dConfig;
    same type conv::ConvTranspose2d;
    same type conv::ConvTranspose2dConfig;
    ours function conv::conv1d;
    ours function conv::conv1d_no_bias;
    same function conv::conv2d;
    same function conv::conv2d_no_bias;
    ours function conv::conv_transpose1d;
    ours function conv::conv_transpose1d_no_bias;
    same function conv::conv_transpose2d;
    same function conv::conv_transpose2d_no_bias;
    refuses function cpu_flash_attention::run_flash_attn_cpu [f32];
    same type embedding::Embedding;
    same function embedding::embedding;
    same function encoding::one_hot [f32];
    same type func::Func;
    same type func::FuncT;
    same function func::func [fn(&Tensor) -> Result<Tensor>];
    same function func::func_t [fn(&Tensor, bool) -> Result<Tensor>];
    same type group_norm::GroupNorm;
    same function group_norm::group_norm;
    same constant init::DEFAULT_KAIMING_NORMAL;
    same constant init::DEFAULT_KAIMING_UNIFORM;
    same type init::FanInOut;
    same type init::Init;
    same type init::NonLinearity;
    same type init::NormalOrUniform;
    same constant init::ONE;
    same constant init::ZERO;
    ours type kv_cache::Cache;
    ours type kv_cache::ConcatKvCache;
    same type kv_cache::IndicesAndMask;
    ours type kv_cache::InterleavedKvCache;
    ours type kv_cache::KvCache;
    same type kv_cache::RawInterleavedKvCache;
    ours type kv_cache::RotatingCache;
    ours type kv_cache::RotatingKvCache;
    ours type kv_cache::ScatteredCacheBuilder;
    refuses type kv_cache::ScatteredKvCache;
    same function kv_cache::rope_i_inplace;
    ours type layer_norm::LayerNorm;
    same type layer_norm::LayerNormConfig;
    ours type layer_norm::RmsNorm;
    ours function layer_norm::layer_norm [f64];
    ours function layer_norm::layer_norm_no_bias;
    ours function layer_norm::rms_norm;
    ours type linear::Linear;
    ours function linear::linear;
    ours function linear::linear_b;
    ours function linear::linear_no_bias;
    ours function loss::binary_cross_entropy_with_logit;
    ours function loss::cross_entropy;
    same function loss::huber;
    same function loss::mse;
    same function loss::nll;
    refuses function moe::moe_gemm;
    refuses function moe::moe_gemm_gguf;
    ours type ops::Dropout;
    same type ops::Identity;
    ours function ops::dropout;
    same function ops::hard_sigmoid;
    ours function ops::layer_norm;
    same function ops::layer_norm_slow;
    same function ops::leaky_relu;
    ours function ops::log_softmax [usize];
    ours function ops::mish;
    same function ops::pixel_shuffle;
    same function ops::pixel_unshuffle;
    same function ops::replication_pad2d;
    ours function ops::rms_norm;
    same function ops::rms_norm_slow;
    refuses function ops::sdpa;
    ours function ops::selu;
    ours function ops::sigmoid;
    ours function ops::silu;
    ours function ops::softmax [usize];
    ours function ops::softmax_last_dim;
    ours function ops::swiglu;
    ours type optim::AdamW;
    same trait optim::Optimizer;
    same type optim::ParamsAdamW;
    same type optim::SGD;
    same type rnn::Direction;
    same type rnn::GRU;
    same type rnn::GRUConfig;
    same type rnn::GRUState;
    same type rnn::LSTM;
    same type rnn::LSTMConfig;
    same type rnn::LSTMState;
    same trait rnn::RNN;
    same function rnn::gru;
    same function rnn::lstm;
    ours function rotary_emb::rope;
    ours function rotary_emb::rope_i;
    same function rotary_emb::rope_i_slow;
    same function rotary_emb::rope_slow;
    ours function rotary_emb::rope_thd;
    same function sampling::gumbel_softmax [usize];
    same type sequential::Sequential;
    same function sequential::seq;
    same trait var_builder::Backend;
    same type var_builder::Rename [Box<dyn Fn(&str) -> String + Sync + Send>];
    same trait var_builder::Renamer;
    same type var_builder::SafeTensorWithRouting;
    same type var_builder::Shard;
    same type var_builder::ShardedSafeTensors;
    same type var_builder::ShardedVarBuilder;
    same trait var_builder::SimpleBackend;
    same type var_builder::VarBuilder;
    same type var_builder::VarBuilderArgs [Box<dyn candle_nn::var_builder::SimpleBackend>];
    same type var_map::VarMap;
    refuses function varlen_attention::flash_attn_varlen_unfused;
}
