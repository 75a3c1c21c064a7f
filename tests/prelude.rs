//! The prelude beside everything that candle exports: each of its names is unambiguous.

// Where a glob passes through another, rustc only warns and takes the first.
#![deny(ambiguous_glob_imports)]

/// Imports names from a scope of three globs, which fails to compile where one of them means two things.
macro_rules! names_beside {
    ($scope:ident, $library:ident $(:: $nn:ident)?, $names:tt) => {
        mod $scope {
            #[allow(unused_imports)]
            mod scope {
                pub use candle_core::*;
                pub use $library$(::$nn)?::*;
                pub use candle_dropout::prelude::*;
            }
            #[allow(unused_imports)]
            pub use scope::$names;
        }
    };
}

macro_rules! names_beside_both {
    ({$($name:ident),+ $(,)?}) => {
        names_beside!(candles, candle_nn, {$($name),+});
        names_beside!(ours, candle_dropout::nn, {$($name),+});

        const NAMES: &[&str] = &[$(stringify!($name)),+];
    };
}

names_beside_both!({
    AlphaDropout, Architecture, BroadcastDropout, ClassicDropout, ConcreteDropout,
    ConcreteDropoutConfig, Cutout, DropBlock2d, DropConnectConv2d, DropConnectLinear, DropHead,
    DropMask, DropPath, Dropout1d, Dropout2d, Dropout3d, EmbeddingDropout, EvalGuard,
    FeatureAlphaDropout, GaussianDropout, GaussianNoise, GenerationConfig, Gru, LayerDrop,
    LockedDropout, LoraConfig, LoraLinear, Lstm, MaskGenerator, MaskKey, MaskPer, MaskState,
    McDropout, McPrediction, MultiHeadAttention, MultiHeadAttentionConfig, MultiSampleDropout,
    NoiseKey, Rate, RateClock, RateSchedule, RecurrentDropout, RecurrentMasks, Rope, RopeConfig,
    RopeScaling, ScheduledRate, Switched, TokenDropout, TrainMode, Transformer,
    TransformerConfig, TransformerRates, VariationalConv2d, VariationalLinear, Zoneout,
    check_pretrained_vars, functional, kl_weight, pretrained_var_builder, seeded_var_builder,
    set_seed,
});

#[test]
fn these_are_all_names_of_the_prelude() {
    let source = include_str!("../src/prelude.rs");
    let exports = source.split("pub use ").skip(1).map(|export| export.split(';').next().unwrap());
    let names = exports.flat_map(|export| {
        let last = export.rsplit("::").next().unwrap();
        last.split(['{', '}', ','])
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .collect::<Vec<_>>()
    });
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    let mut expected = NAMES.to_vec();
    expected.sort_unstable();
    assert_eq!(names, expected);
}
