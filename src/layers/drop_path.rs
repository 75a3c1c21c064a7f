use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::site::Site;
use crate::mask::{DropMask, MaskGenerator};
use crate::ops::{StochasticDepth, drop_path_add, drop_path_kept};

/// Stochastic depth as a layer: adds a residual branch that is dropped as a whole in training.
///
/// In training it draws one key a call, whatever the rate; in evaluation it is a plain addition.
///
/// Huang, Sun, Liu, Sedra, Weinberger, "Deep networks with stochastic depth", 2016, arXiv
/// 1603.09382.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{DropPath, MaskGenerator, StochasticDepth};
///
/// # fn main() -> candle_core::Result<()> {
/// let generator = Arc::new(MaskGenerator::new(42));
/// // The second of four layers, in a network whose last one drops a fifth of its branches.
/// let layer = DropPath::linear(2, 4, 0.2, generator)?.with_mode(StochasticDepth::Batch);
/// assert_eq!(layer.drop_p(), 0.1);
/// let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
/// assert_eq!(layer.forward_add(&x, &x, false)?.to_vec2::<f32>()?, [[2.; 3]; 2]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DropPath {
    site: Site,
    mode: StochasticDepth,
}

impl DropPath {
    /// A layer that drops its branch with probability `drop_p`, sample by sample.
    pub fn new(drop_p: f32, generator: Arc<MaskGenerator>) -> Self {
        Self { site: Site::new(drop_p, generator), mode: StochasticDepth::Row }
    }

    /// Layer `layer` (1 to `n_layer`) of the linear schedule `p_l = l/L * p_L` (section 3 of the
    /// paper): later layers are dropped more often.
    ///
    /// # Errors
    /// `layer` is 0 or above `n_layer`.
    pub fn linear(
        layer: usize,
        n_layer: usize,
        last_drop_p: f32,
        generator: Arc<MaskGenerator>,
    ) -> Result<Self> {
        if !(1..=n_layer).contains(&layer) {
            bail!(
                "drop_path: layer: expected 1 to n_layer {n_layer}, got {layer}; count layers from 1"
            )
        }
        let drop_p = (layer as f64 / n_layer as f64 * f64::from(last_drop_p)) as f32;
        Ok(Self::new(drop_p, generator))
    }

    /// The same layer, dropping by sample or by batch.
    pub fn with_mode(self, mode: StochasticDepth) -> Self {
        Self { mode, ..self }
    }

    /// The drop probability.
    pub fn drop_p(&self) -> f32 {
        self.site.drop_p()
    }

    /// What this layer drops together.
    pub fn mode(&self) -> StochasticDepth {
        self.mode
    }

    /// The mask of this call, of shape `[1, N]` or `[1, 1]`: for callers of [`drop_path_add`]
    /// itself.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.site.next_mask(train)
    }

    /// `residual + branch`, with the branch dropped at random if `train` is true.
    ///
    /// # Errors
    /// The rate is no probability, or the tensors are refused by [`drop_path_add`].
    pub fn forward_add(&self, branch: &Tensor, residual: &Tensor, train: bool) -> Result<Tensor> {
        drop_path_add(branch, residual, self.mode, &self.next_mask(train)?)
    }

    /// `residual + branch(x)` like [`forward_add`](Self::forward_add), with the branch computed for the
    /// kept samples alone: time and memory fall with the rate. See [`drop_path_kept`].
    ///
    /// # Errors
    /// The rate is no probability, or the tensors are refused by [`drop_path_kept`], or `branch` fails.
    pub fn forward_kept(
        &self,
        x: &Tensor,
        residual: &Tensor,
        train: bool,
        branch: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        drop_path_kept(x, residual, self.mode, &self.next_mask(train)?, branch)
    }
}
