use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::site::{Site, rate_methods};
use crate::check::{check_dtype, check_same};
use crate::composed::wide;
use crate::functional::zoneout;
use crate::mask::{DropMask, MaskGenerator, Rate};

/// Zoneout as a layer, for recurrent cells of one's own: some elements of a state are not updated.
///
/// ```text
/// training      y = keep ? new : old
/// evaluation    y = (1 - p) new + p old          p, the realised zoneout probability
/// ```
///
/// In training it draws one key a call, whatever the rate, and applies [`zoneout`]; in evaluation it draws none.
/// [`Lstm`](super::Lstm) and [`Gru`](super::Gru) are whole recurrent layers with it.
///
/// # Shapes
/// `new`, `old` and `y` of one shape, any.
///
/// # Errors
/// `drop_p`, the probability of keeping an old value, is no probability; see [`zoneout`].
///
/// Krueger, Maharaj, Kramár, Pezeshki, Ballas, Ke, Goyal, Bengio, Courville, Pal, "Zoneout: regularizing RNNs by
/// randomly preserving hidden activations", 2017, arXiv 1606.01305.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{MaskGenerator, Zoneout};
///
/// # fn main() -> candle_core::Result<()> {
/// let layer = Zoneout::new(0.25, Arc::new(MaskGenerator::new(42)))?;
/// let new = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?;
/// let old = new.zeros_like()?;
/// assert_eq!(layer.forward(&new, &old, false)?.to_vec1::<f32>()?, [0.75, 1.5, 2.25, 3.]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Zoneout(Site);

const NAME: &str = "zoneout";

impl Zoneout {
    /// A layer that keeps an old value with probability `drop_p`.
    ///
    /// # Errors
    /// `drop_p` is no probability.
    pub fn new(drop_p: impl Into<f64>, generator: Arc<MaskGenerator>) -> Result<Self> {
        Site::new(drop_p, generator).checked(NAME).map(Self)
    }

    /// `new`, or in its place `old` where an element is not updated; their expectation unless `train`.
    ///
    /// # Errors
    /// The tensors are refused by [`zoneout`].
    pub fn forward(&self, new: &Tensor, old: &Tensor, train: bool) -> Result<Tensor> {
        Zone::next(&self.0, NAME, train)?.update(new, old)
    }
}

rate_methods!(Zoneout, 0);

/// What one update is given: a mask, or in evaluation its expectation.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Zone {
    Drawn(DropMask),
    Expected(Rate),
}

impl Zone {
    /// That of the next call of a site.
    pub(super) fn next(site: &Site, layer: &str, train: bool) -> Result<Self> {
        let drop = site.next_mask(layer, train)?;
        Ok(if train { Self::Drawn(drop) } else { Self::Expected(site.rate(layer)?) })
    }

    /// The same with another part of its mask, if it has one.
    pub(super) fn part(&self, part: impl FnOnce(&DropMask) -> DropMask) -> Self {
        match self {
            Self::Drawn(drop) => Self::Drawn(part(drop)),
            Self::Expected(rate) => Self::Expected(*rate),
        }
    }

    pub(super) fn update(&self, new: &Tensor, old: &Tensor) -> Result<Tensor> {
        let rate = match self {
            Self::Drawn(drop) => return zoneout(new, old, drop),
            Self::Expected(rate) => *rate,
        };
        check_dtype(NAME, "new", new)?;
        check_same(NAME, "old", old, "new", new)?;
        match rate {
            // What has no part in it may be no number, and candle ends a graph at a factor of 0.
            Rate::KEEP_ALL => Ok(new.clone()),
            Rate::DROP_ALL => Ok(old.clone()),
            rate => {
                let (of_new, of_old) = (rate.keep_p(), 1. - rate.keep_p());
                ((wide(new)? * of_new)? + (wide(old)? * of_old)?)?.to_dtype(new.dtype())
            }
        }
    }
}
