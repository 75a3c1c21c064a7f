//! One text in candle's idioms, compiled with `candle_nn` and with `candle_dropout::nn` in one place of it: whatever it
//! imports, calls and holds is there under the same names, and it computes the same.

use candle_core::{DType, Device, IndexOp, Module, ModuleT, Result, Tensor, Var};
use candle_dropout::seeded_var_builder;
use cases::{epsilon, error, largest, random};

/// What a model written for candle-nn does.
struct Run {
    /// The shapes of its variables, by name.
    vars: Vec<(String, Vec<usize>)>,
    /// The first variable of each layer that needs one to be drawn, as candle draws it.
    drawn: Vec<f32>,
    logits: Tensor,
    losses: Vec<f64>,
    without_gradient: Vec<String>,
}

macro_rules! model_with {
    ($module:ident, $($nn:ident)::+) => {
        mod $module {
            use super::*;

            use $($nn)::+::{
                Activation, AdamW, Conv1d, Conv1dConfig, Dropout, Embedding, Init, LayerNorm,
                LayerNormConfig, Linear, Optimizer, ParamsAdamW, RmsNorm, Sequential, VarBuilder,
                VarMap, embedding, layer_norm, layer_norm_no_bias, linear, linear_b,
                linear_no_bias, rms_norm, seq,
            };
            // Both a module and a function each.
            use $($nn)::+ as nn;
            use nn::kv_cache::ConcatKvCache;
            use nn::layer_norm::layer_norm as layer_norm_again;
            use nn::linear::Linear as LinearAgain;

            /// As a model's configuration file has it.
            #[derive(Clone, Debug, serde::Deserialize)]
            pub struct Config {
                hidden_act: Activation,
                hidden_size: usize,
                vocab_size: usize,
                num_heads: usize,
                dropout: f32,
                layer_norm_eps: f64,
            }

            #[derive(Clone, Debug)]
            struct Attention {
                qkv: Linear,
                out: LinearAgain,
                norm: RmsNorm,
                heads: usize,
                rope: (Tensor, Tensor),
                cache: ConcatKvCache,
            }

            impl Attention {
                fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
                    let size = config.hidden_size;
                    let half = size / config.num_heads / 2;
                    let angles: Vec<f32> = (0..16 * half).map(|at| at as f32 * 0.1).collect();
                    let angles = Tensor::from_vec(angles, (16, half), vb.device())?;
                    let angles = angles.to_dtype(vb.dtype())?;
                    Ok(Self {
                        qkv: linear_b(size, 3 * size, false, vb.pp("qkv"))?,
                        out: linear_no_bias(size, size, vb.pp("out"))?,
                        norm: rms_norm(size, config.layer_norm_eps, vb.pp("norm"))?,
                        heads: config.num_heads,
                        rope: (angles.cos()?, angles.sin()?),
                        cache: ConcatKvCache::new(2),
                    })
                }

                fn forward(&mut self, x: &Tensor) -> Result<Tensor> {
                    let (b, t, c) = x.dims3()?;
                    let qkv = self.norm.forward_diff(x)?.apply(&self.qkv)?;
                    let qkv = qkv.reshape((b, t, 3, self.heads, c / self.heads))?;
                    let heads = |at| qkv.i((.., .., at))?.transpose(1, 2)?.contiguous();
                    let (cos, sin) = &self.rope;
                    let q = nn::rotary_emb::rope(&heads(0)?, cos, sin)?;
                    let k = nn::rotary_emb::rope(&heads(1)?, cos, sin)?;
                    self.cache.reset();
                    let (k, v) = self.cache.append(&k, &heads(2)?)?;
                    let scores = (q.matmul(&k.t()?)? / ((c / self.heads) as f64).sqrt())?;
                    let y = nn::ops::softmax(&scores, candle_core::D::Minus1)?.matmul(&v)?;
                    y.transpose(1, 2)?.reshape((b, t, c))?.apply(&self.out)
                }
            }

            pub struct Model {
                tokens: Embedding,
                conv: Conv1d,
                attention: Attention,
                mlp: Sequential,
                act: Activation,
                drop: Dropout,
                norms: Vec<LayerNorm>,
                last: LayerNorm,
                tied: Linear,
            }

            impl Model {
                fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
                    let (size, eps) = (config.hidden_size, config.layer_norm_eps);
                    let tokens = embedding(config.vocab_size, size, vb.pp("tokens"))?;
                    let padded = Conv1dConfig { padding: 1, ..Default::default() };
                    let mlp = seq()
                        .add(linear(size, 2 * size, vb.pp("mlp.0"))?)
                        .add(config.hidden_act)
                        .add_fn(|x| x * 1.5)
                        .add(nn::linear(2 * size, size, vb.pp("mlp").pp(2))?);
                    let norms = vec![
                        layer_norm::<f64>(size, eps, vb.pp("norms.0"))?,
                        layer_norm_again(
                            size,
                            LayerNormConfig { eps, affine: false, ..Default::default() },
                            vb.pp("norms.1"),
                        )?,
                        layer_norm_no_bias(size, eps, vb.pp("norms.2"))?,
                    ];
                    let weight = vb.get_with_hints(size, "last", Init::Const(1.))?;
                    Ok(Self {
                        conv: nn::conv1d(size, size, 3, padded, vb.pp("conv"))?,
                        attention: Attention::new(config, vb.pp("attention"))?,
                        mlp,
                        act: Activation::default(),
                        drop: Dropout::new(config.dropout),
                        norms,
                        last: RmsNorm::new(weight, eps).into_inner(),
                        tied: Linear::new(tokens.embeddings().clone(), None),
                        tokens,
                    })
                }

                fn forward(&mut self, ids: &Tensor, train: bool) -> Result<Tensor> {
                    let x = self.tokens.forward(ids)?; // [B, T, C]
                    let y = self.conv.forward(&x.transpose(1, 2)?.contiguous()?)?.transpose(1, 2)?;
                    let x = (x + self.drop.forward_t(&y, train)?)?;
                    let x = (&x + self.attention.forward(&x)?)?;
                    // Strided, since candle's own norm of what is contiguous has no gradient.
                    let h = x.transpose(0, 1)?.apply(&self.norms[0])?.transpose(0, 1)?;
                    let x = (&x + self.drop.forward(&h.apply(&self.mlp)?, train)?)?;
                    let x = self.norms[1..].iter().try_fold(x, |x, norm| norm.forward(&x))?;
                    let x = x.apply(&self.act)?;
                    x.apply(&self.last)?.apply(&self.tied)
                }
            }

            /// With variables that are drawn in f32, whatever they are then.
            pub fn run(config: &str, dtype: DType) -> Result<Run> {
                let config: Config = serde_json::from_str(config).map_err(candle_core::Error::wrap)?;
                let first = VarMap::new();
                Model::new(&config, seeded_var_builder(&first, 5, DType::F32, &Device::Cpu))?;
                let first = first.data().lock().expect("no panic before");
                let varmap = VarMap::new();
                for (name, var) in first.iter() {
                    let var = Var::from_tensor(&var.as_tensor().to_dtype(dtype)?.copy()?)?;
                    varmap.data().lock().expect("no panic before").insert(name.clone(), var);
                }
                let vb = VarBuilder::from_varmap(&varmap, dtype, &Device::Cpu);
                let mut model = Model::new(&config, vb)?;
                let ids = Tensor::new(&[[1u32, 5, 2, 0, 7], [3, 3, 6, 1, 4]], &Device::Cpu)?;
                let next = Tensor::cat(&[ids.narrow(1, 1, 4)?, ids.narrow(1, 0, 1)?], 1)?;
                let next = next.flatten_all()?;
                let logits = model.forward(&ids, false)?;
                let mut vars: Vec<_> = {
                    let data = varmap.data().lock().expect("no panic before");
                    data.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
                };
                vars.sort_by(|(a, _), (b, _)| a.cmp(b));
                let loss = |model: &mut Model| {
                    let logits = model.forward(&ids, false)?;
                    nn::loss::cross_entropy(&logits.flatten_to(1)?, &next)
                };
                let grads = loss(&mut model)?.backward()?;
                let without = vars.iter().filter(|(_, var)| grads.get(var).is_none());
                let without_gradient = without.map(|(name, _)| name.clone()).collect();
                let params = ParamsAdamW { lr: 1e-2, ..Default::default() };
                let mut adamw = AdamW::new(varmap.all_vars(), params)?;
                assert_eq!(adamw.params().lr, adamw.learning_rate());
                let mut losses = Vec::new();
                for _ in 0..20 {
                    let loss = loss(&mut model)?;
                    adamw.backward_step(&loss)?;
                    losses.push(loss.to_dtype(DType::F64)?.to_scalar()?);
                }
                let mut adamw = AdamW::new_lr(varmap.all_vars(), 1e-3)?;
                adamw.set_learning_rate(1e-4);
                adamw.set_params(ParamsAdamW { weight_decay: 0., ..adamw.params().clone() });
                adamw.step(&model.forward(&ids, true)?.sqr()?.mean_all()?.backward()?)?;
                let drawn = ["mlp.0.weight", "mlp.0.bias", "tokens.weight"];
                let drawn = drawn.into_iter().map(|name| first[name].flatten_all()?.get(0)?.to_scalar());
                Ok(Run {
                    drawn: drawn.collect::<Result<_>>()?,
                    vars: vars.iter().map(|(name, var)| (name.clone(), var.dims().to_vec())).collect(),
                    logits,
                    losses,
                    without_gradient,
                })
            }
        }
    };
}

