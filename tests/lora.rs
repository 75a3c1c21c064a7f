//! `LoraLinear`: the formula, what learns and what is frozen, merging, and what is refused.

use std::sync::Arc;

use candle_core::{DType, Device, Error, ModuleT, Result, Tensor, Var};
use candle_dropout::training::{AdamW, ParamsAdamW};
use candle_dropout::{
    DropMask, LoraConfig, LoraLinear, MaskGenerator, MaskKey, TrainMode, seeded_var_builder,
};
use candle_nn::{Linear, Module, Optimizer, VarBuilder, VarMap};
use cases::runner::same_bits;
use cases::{DTYPES, bits, dropout, epsilon, error, largest, random};

fn generator(seed: u64) -> Arc<MaskGenerator> {
    Arc::new(MaskGenerator::new(seed))
}

const IN: usize = 24;
const OUT: usize = 10;

/// A layer whose adapter has learnt something, and what it was made of.
struct Layer {
    layer: LoraLinear,
    adapter: VarMap,
    base: [Var; 2],
}

impl Layer {
    fn new(config: &LoraConfig, dtype: DType, seed: u64) -> Result<Self> {
        let base = [random(&[OUT, IN], dtype, 1)?, random(&[OUT], dtype, 2)?];
        let base = [Var::from_tensor(&base[0])?, Var::from_tensor(&base[1])?];
        let adapter = VarMap::new();
        let vb = seeded_var_builder(&adapter, 1, dtype, &Device::Cpu);
        let [weight, bias] = &base;
        let linear = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
        let layer = LoraLinear::new(linear, config, generator(seed), vb)?;
        let layer = Self { layer, adapter, base };
        layer.var("lora_B.weight").set(&random(&[OUT, config.r], dtype, 3)?)?;
        Ok(layer)
    }

    fn var(&self, name: &str) -> Var {
        self.adapter.data().lock().unwrap()[name].clone()
    }
}

fn config(r: usize, lora_dropout: f64) -> LoraConfig {
    LoraConfig { r, lora_alpha: 6., lora_dropout, ..Default::default() }
}

// ---- the formula ----

/// `x Wᵀ + b + scaling (dropout(x) Aᵀ) Bᵀ` of candle's ops.
fn formula(
    x: &Tensor,
    [weight, bias, a, b]: [&Tensor; 4],
    scaling: f64,
    (keep, drop_scale): (&Tensor, f64),
) -> Result<Tensor> {
    let base = x.matmul(&weight.t()?)?.broadcast_add(bias)?;
    let dropped = dropout::formula(x, keep, drop_scale)?;
    base + (dropped.matmul(&a.t()?)?.matmul(&b.t()?)? * scaling)?
}

#[test]
fn output_and_gradients_are_those_of_the_formula_and_the_frozen_layer_gets_none() -> Result<()> {
    for dtype in DTYPES {
        for (train, drop_p) in [(true, 0.3), (true, 0.), (true, 1.), (false, 0.3)] {
            let Layer { layer, base, adapter } = Layer::new(&config(4, drop_p), dtype, 7)?;
            let x = Var::from_tensor(&random(&[5, IN], dtype, 4)?)?;
            let dy = random(&[5, OUT], dtype, 5)?;
            let y = layer.forward(&x, train)?;
            let grads = (&y * &dy)?.backward()?;
            assert!(base.iter().all(|var| grads.get(var).is_none()), "frozen");

            let drop = match train {
                true => DropMask::new(drop_p, MaskKey::derive(7, 0))?,
                false => DropMask::none(),
            };
            let keep = drop.to_tensor((5, IN), &Device::Cpu)?;
            let vars = adapter.data().lock().unwrap().clone();
            let learns = [x.clone(), vars["lora_A.weight"].clone(), vars["lora_B.weight"].clone()];
            // The formula in a dtype: its output, and the gradients of x, A and B.
            let naive = |dtype: DType| -> Result<Vec<Tensor>> {
                let as_var = |x: &Var| Var::from_tensor(&x.as_detached_tensor().to_dtype(dtype)?);
                let [weight, bias] = [as_var(&base[0])?, as_var(&base[1])?];
                let [x, a, b] = [as_var(&learns[0])?, as_var(&learns[1])?, as_var(&learns[2])?];
                let mask = (&keep, cases::drop_scale(&drop));
                let y = formula(&x, [&weight, &bias, &a, &b], 6. / 4., mask)?;
                let grads = (&y * dy.to_dtype(dtype)?)?.backward()?;
                let of = |var: &Var| grads.get(var).expect("a gradient").to_dtype(DType::F64);
                Ok(vec![y.to_dtype(DType::F64)?, of(&x)?, of(&a)?, of(&b)?])
            };
            let (exact, naive) = (naive(DType::F64)?, naive(dtype)?);
            let of = |var: &Var| grads.get(var).expect("a gradient").clone();
            let ours = [y, of(&learns[0]), of(&learns[1]), of(&learns[2])];
            for (at, ((ours, exact), naive)) in ours.iter().zip(&exact).zip(&naive).enumerate() {
                let off = error(&ours.to_dtype(DType::F64)?, exact)?;
                // The scale is applied elsewhere: a rounding more on each side.
                let bound = 2. * error(naive, exact)? + 4. * epsilon(dtype) * largest(exact)?;
                assert!(
                    off <= bound,
                    "{dtype:?}, train {train}, drop_p {drop_p}: result {at} is off by {off}, allowed {bound}"
                );
                assert!(drop_p == 1. || largest(exact)? > 0.1);
            }
        }
    }
    Ok(())
}

