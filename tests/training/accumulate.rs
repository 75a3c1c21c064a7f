//! Micro-batches of any sizes give the gradient of the batch.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::functional::{Reduction, counted_targets};
use candle_dropout::training::{GradAccumulator, check_gradients};
use proptest::prelude::*;

use super::*;

/// A model in f64 without dropout, `[windows, 10]` token ids and their targets.
fn model(windows: usize) -> Result<(Transformer, NamedVars, Tensor, Tensor)> {
    let config = TransformerConfig {
        vocab_size: 13,
        max_position_embeddings: 10,
        hidden_size: 8,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        ..TransformerConfig::gpt2()
    };
    let map = VarMap::new();
    let vb = seeded_var_builder(&map, 1, DType::F64, &Device::Cpu);
    let config = config.with_dropout(0.);
    let gpt = Transformer::new(&config, Arc::new(MaskGenerator::new(1)), vb)?;
    let ids = |by: u32| -> Result<Tensor> {
        let ids: Vec<u32> = (0..windows as u32 * 10).map(|i| (i * i * by + i / 7) % 13).collect();
        Tensor::from_vec(ids, (windows, 10), &Device::Cpu)
    };
    Ok((gpt, named_vars(&map)?, ids(3)?, ids(5)?))
}

/// The largest difference of two gradients, over the largest element of the first.
fn difference(vars: &NamedVars, a: &GradStore, b: &GradStore) -> Result<f64> {
    let (mut off, mut size) = (0f64, 0f64);
    for (name, var) in vars {
        let (a, b) = (a.get(var), b.get(var));
        let (Some(a), Some(b)) = (a, b) else { candle_core::bail!("{name} has no gradient") };
        off = off.max(cases::error(a, b)?);
        size = size.max(cases::largest(a)?);
    }
    Ok(off / size)
}

/// A weight that is a sum over so many tokens, of what a dozen roundings a token have made.
const TOLERANCE: f64 = 110. * 12. * f64::EPSILON;

/// The gradient of all 110 tokens, its difference to that of micro-batches of so many windows each whose losses
/// are sums, and to the mean of their means.
fn differences(sizes: &[usize]) -> Result<[f64; 2]> {
    let windows = sizes.iter().sum();
    let (gpt, vars, ids, targets) = model(windows)?;
    let loss = |start: usize, windows: usize, reduction: Reduction| -> Result<(Tensor, usize)> {
        let logits = gpt.forward(&ids.narrow(0, start, windows)?, false)?;
        let targets = targets.narrow(0, start, windows)?;
        let config = CrossEntropyConfig { reduction, ..Default::default() };
        Ok((cross_entropy(&logits, &targets, &config)?, counted_targets(&targets, &config)?))
    };
    let whole = loss(0, windows, Reduction::Mean)?.0.backward()?;
    check_gradients(&vars, &whole)?;
    let mut accumulator = GradAccumulator::new(&vars);
    let mut accumulated = |reduction: Reduction| -> Result<GradStore> {
        let (mut start, mut tokens) = (0, 0);
        for &windows in sizes {
            let (loss, counted) = loss(start, windows, reduction)?;
            accumulator.add(&loss.backward()?)?;
            start += windows;
            tokens += counted;
        }
        accumulator.mean(if reduction == Reduction::Sum { tokens } else { sizes.len() })
    };
    let (sums, means) = (accumulated(Reduction::Sum)?, accumulated(Reduction::Mean)?);
    Ok([difference(&vars, &whole, &sums)?, difference(&vars, &whole, &means)?])
}

#[test]
fn micro_batches_of_10_and_100_tokens_give_the_gradient_of_all_110() -> Result<()> {
    let [sums, means] = differences(&[1, 10])?;
    assert!(sums < TOLERANCE, "{sums:e}");
    assert!(means > 0.1, "{means}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..Default::default() })]

    #[test]
    fn micro_batches_of_any_sizes_give_the_gradient_of_the_batch(cuts in any::<[bool; 10]>()) {
        // Eleven windows, cut after some of them.
        let mut sizes = vec![1];
        for cut in cuts {
            match sizes.last_mut() {
                Some(last) if !cut => *last += 1,
                _ => sizes.push(1),
            }
        }
        let [sums, _] = differences(&sizes).map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert!(sums < TOLERANCE, "{sizes:?}: {sums:e}");
    }
}
