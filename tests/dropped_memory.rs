//! What layers hold that drop weights, or the input of a projection, counted: a test of its own, for it counts all
//! allocations.

mod counted;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{
    drop_connect_conv2d, drop_connect_linear, dropout, dropout_linear,
};
use candle_dropout::{
    DropMask, LoraConfig, LoraLinear, MaskGenerator, MaskKey, nn, seeded_var_builder,
};
use candle_nn::{Linear, Module, VarMap};
use counted::{PEAK, USED};

/// Shapes, layouts, nodes of the graph.
const BOOKKEEPING: usize = 8 << 10;

/// Bytes that a forward pass leaves held, for its result and its backward pass, beyond those held before; and those held
/// at most while the backward pass runs, beyond these. The least of some runs, since each thread sets up something once.
fn held(forward: impl Fn() -> Result<Tensor>) -> Result<(usize, usize)> {
    let mut least = (usize::MAX, usize::MAX);
    for _ in 0..8 {
        let before = USED.load(Ordering::Relaxed);
        let y = forward()?;
        let held = USED.load(Ordering::Relaxed) - before;
        PEAK.store(before + held, Ordering::Relaxed);
        y.sum_all()?.backward()?;
        let backward = PEAK.load(Ordering::Relaxed) - before - held;
        least = (least.0.min(held), least.1.min(backward));
    }
    Ok(least)
}

fn var(dims: &[usize]) -> Result<Var> {
    Var::from_tensor(&Tensor::randn(0f32, 1., dims, &Device::Cpu)?)
}

fn bytes(dims: &[usize]) -> usize {
    4 * dims.iter().product::<usize>()
}

#[test]
fn no_masked_weight_no_dropped_input_and_no_mask_is_held() -> Result<()> {
    let drop = DropMask::new(0.1, MaskKey::new(1))?;
    // A weight of 1 MiB, whose mask would be 256 KiB, and a result of 8 KiB.
    let (x, weight, y) = (var(&[4, 512])?, var(&[512, 512])?, bytes(&[4, 512]));
    let (held_now, _) = held(|| drop_connect_linear(&x, &weight, None, &drop))?;
    assert!(held_now <= y + BOOKKEEPING, "drop_connect_linear holds {held_now}");
    // The count notices what a dropout before a projection holds.
    let (held_now, _) = held(|| nn::Linear::new(dropout(&weight, &drop)?, None).forward(&x))?;
    assert!(held_now >= y + bytes(&[512, 512]), "{held_now}");

    let (x, weight) = (var(&[2, 64, 4, 4])?, var(&[64, 64, 3, 3])?);
    let y = bytes(&[2, 64, 2, 2]);
    let (held_now, _) = held(|| drop_connect_conv2d(&x, &weight, None, Default::default(), &drop))?;
    assert!(held_now <= y + BOOKKEEPING, "drop_connect_conv2d holds {held_now}");

    // An input of 512 KiB, whose mask would be 128 KiB.
    let (x, weight, y) = (var(&[256, 512])?, var(&[8, 512])?, bytes(&[256, 8]));
    let (held_now, _) = held(|| dropout_linear(&x, &weight, None, &drop))?;
    assert!(held_now <= y + BOOKKEEPING, "dropout_linear holds {held_now}");

    adapters()
}

/// At any rate an adapter holds the same bytes, and of a frozen weight no gradient is made.
fn adapters() -> Result<()> {
    let (rows, wide, r) = (64, 1024, 2);
    let weight = var(&[wide, wide])?;
    let layer = |lora_dropout: f64| {
        let vb = seeded_var_builder(&VarMap::new(), 1, DType::F32, &Device::Cpu);
        let config = LoraConfig { r, lora_dropout, ..Default::default() };
        let base = Linear::new(weight.as_tensor().clone(), None);
        LoraLinear::new(base, &config, Arc::new(MaskGenerator::new(1)), vb)
    };
    let x = var(&[rows, wide])?;
    let mut figures = Vec::new();
    for drop_p in [0., 0.1] {
        let layer = layer(drop_p)?;
        figures.push(held(|| layer.forward(&x, true))?);
    }
    let [(without, _), (with, backward)] = figures[..] else { unreachable!("two rates") };
    // A mask of x would be 64 KiB, what is left of it 256 KiB.
    assert_eq!(with, without, "bytes held at a rate of 0.1 and of 0");
    // The result and the two parts that candle adds up; the product with A, before and after it is scaled.
    let parts = 3 * bytes(&[rows, wide]) + 2 * bytes(&[rows, r]);
    assert!(with <= parts + BOOKKEEPING, "{with} of {parts}");
    // A gradient of the weight would be 4 MiB; those of x and of results are 256 KiB each.
    assert!(backward < bytes(&[wide, wide]), "{backward} bytes in backward");
    Ok(())
}
