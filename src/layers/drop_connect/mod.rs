//! DropConnect as layers, and what both know of their outputs when connections drop at random.

mod conv2d;
mod linear;

use candle_core::{Result, Tensor, bail};

pub use conv2d::DropConnectConv2d;
pub use linear::DropConnectLinear;

use crate::composed::wide;
use crate::functional::reparameterize;
use crate::layers::site::probability;
use crate::mask::{MaskKey, NoiseKey, Rate};

/// The variance of a connection of strength 1, kept and scaled or dropped: `p / (1 - p)` of the realised rate.
fn odds(layer: &str, drop_p: f32) -> Result<f64> {
    let rate = probability(layer, drop_p)?;
    if rate == Rate::DROP_ALL {
        bail!(
            "{layer}: drop_p: expected a probability below 1, at which something is kept, got 1; use forward"
        )
    }
    Ok(1. / rate.keep_p() - 1.)
}

/// The mean of `activation` over `samples` normal outputs with these moments, in the dtype of `like`.
fn mean_of_samples(
    layer: &str,
    [mean, variance]: [&Tensor; 2],
    (samples, key): (usize, MaskKey),
    like: &Tensor,
    activation: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    if samples == 0 {
        bail!("{layer}: samples: expected at least 1, got 0; pass how many to average")
    }
    let deviation = variance.sqrt()?;
    let sample = |t: usize| {
        let noise = NoiseKey::new(key.draw(t as u64));
        wide(&activation(&reparameterize(mean, &deviation, Some(&noise))?.to_dtype(like.dtype())?)?)
    };
    let sum = (1..samples).try_fold(sample(0)?, |sum, t| sum + sample(t)?)?;
    (sum / samples as f64)?.to_dtype(like.dtype())
}