model_with!(candles, candle_nn);
model_with!(ours, candle_dropout::nn);

const CONFIG: &str = r#"{"hidden_act": "gelu_new", "hidden_size": 8, "vocab_size": 9, "num_heads": 2,
                         "dropout": 0.1, "layer_norm_eps": 1e-5}"#;

#[test]
fn a_text_written_for_candle_nn_computes_the_same_and_learns() -> Result<()> {
    let _alone = crate::process_wide_generator();
    let exact = candles::run(CONFIG, DType::F64)?;
    let (candles, ours) = (candles::run(CONFIG, DType::F32)?, ours::run(CONFIG, DType::F32)?);
    assert_eq!(ours.vars, candles.vars);
    assert_eq!(ours.drawn, candles.drawn, "drawn alike");
    // As near to candle's in f64 as candle's in f32 are, twice over, which may be near by chance, or a rounding more.
    let wide = |run: &Run| run.logits.to_dtype(DType::F64);
    let of = |run: &Run| error(&wide(run)?, &exact.logits);
    let (off, their) = (of(&ours)?, of(&candles)?);
    let bound = 2. * their + epsilon(DType::F32) * largest(&exact.logits)?;
    assert!(off <= bound, "{off:e}, candle's {their:e}");
    assert_eq!(ours.without_gradient, [""; 0]);
    // Queries and keys end in `rope`, values in the cache.
    assert_eq!(candles.without_gradient, ["attention.norm.weight", "attention.qkv.weight"]);
    // A loss moves by twice what a logit does at most, and is a mean of 10 sums of 9 terms: 19 roundings.
    let (first, exact) = (ours.losses[0], exact.losses[0]);
    let rounding = 19. * epsilon(DType::F32) * exact;
    assert!((first - exact).abs() <= 2. * bound + rounding, "{first} and {exact}");
    // Each step is one of the whole text, so it lowers the loss; with the variables that candle leaves frozen it ends
    // lower than without.
    assert!(ours.losses.windows(2).all(|pair| pair[1] < pair[0]), "{:?}", ours.losses);
    assert!(ours.losses.last() < candles.losses.last(), "{:?}, {:?}", ours.losses, candles.losses);
    Ok(())
}

