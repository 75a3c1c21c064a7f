//! The scale of losses in f16.

/// How a loss is scaled, so that small gradients in f16 do not underflow.
///
/// The scale starts at `initial`. A step whose gradients are not all finite is skipped and halves it; after
/// `growth_interval` steps without one it doubles. It stays between 2^-24 and 2^24.
///
/// The loss has to be computed in f32, from logits in f32 or by
/// [`cross_entropy`](crate::functional::cross_entropy()): the gradient of the loss itself is the scale, which f16 holds only up to 65504, and every step would be skipped
/// until the scale has fallen below.
///
/// Micikevicius et al., [Mixed precision training](https://arxiv.org/abs/1710.03740), 2018.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    /// The first scale.
    pub initial: f64,
    /// Steps without an overflow after which the scale doubles.
    pub growth_interval: u32,
}

impl LossScale {
    /// From 2^16 on, doubled after 2000 steps.
    pub fn dynamic() -> Self {
        Self { initial: 65_536., growth_interval: 2000 }
    }
}
