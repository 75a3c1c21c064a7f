use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::rate_schedule::{share_of_block, share_of_layer};
use super::site::{Site, module_methods, rate_methods};
use crate::functional::{StochasticDepth, drop_path, drop_path_add, drop_path_kept};
use crate::mask::{DropMask, MaskGenerator};

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
/// use candle_dropout::{DropPath, MaskGenerator};
/// use candle_dropout::functional::StochasticDepth;
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
#[doc(alias = "StochasticDepth")]
#[derive(Clone, Debug)]
pub struct DropPath {
    site: Site,
    mode: StochasticDepth,
}

const NAME: &str = "drop_path";

impl DropPath {
    /// A layer that drops its branch with probability `drop_p`, sample by sample.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        let site = Site::new(drop_p, generator).checked(NAME)?;
        Ok(Self { site, mode: StochasticDepth::Row })
    }

    /// Layer `layer` (1 to `n_layer`) of the paper's linear schedule `p_l = l/L * p_L` (section 3): later
    /// layers are dropped more often, and the first one is dropped, too.
    ///
    /// # Errors
    /// `layer` is 0 or above `n_layer`; `last_drop_p` is no probability.
    pub fn linear(
        layer: usize,
        n_layer: usize,
        last_drop_p: impl Into<f64>,
        generator: Arc<MaskGenerator>,
    ) -> Result<Self> {
        Self::scheduled(share_of_layer(NAME, layer, n_layer)?, last_drop_p, generator)
    }

    /// Block `block` (0 to `n_block - 1`) of timm's schedule, `linspace(0, p, n_block)`: the first block is never
    /// dropped, the last one with probability `last_drop_p`. A single block is never dropped.
    ///
    /// # Errors
    /// `block` is not below `n_block`; `last_drop_p` is no probability.
    pub fn linspace(
        block: usize,
        n_block: usize,
        last_drop_p: impl Into<f64>,
        generator: Arc<MaskGenerator>,
    ) -> Result<Self> {
        Self::scheduled(share_of_block(NAME, block, n_block)?, last_drop_p, generator)
    }

    /// A layer with this share of the last rate, which is checked itself: a share of 1.5 may be a probability.
    fn scheduled(
        share: f64,
        last_drop_p: impl Into<f64>,
        generator: Arc<MaskGenerator>,
    ) -> Result<Self> {
        let last_drop_p = Self::new(last_drop_p, generator.clone())?.drop_p();
        Self::new(share * f64::from(last_drop_p), generator)
    }

    /// The same layer, dropping by sample or by batch.
    pub fn with_mode(self, mode: StochasticDepth) -> Self {
        Self { mode, ..self }
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
        self.site.next_mask(NAME, train)
    }

    /// The branch alone, dropped at random if `train` is true: for blocks that add the residual themselves.
    /// [`forward_add`](Self::forward_add) does both in one pass.
    ///
    /// # Errors
    /// The tensor is refused by [`drop_path`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        drop_path(xs, self.mode, &self.next_mask(train)?)
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

rate_methods!(DropPath, site);

module_methods!(DropPath);