#[test]
fn layers_take_and_give_what_candles_take_and_give() -> Result<()> {
    use candle_dropout::nn;
    let weight = random(&[3, 4], DType::F32, 1)?;
    let layer: nn::Linear = nn::Linear::new(weight.clone(), Some(random(&[3], DType::F32, 2)?));
    assert_eq!(
        (layer.weight().dims(), layer.bias().map(Tensor::dims)),
        (&[3, 4][..], Some(&[3][..]))
    );
    assert!(format!("{layer:?}").starts_with("Linear"));
    let norm = nn::LayerNorm::new_no_bias(random(&[4], DType::F32, 3)?, 1e-5);
    assert_eq!((norm.eps(), norm.remove_mean(), norm.bias().is_none()), (1e-5, true, true));
    let norm = nn::LayerNorm::rms_norm(random(&[4], DType::F32, 3)?, 1e-5);
    assert!(!norm.remove_mean());
    let boxed: Vec<Box<dyn Module>> = vec![Box::new(layer.clone()), Box::new(nn::Activation::Relu)];
    let x = random(&[2, 4], DType::F32, 4)?;
    let y = boxed.iter().try_fold(x.clone(), |x, layer| layer.forward(&x))?;
    assert_eq!(y.dims(), [2, 3]);
    // A module is candle's `ModuleT`, too.
    assert_eq!(layer.forward_t(&x, true)?.dims(), [2, 3]);
    Ok(())
}

