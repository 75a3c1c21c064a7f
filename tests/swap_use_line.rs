//! One model written for candle, compiled twice, with one `use` line swapped: with candle-nn's norms
//! everything before the last of them stays as it was made, with ours it learns.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Module, ModuleT, Result, Tensor};
use candle_dropout::seeded_var_builder;
use candle_nn::{AdamW, Embedding, Linear, Optimizer, VarBuilder, VarMap, embedding, linear};

/// What training did.
struct Trained {
    /// Losses without dropout, before and after.
    losses: [f32; 2],
    /// The parameters whose values are still those they were made with.
    frozen: Vec<String>,
}

macro_rules! model_with {
    ($module:ident, $import:item) => {
        mod $module {
            use super::*;
            $import

            /// The sum of the embeddings of a sentence, two blocks, a head.
            pub struct Classifier {
                tokens: Embedding,
                norm_1: LayerNorm,
                up: Linear,
                drop: Dropout,
                down: Linear,
                norm_2: RmsNorm,
                head: Linear,
            }

            impl Classifier {
                pub fn new(vb: VarBuilder) -> Result<Self> {
                    Ok(Self {
                        tokens: embedding(11, 8, vb.pp("tokens"))?,
                        norm_1: layer_norm(8, 1e-5, vb.pp("norm_1"))?,
                        up: linear(8, 16, vb.pp("up"))?,
                        drop: Dropout::new(0.1),
                        down: linear(16, 8, vb.pp("down"))?,
                        norm_2: rms_norm(8, 1e-5, vb.pp("norm_2"))?,
                        head: linear(8, 3, vb.pp("head"))?,
                    })
                }
            }

            impl ModuleT for Classifier {
                fn forward_t(&self, ids: &Tensor, train: bool) -> Result<Tensor> {
                    let x = self.tokens.forward(ids)?.sum(1)?; // [B, C]
                    let h = self.norm_1.forward(&x)?.apply(&self.up)?.relu()?; // [B, 2 C]
                    let x = (x + self.drop.forward(&h, train)?.apply(&self.down)?)?; // [B, C]
                    self.norm_2.forward(&x)?.apply(&self.head)
                }
            }

            pub fn train() -> Result<Trained> {
                super::train(|vb| Ok(Box::new(Classifier::new(vb)?)))
            }
        }
    };
}

model_with!(candles, use candle_nn::{Dropout, LayerNorm, RmsNorm, layer_norm, rms_norm};);
model_with!(ours, use candle_dropout::nn::{Dropout, LayerNorm, RmsNorm, layer_norm, rms_norm};);

/// Trains on sentences whose class is that of their largest token.
fn train(model: impl Fn(VarBuilder) -> Result<Box<dyn ModuleT>>) -> Result<Trained> {
    let vars = VarMap::new();
    let model = model(seeded_var_builder(&vars, 4, DType::F32, &Device::Cpu))?;
    let values = || -> Result<BTreeMap<String, Vec<f32>>> {
        let vars = vars.data().lock().unwrap();
        vars.iter().map(|(name, var)| Ok((name.clone(), var.flatten_all()?.to_vec1()?))).collect()
    };
    let made = values()?;
    let ids: Vec<u32> = (0..64 * 3).map(|at| at * at * 7 % 11).collect();
    let ids = Tensor::from_vec(ids, (64, 3), &Device::Cpu)?;
    let classes =
        (ids.max(D::Minus1)?.to_dtype(DType::F32)? / 4.)?.floor()?.to_dtype(DType::U32)?;
    let mut adamw = AdamW::new_lr(vars.all_vars(), 1e-2)?;
    let loss = |train| -> Result<Tensor> {
        candle_nn::loss::cross_entropy(&model.forward_t(&ids, train)?, &classes)
    };
    let before = loss(false)?.to_scalar()?;
    for _ in 0..60 {
        adamw.backward_step(&loss(true)?)?;
    }
    let losses = [before, loss(false)?.to_scalar()?];
    let trained = values()?;
    let frozen = made.into_iter().filter(|(name, value)| &trained[name] == value);
    Ok(Trained { losses, frozen: frozen.map(|(name, _)| name).collect() })
}

#[test]
fn what_is_frozen_under_candles_norms_learns_under_ours() -> Result<()> {
    let (candles, ours) = (candles::train()?, ours::train()?);
    let upstream = [
        "down.bias",
        "down.weight",
        "norm_1.bias",
        "norm_1.weight",
        "norm_2.weight",
        "tokens.weight",
        "up.bias",
        "up.weight",
    ];
    // No error tells: the head alone learns.
    assert_eq!(candles.frozen, upstream);
    assert_eq!(ours.frozen, [""; 0]);
    let ([before, learnt], [same, barely]) = (ours.losses, candles.losses);
    assert!((before - same).abs() < 1e-5, "the same function: {before} and {same}");
    assert!(learnt < 0.3 * barely, "{learnt} and {barely}");
    Ok(())
}