#[test]
fn dropout_is_on_the_adapters_input_alone() -> Result<()> {
    for dtype in DTYPES {
        let Layer { layer, .. } = Layer::new(&config(4, 1.), dtype, 7)?;
        let x = random(&[5, IN], dtype, 4)?;
        // Nothing goes into the adapter; a sum with 0 has the bits of before, but for a -0.
        let base = (layer.base_layer().forward(&x)? + 0.)?;
        same_bits(&layer.forward(&x, true)?, &base, "all dropped")?;
        assert_ne!(bits(&layer.forward(&x, false)?)?, bits(&base)?);
    }
    Ok(())
}

#[test]
fn a_call_draws_one_key_in_training_whatever_the_rate_and_none_in_evaluation() -> Result<()> {
    let x = random(&[5, IN], DType::F32, 4)?;
    for drop_p in [0., 0.3, 1.] {
        let base = Linear::new(random(&[OUT, IN], DType::F32, 1)?, None);
        let (vars, generator) = (VarMap::new(), generator(7));
        let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
        let layer = LoraLinear::new(base, &config(4, drop_p), generator.clone(), vb)?;
        for (train, keys) in [(true, 1), (false, 1), (true, 2)] {
            layer.forward_t(&x, train)?;
            assert_eq!(generator.state().counter, keys, "drop_p {drop_p}");
        }
    }
    Ok(())
}

#[test]
fn an_adapter_in_f32_serves_a_layer_in_bf16() -> Result<()> {
    let base = Linear::new(random(&[OUT, IN], DType::BF16, 1)?, None);
    let vars = VarMap::new();
    let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
    let mut layer = LoraLinear::new(base, &config(4, 0.3), generator(7), vb)?;
    vars.data().lock().unwrap()["lora_B.weight"].set(&random(&[OUT, 4], DType::F32, 3)?)?;
    let x = random(&[5, IN], DType::BF16, 4)?;
    let y = layer.forward(&x, true)?;
    assert_eq!(y.dtype(), DType::BF16);
    let grads = y.sum_all()?.backward()?;
    for var in vars.all_vars() {
        assert_eq!(grads.get(&var).expect("a gradient").dtype(), DType::F32);
    }
    let before = layer.forward(&x, false)?.to_dtype(DType::F64)?;
    layer.merge()?;
    assert_eq!(layer.weight().dtype(), DType::BF16);
    let after = layer.forward(&x, false)?.to_dtype(DType::F64)?;
    // 24 weights, each rounded by half a unit at most, of some 8 by 2.
    assert!(error(&before, &after)? <= 24. * 8. * 2. * epsilon(DType::BF16) / 2.);
    Ok(())
}

// ---- PEFT's conventions, by its own tests ----

#[test]
fn scaling_is_alpha_over_the_rank_or_over_its_root() -> Result<()> {
    let scaling = |r: usize, lora_alpha: f64, use_rslora: bool| {
        let config = LoraConfig { r, lora_alpha, use_rslora, ..Default::default() };
        Layer::new(&config, DType::F32, 1).map(|layer| layer.layer.scaling())
    };
    assert_eq!(scaling(8, 8., false)?, 1.);
    assert_eq!(scaling(16, 32., false)?, 2.);
    assert_eq!(scaling(16, 32., true)?, 8.);
    assert_eq!(scaling(9, 12., true)?, 4.);
    let default = LoraConfig { r: 8, lora_alpha: 8., lora_dropout: 0., use_rslora: false };
    assert_eq!(LoraConfig::default(), default);
    Ok(())
}

