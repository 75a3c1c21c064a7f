//! `y = keep ? new : old`.

mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor};

use crate::check::{check_dtype, check_same};
use crate::composed::composes;
use crate::graph::{detached, node, run_pass};
use crate::mask::DropMask;

const NAME: &str = "zoneout";

/// Updates a state but for some elements, drawn at random, which stay as they were.
///
/// ```text
/// y = keep ? new : old          dnew = keep ? dy : 0          dold = keep ? 0 : dy
/// ```
///
/// What is dropped is the update: the probability of `drop` is that of an element to keep its old value, the paper's
/// zoneout probability. At 0 the result is `new`, at 1 it is `old`. Nothing is scaled.
///
/// In evaluation the paper takes the expectation, `(1 - p) new + p old`, which the layers
/// [`Zoneout`](crate::Zoneout), [`Lstm`](crate::Lstm) and [`Gru`](crate::Gru) do; with [`DropMask::none`] this op
/// returns `new`.
///
/// # Shapes
/// `new`, `old` and `y` of one shape, any, strided or not; so is the mask.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for both. Elements are copied, not computed: no bit of them changes.
///
/// # Randomness
/// `keep` follows from `drop` alone and equals that of [`dropout`](super::dropout()) with the same `drop`; no mask is
/// stored, backward draws it again. It is a selection: an infinity or NaN in what is not chosen vanishes, in the
/// output and in the gradients.
///
/// # Errors
/// `new` is no float tensor, or f64 off the CPU; `old` has another shape, dtype or device; the window of `drop` does
/// not fit `new`.
///
/// Krueger, Maharaj, Kramár, Pezeshki, Ballas, Ke, Goyal, Bengio, Courville, Pal, "Zoneout: regularizing RNNs by
/// randomly preserving hidden activations", 2017, arXiv 1606.01305.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey};
/// use candle_dropout::functional::zoneout;
///
/// # fn main() -> candle_core::Result<()> {
/// let new = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?;
/// let old = Tensor::new(&[10f32, 20., 30., 40.], &Device::Cpu)?;
/// let y = zoneout(&new, &old, &DropMask::new(0.5, MaskKey::new(3))?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [10., 2., 3., 4.]);
/// # Ok(())
/// # }
/// ```
pub fn zoneout(new: &Tensor, old: &Tensor, drop: &DropMask) -> Result<Tensor> {
    check_dtype(NAME, "new", new)?;
    check_same(NAME, "old", old, "new", new)?;
    if let Some(repeats) = drop.repeats(NAME, new.dims(), Some(0))? {
        return repeats
            .each(|part| zoneout(&part.of("new", new)?, &part.of("old", old)?, &part.drop));
    }
    let mask = drop.args(NAME, new.dims())?;
    if drop.is_none() && !old.track_op() {
        return Ok(new.clone());
    }
    if composes(new.device()) {
        return composed::zoneout(&mask, new, old);
    }
    let (new, old) = (new.contiguous()?, old.contiguous()?);
    let y = run_pass!(NAME, new, fwd(&mask, &new, &old))?;
    let shape = new.shape().clone();
    node(NAME, [Some(&new), Some(&old)], (y, &shape.clone()), move |back| {
        let dy = back.dy.contiguous()?;
        let gradients = run_pass!(NAME, dy, bwd(&mask, &dy))?;
        Ok(gradients.map(|gradient| Some(detached(gradient, &shape))))
    })
}