/// PyTorch's old names of a norm's parameters.
#[test]
fn norms_are_read_under_their_old_names() -> Result<()> {
    use candle_dropout::nn::{VarBuilder, layer_norm};
    let (gamma, beta) = (random(&[4], DType::F32, 1)?, random(&[4], DType::F32, 2)?);
    let tensors = [("gamma".to_string(), gamma.clone()), ("beta".to_string(), beta.clone())];
    let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
    let norm = layer_norm(4, 1e-5, vb)?;
    assert_eq!(norm.weight().to_vec1::<f32>()?, gamma.to_vec1::<f32>()?);
    assert_eq!(norm.bias().expect("one").to_vec1::<f32>()?, beta.to_vec1::<f32>()?);
    Ok(())
}

/// Through functions that take one of the two, whichever a model holds.
#[test]
fn layers_are_made_of_candles_and_back() -> Result<()> {
    use candle_dropout::nn;
    fn same(ours: &dyn Module, candles: &dyn Module, x: &Tensor) -> Result<()> {
        let (ours, candles) = (ours.forward(x)?, candles.forward(x)?);
        let candles = candles.to_dtype(DType::F64)?;
        let off = error(&ours.to_dtype(DType::F64)?, &candles)?;
        // Sums of 12 products, or of 4 squares and what is made of them.
        assert!(off <= 12. * epsilon(DType::F32) * largest(&candles)?, "{off}");
        Ok(())
    }
    let x = random(&[2, 4, 4], DType::F32, 1)?;
    let (weight, bias) = (random(&[4], DType::F32, 2)?, random(&[4], DType::F32, 3)?);
    for (norm, remove_mean, has_bias) in [
        (candle_nn::LayerNorm::new(weight.clone(), bias.clone(), 1e-3), true, true),
        (candle_nn::LayerNorm::new_no_bias(weight.clone(), 1e-3), true, false),
        (candle_nn::LayerNorm::rms_norm(weight.clone(), 1e-3), false, false),
    ] {
        let ours = nn::LayerNorm::from(norm.clone());
        assert_eq!((ours.eps(), ours.remove_mean()), (1e-3, remove_mean));
        assert_eq!(ours.bias().is_some(), has_bias);
        same(&ours, &norm, &x)?;
        let back = candle_nn::LayerNorm::try_from(ours)?;
        assert_eq!((back.eps(), back.remove_mean()), (1e-3, remove_mean));
        assert_eq!(back.bias().is_some(), has_bias);
        same(&back, &norm, &x)?;
    }
    // Both a bias and the mean, which candle makes from variables alone.
    let tensors = [("weight".to_string(), weight.clone()), ("bias".to_string(), bias.clone())];
    let vb = nn::VarBuilder::from_tensors(tensors.into(), DType::F32, &Device::Cpu);
    let config = nn::LayerNormConfig { eps: 1e-3, remove_mean: false, affine: true };
    let norm = candle_nn::layer_norm(4, config, vb)?;
    let ours = nn::LayerNorm::from(norm.clone());
    assert_eq!((ours.remove_mean(), ours.bias().is_some()), (false, true));
    same(&ours, &norm, &x)?;
    let error = candle_nn::LayerNorm::try_from(ours).expect_err("no such constructor").to_string();
    assert!(error.starts_with("layer_norm: bias: expected none in a layer that leaves"), "{error}");

    let norm = candle_nn::RmsNorm::new(weight, 1e-3);
    let ours = nn::RmsNorm::from(norm.clone());
    assert_eq!(ours.eps(), 1e-3);
    same(&ours, &norm, &x)?;
    same(&candle_nn::RmsNorm::from(ours), &norm, &x)?;

    // One sequence, since candle's transposed convolution is wrong for more.
    let (x, weight) = (x.narrow(0, 0, 1)?, random(&[4, 4, 3], DType::F32, 4)?);
    let config = nn::Conv1dConfig { padding: 2, stride: 2, ..Default::default() };
    let conv = candle_nn::Conv1d::new(weight.clone(), Some(bias.clone()), config);
    let ours = nn::Conv1d::from(conv.clone());
    assert_eq!(ours.config(), conv.config());
    same(&ours, &conv, &x)?;
    same(&candle_nn::Conv1d::from(ours), &conv, &x)?;
    let config = nn::ConvTranspose1dConfig { stride: 2, ..Default::default() };
    let conv = candle_nn::ConvTranspose1d::new(weight, Some(bias), config);
    let ours = nn::ConvTranspose1d::from(conv.clone());
    assert_eq!(ours.config(), conv.config());
    same(&ours, &conv, &x)?;
    same(&candle_nn::ConvTranspose1d::from(ours), &conv, &x)
}
