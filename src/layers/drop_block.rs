use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::site::{Site, module_methods, rate_methods};
use crate::functional::{DropBlockConfig, drop_block};
use crate::mask::{MaskGenerator, Rate};

/// DropBlock as a layer: zeroes squares of feature maps in training, about `drop_p` of them; timm's `DropBlock2d`.
///
/// In training it draws one key a call, whatever the rate, and applies [`drop_block`] with seeds at the rate
/// [`DropBlockConfig::gamma`], rounded to a multiple of 1/65536; in evaluation it is the identity and draws none. The
/// paper raises the rate linearly over the training: let the layer follow
/// [`RateSchedule::ramp`](crate::RateSchedule::ramp).
///
/// # Shapes
/// `[N, C, H, W]`.
///
/// # Dtypes
/// Those of [`drop_block`].
///
/// # Errors
/// `forward` fails, in training, if the rate of seeds is no probability, and as [`drop_block`] does.
///
/// Ghiasi, Lin, Le, "DropBlock: a regularization method for convolutional networks", 2018, arXiv 1810.12890.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{DropBlock2d, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = DropBlock2d::new(0.1, Arc::new(MaskGenerator::new(42)))?;
/// let x = Tensor::ones((2, 3, 14, 14), DType::F32, &Device::Cpu)?;
/// let y = layer.forward(&x, true)?;
/// assert!((y.mean_all()?.to_scalar::<f32>()? - 1.).abs() < 1e-6);
/// assert_eq!(layer.forward(&x, false)?.sum_all()?.to_scalar::<f32>()?, 2. * 3. * 14. * 14.);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DropBlock2d {
    site: Site,
    config: DropBlockConfig,
}

const NAME: &str = "drop_block";

impl DropBlock2d {
    /// A layer that drops about `drop_p` of each plane, with timm's other defaults ([`DropBlockConfig`]); timm's
    /// `drop_p` is 0.1.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        let site = Site::new(drop_p, generator).checked(NAME)?;
        Ok(Self { site, config: DropBlockConfig::default() })
    }

    /// The same layer with other blocks.
    pub fn with_config(self, config: DropBlockConfig) -> Self {
        Self { config, ..self }
    }

    /// What this layer drops together.
    pub fn config(&self) -> &DropBlockConfig {
        &self.config
    }

    /// Drops blocks if `train` is true.
    ///
    /// # Errors
    /// The rate of seeds is no probability, or `xs` is refused by [`drop_block`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let drop = self.site.next_mask(NAME, train)?;
        if !train {
            return Ok(xs.clone());
        }
        // A shape that is none of a feature map is the op's to refuse.
        let gamma = match xs.dims() {
            &[_, _, height, width] => self.config.gamma(self.drop_p(), height, width)?,
            _ => 0.,
        };
        drop_block(xs, &self.config, &drop.at_rate(Rate::new(gamma)?))
    }
}

rate_methods!(DropBlock2d, site);

module_methods!(DropBlock2d);
