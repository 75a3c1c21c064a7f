use std::sync::Arc;

use candle_core::{Device, Error, Result, Tensor};

use super::site::{Site, probability, rate_methods};
use crate::mask::{DropMask, MaskGenerator};

/// Skips whole layers of a network at random in training, so that a shallower one can be cut out of it.
///
/// ```text
/// y = keep ? layer(x) : x
/// ```
///
/// A layer that is skipped is not computed (in the passes of a [`McDropout`](super::McDropout) it is, for those that keep
/// it), and what it computes is not scaled, as in fairseq and transformers. In evaluation every layer is computed; or some are left out on purpose: [`every_other`](Self::every_other) names those
/// that the paper keeps.
///
/// Fan, Grave, Joulin, "Reducing Transformer depth on demand with structured dropout", 2019, arXiv 1909.11556.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{LayerDrop, MaskGenerator};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer_drop = LayerDrop::new(0.5, Arc::new(MaskGenerator::new(42)))?;
/// let x = Tensor::ones(1, DType::F32, &Device::Cpu)?;
/// let mut sum = 0.;
/// for _ in 0..100 {
///     sum += layer_drop.forward(&x, true, |x| x + 1.)?.to_vec1::<f32>()?[0];
/// }
/// assert!((130. ..170.).contains(&sum), "1 or 2");
/// assert_eq!(LayerDrop::every_other(6, 1. / 3.)?, [0, 1, 3, 4]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct LayerDrop(Site);

const NAME: &str = "layer_drop";

impl LayerDrop {
    /// Skips a layer with probability `drop_p`.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        Site::new(drop_p, generator).checked(NAME).map(Self)
    }

    /// The mask of this call, a scalar.
    ///
    /// # Errors
    /// The rate is no probability.
    pub fn next_mask(&self, train: bool) -> Result<DropMask> {
        self.0.next_mask(NAME, train)
    }

    /// `layer(x)`, or `x` itself if `train` is true and this call skips it.
    ///
    /// # Errors
    /// The rate is no probability, or `layer` fails.
    pub fn forward(
        &self,
        x: &Tensor,
        train: bool,
        layer: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let drop = self.next_mask(train)?;
        let keeps = |drop: &DropMask| {
            Ok::<_, Error>(drop.to_tensor((), &Device::Cpu)?.to_scalar::<u8>()? == 1)
        };
        if let Some(repeats) = drop.repeats(NAME, x.dims(), None)? {
            let y = layer(x)?;
            return repeats.each(|part| part.of("x", if keeps(&part.drop)? { &y } else { x }));
        }
        if keeps(&drop)? { layer(x) } else { Ok(x.clone()) }
    }

    /// The layers, counted from 0, that are left of `n_layer` where one of about `1 / drop_p` is cut out: layer `d`
    /// is cut where `d + 1` is a multiple of `floor(1 / drop_p)` (section 3.3, "every other").
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn every_other(n_layer: usize, drop_p: f64) -> Result<Vec<usize>> {
        probability(NAME, drop_p as f32)?;
        // One third is not quite one of f64, and no period of two.
        let period = (1. / drop_p + 1e-9) as usize;
        Ok((0..n_layer).filter(|layer| !(layer + 1).is_multiple_of(period)).collect())
    }
}

rate_methods!(LayerDrop, 0);