#[test]
fn a_new_adapter_adds_nothing_and_starts_as_pefts() -> Result<()> {
    let (in_dim, r) = (400, 64);
    let base = Linear::new(random(&[OUT, in_dim], DType::F32, 1)?, None);
    let vars = VarMap::new();
    let vb = seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
    let layer = LoraLinear::new(
        base.clone(),
        &config(r, 0.3),
        generator(7),
        vb.pp("base_model.model.q_proj"),
    )?;
    let x = random(&[5, in_dim], DType::F32, 4)?;
    let expected = (Module::forward(&candle_dropout::nn::Linear::from(base), &x)? + 0.)?;
    for train in [true, false] {
        same_bits(&(layer.forward(&x, train)? + 0.)?, &expected, "at first")?;
    }
    let mut names: Vec<_> = vars.data().lock().unwrap().keys().cloned().collect();
    names.sort();
    let of = |name: &str| format!("base_model.model.q_proj.{name}.weight");
    assert_eq!(names, [of("lora_A"), of("lora_B")]);

    assert_eq!((layer.lora_a().dims(), layer.lora_b().dims()), (&[r, in_dim][..], &[OUT, r][..]));
    assert_eq!(layer.lora_b().abs()?.max_all()?.to_scalar::<f32>()?, 0.);
    // Kaiming with a gain of sqrt(2 / (1 + 5)): a bound of sqrt(3 / 3 / in).
    let bound = 1. / (in_dim as f64).sqrt();
    let a = layer.lora_a().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    assert!(a.iter().all(|a| a.abs() <= bound * (1. + 1e-6)));
    let (n, variance) = (a.len() as f64, bound * bound / 3.);
    let z = a.iter().sum::<f64>() / n / (variance / n).sqrt();
    assert!(z.abs() < 5., "mean {z} standard deviations from 0");
    // The variance of the square of a uniform number is 4/5 of its mean, squared.
    let squares = a.iter().map(|a| a * a).sum::<f64>() / n;
    let z = (squares - variance) / (variance * (0.8 / n).sqrt());
    assert!(z.abs() < 5., "variance {z} standard deviations off");
    Ok(())
}

#[test]
fn merged_is_unmerged_to_rounding_and_unmerging_restores_every_bit() -> Result<()> {
    for dtype in DTYPES {
        for use_rslora in [false, true] {
            let config = LoraConfig { use_rslora, ..config(4, 0.3) };
            let Layer { mut layer, adapter, base } = Layer::new(&config, dtype, 7)?;
            let x = random(&[5, IN], dtype, 4)?;
            let (frozen, before) = (bits(layer.weight())?, layer.forward(&x, false)?);
            layer.merge()?;
            assert!(layer.is_merged());
            let merged = layer.forward(&x, false)?;
            let [wide, exact] = [&merged, &before].map(|x| x.to_dtype(DType::F64).unwrap());
            // 24 products of weights up to 16 with numbers up to 2, each weight rounded once, beside the rounding of
            // the sums.
            let bound = 24. * 16. * 2. * epsilon(dtype);
            assert!(error(&wide, &exact)? <= bound, "{dtype:?}");
            assert_ne!(bits(layer.weight())?, frozen);
            // What was learnt since is merged anew, from the frozen weight.
            let once = bits(layer.weight())?;
            layer.merge()?;
            assert_eq!(bits(layer.weight())?, once, "merged twice");
            adapter.data().lock().unwrap()["lora_B.weight"].set(&Tensor::zeros(
                (OUT, 4),
                dtype,
                &Device::Cpu,
            )?)?;
            layer.merge()?;
            same_bits(layer.weight(), &(base[0].as_tensor() + 0.)?, "an adapter of zeros")?;
            adapter.data().lock().unwrap()["lora_B.weight"].set(&random(&[OUT, 4], dtype, 3)?)?;
            layer.merge()?;
            layer.unmerge();
            assert!(!layer.is_merged());
            assert_eq!(bits(layer.weight())?, frozen, "{dtype:?}");
            same_bits(&layer.forward(&x, false)?, &before, "unmerged")?;
        }
    }
    Ok(())
}

