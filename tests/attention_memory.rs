//! What attention holds at its peak, counted: a test of its own, for it counts all allocations.

mod counted;

use std::sync::atomic::Ordering;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{AttentionConfig, attention, attention_qkv};
use candle_dropout::{DropMask, MaskKey};
use counted::{PEAK, USED};

/// Bytes held at most while `f` runs, beyond those held before.
fn peak<T>(f: impl FnOnce() -> Result<T>) -> Result<usize> {
    let before = USED.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    f()?;
    Ok(PEAK.load(Ordering::Relaxed) - before)
}

/// Peaks of a forward pass, and of one with its backward pass, over `tokens` tokens of one head.
fn peaks(tokens: usize, d: usize) -> Result<(usize, usize)> {
    let x = Tensor::randn(0f32, 1., (1, 1, tokens, d), &Device::Cpu)?;
    let [q, k, v] = [1., 2., 3.].map(|scale| Var::from_tensor(&(&x * scale).unwrap()).unwrap());
    let drop = DropMask::new(0.1, MaskKey::new(1))?;
    let config = AttentionConfig { causal: true, ..Default::default() };
    let forward = peak(|| attention(&q, &k, &v, &config, &drop))?;
    let both = peak(|| {
        let grads = attention(&q, &k, &v, &config, &drop)?.sum_all()?.backward()?;
        let dv = grads.get(&v).unwrap();
        assert!(dv.sum_all()?.to_scalar::<f32>()?.is_finite());
        Ok(())
    })?;
    Ok((forward, both))
}

#[test]
fn sixteen_thousand_tokens_take_memory_for_their_rows_and_not_for_their_scores() -> Result<()> {
    let d = 32;
    for tokens in [4096, 16384] {
        let rows = 4 * tokens * d; // bytes of a tensor; the scores are 4 * tokens * tokens
        let (forward, both) = peaks(tokens, d)?;
        let scratch = 4 << 20; // tiles of a few threads
        assert!(forward < 2 * rows + scratch, "{tokens} tokens: {forward} bytes forward");
        // The gradients that candle adds up, and up to 16 sums of dq.
        assert!(both < 32 * rows + scratch, "{tokens} tokens: {both} bytes forward and backward");
        assert!(both < 4 * tokens * tokens, "{tokens} tokens: {both} bytes, more than the scores");
    }
    // One projection for all: its gradient arises in one piece, beside zeros and the sum that candle makes.
    let (b, s, h, d) = (4, 512, 8, 32);
    let qkv = Var::zeros((b, s, 3 * h, d), DType::F32, &Device::Cpu)?;
    let bytes = 4 * b * s * 3 * h * d;
    let drop = DropMask::new(0.1, MaskKey::new(1))?;
    let packed = peak(|| {
        let o = attention_qkv(&qkv, h, &AttentionConfig::default(), &drop)?;
        o.sum_all()?.backward()
    })?;
    assert!(packed < 6 * bytes, "{packed} bytes for a tensor of {bytes}");
    Ok(())
}
