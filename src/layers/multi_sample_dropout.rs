use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::site::{Site, rate_methods};
use crate::functional::dropout;
use crate::mask::MaskGenerator;

/// Multi-sample dropout: a head is applied to several dropouts of the same features, and what it gives is averaged.
///
/// ```text
/// y = 1/K Σ_k head(dropout(x; mask k))            in evaluation y = head(x)
/// ```
///
/// The head is cheap beside what has made the features, so that a step learns from `K` masks at little more than the
/// price of one, and a model trains in fewer steps. All samples share its weights. The paper averages losses: a `head`
/// that returns the loss does that, one that returns logits makes one loss of their mean.
///
/// # Shapes
/// `x` of any shape; `head` gives each sample the same one.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU.
///
/// # Randomness
/// In training one key a call, whatever the rate; sample `k` has the mask of `key.draw(k)`, and so depends not on how
/// many there are. In evaluation none.
///
/// # Errors
/// See [`new`](Self::new) and [`forward`](Self::forward).
///
/// Inoue, "Multi-sample dropout for accelerated training and better generalization", 2019, arXiv 1905.09788.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{MaskGenerator, MultiSampleDropout};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = MultiSampleDropout::new(0.5, 8, Arc::new(MaskGenerator::new(42)))?;
/// let features = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
/// let weight = Tensor::ones((3, 1), DType::F32, &Device::Cpu)?;
/// let y = layer.forward(&features, true, |x| x.matmul(&weight))?;
/// assert_eq!(y.dims(), [2, 1]);
/// let y = layer.forward(&features, false, |x| x.matmul(&weight))?;
/// assert_eq!(y.to_vec2::<f32>()?, [[3.], [3.]]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct MultiSampleDropout {
    site: Site,
    samples: usize,
}

const NAME: &str = "multi_sample_dropout";

impl MultiSampleDropout {
    /// A layer that averages over `samples` masks; the paper's has 8.
    ///
    /// # Errors
    /// `drop_p` is no probability; `samples` is 0.
    pub fn new(
        drop_p: impl Into<f64>,
        samples: usize,
        generator: Arc<MaskGenerator>,
    ) -> Result<Self> {
        if samples == 0 {
            bail!("{NAME}: samples: expected at least 1, got 0; the paper's is 8")
        }
        Ok(Self { site: Site::new(drop_p, generator).checked(NAME)?, samples })
    }

    /// How many masks it averages over.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// The mean of `head` over the masks if `train` is true, else `head(x)`.
    ///
    /// # Errors
    /// `x` is refused by [`dropout`], or `head` fails, or gives samples of different shapes.
    pub fn forward(
        &self,
        xs: &Tensor,
        train: bool,
        head: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let drop = self.site.next_mask(NAME, train)?;
        if !train {
            return head(xs);
        }
        let of_sample = |k: usize| head(&dropout(xs, &drop.draw(k as u64))?);
        let sum = (1..self.samples).try_fold(of_sample(0)?, |sum, k| sum + of_sample(k)?)?;
        sum / self.samples as f64
    }
}

rate_methods!(MultiSampleDropout, site);