#[test]
fn only_the_adapter_moves_and_it_learns() -> Result<()> {
    // The frozen layer beside one that differs by a matrix of rank 2, which an adapter of rank 2 can learn whole.
    let config = LoraConfig { r: 2, lora_alpha: 2., lora_dropout: 0.1, ..Default::default() };
    let Layer { mut layer, adapter, base } = Layer::new(&config, DType::F32, 7)?;
    adapter.data().lock().unwrap()["lora_B.weight"].set(&Tensor::zeros(
        (OUT, 2),
        DType::F32,
        &Device::Cpu,
    )?)?;
    let frozen = [bits(&base[0])?, bits(&base[1])?];
    let delta =
        (random(&[OUT, 2], DType::F32, 8)?.matmul(&random(&[2, IN], DType::F32, 9)?)? * 0.2)?;
    let x = random(&[256, IN], DType::F32, 10)?;
    let target = (layer.forward(&x, false)?.detach() + x.matmul(&delta.t()?)?)?;
    let loss = |layer: &LoraLinear, train| (layer.forward(&x, train)? - &target)?.sqr()?.mean_all();
    let before = loss(&layer, false)?.to_scalar::<f32>()?;
    let params = ParamsAdamW { lr: 0.02, weight_decay: 0., ..Default::default() };
    let mut optimizer = AdamW::new(adapter.all_vars(), params)?;
    for step in 0..600 {
        if step == 400 {
            layer.set_drop_p(0.)?;
        }
        optimizer.backward_step(&loss(&layer, true)?)?;
    }
    let after = loss(&layer, false)?.to_scalar::<f32>()?;
    assert!(after < before / 1000., "the loss fell from {before} to {after}");
    assert_eq!([bits(&base[0])?, bits(&base[1])?], frozen);
    Ok(())
}

#[test]
fn a_switch_says_whether_it_drops() -> Result<()> {
    let Layer { layer, .. } = Layer::new(&config(4, 0.5), DType::F32, 7)?;
    let (mode, x) = (TrainMode::new(), random(&[5, IN], DType::F32, 4)?);
    let expected = layer.forward(&x, false)?;
    let layer = layer.switched(&mode);
    assert_ne!(bits(&layer.forward(&x)?)?, bits(&expected)?);
    let _eval = mode.eval();
    same_bits(&layer.forward(&x)?, &expected, "in evaluation")
}

// ---- what is refused ----

#[track_caller]
fn refused<T>(result: Result<T>, expected: &str) {
    let error = result.err().map(|error: Error| error.to_string()).unwrap_or_default();
    assert!(error.starts_with(expected), "expected {expected:?}, got {error:?}");
}

#[test]
fn errors_name_layer_argument_expected_got_and_remedy() -> Result<()> {
    let vars = VarMap::new();
    let vb = || seeded_var_builder(&vars, 1, DType::F32, &Device::Cpu);
    let weight = random(&[OUT, IN], DType::F32, 1)?;
    let made = |weight: &Tensor, config: &LoraConfig, vb: VarBuilder| {
        LoraLinear::new(Linear::new(weight.clone(), None), config, generator(1), vb)
    };
    let plain = LoraConfig::default();
    refused(
        made(&weight, &LoraConfig { r: 0, ..plain.clone() }, vb()),
        "lora_linear: r: expected a rank of at least 1, got 0;",
    );
    for lora_alpha in [f64::NAN, f64::INFINITY] {
        let config = LoraConfig { lora_alpha, ..plain.clone() };
        refused(made(&weight, &config, vb()), "lora_linear: lora_alpha: expected a finite number");
    }
    for lora_dropout in [-0.1, 1.1, f64::NAN] {
        let config = LoraConfig { lora_dropout, ..plain.clone() };
        refused(made(&weight, &config, vb()), "lora_linear: drop_p: expected a probability");
    }
    refused(made(&weight.get(0)?, &plain, vb()), "lora_linear: base: expected a weight [out, in]");
    assert!(vars.all_vars().is_empty(), "nothing is made for what is refused");

    let mut layer = made(&weight, &plain, vb())?;
    assert!(made(&weight, &LoraConfig { r: 4, ..plain }, vb()).is_err(), "variables of rank 8");
    assert!(layer.set_drop_p(2.).is_err());
    assert_eq!(layer.drop_p(), 0.);
    layer.merge()?;
    let x = random(&[5, IN], DType::F32, 4)?;
    refused(
        layer.forward(&x, true),
        "lora_linear: train: expected false where the adapter is merged, got true; call unmerge",
    );
    layer.unmerge();
    layer.forward(&x, true)?;
    Ok(())
}
