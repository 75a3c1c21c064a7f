//! `y = keep ? x * scale : 0`.

mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor};

use crate::check::check_dtype;
use crate::composed::composes;
use crate::graph::{node, run_pass};
use crate::mask::{DropMask, MaskArgs};

const NAME: &str = "dropout";

/// Zeroes elements at random and scales the others, so that the expectation stays.
///
/// ```text
/// y = keep ? x * scale : 0            dx = keep ? dy * scale : 0
/// ```
///
/// # Shapes
/// `x` of any shape, strided or not; `y` has its shape, and so has the mask.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU. Halves are computed in f32 and rounded once.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone; no mask is stored, backward draws it again. What is
/// dropped becomes an exact 0 by selection: a dropped infinity or NaN vanishes. With
/// [`DropMask::none`] nothing is launched and `x` itself is returned.
///
/// # Errors
/// `x` is no float tensor, or f64 off the CPU; the window of `drop` does not fit `x`.
///
/// Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: a simple way to prevent neural
/// networks from overfitting", JMLR 15, 2014 (eq. 4-6, inverted form).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey};
/// use candle_dropout::functional::dropout;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?;
/// let y = dropout(&x, &DropMask::new(0.5, MaskKey::new(3))?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [0., 4., 6., 8.]);
/// # Ok(())
/// # }
/// ```
pub fn dropout(x: &Tensor, drop: &DropMask) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    if let Some(repeats) = drop.repeats(NAME, x.dims(), Some(0))? {
        return repeats.each(|part| dropout(&part.of("x", x)?, &part.drop));
    }
    let mask = drop.args(NAME, x.dims())?;
    if drop.is_none() {
        return Ok(x.clone());
    }
    if composes(x.device()) {
        return composed::dropout(&mask, x);
    }
    select_scaled(mask, &x.contiguous()?)
}

/// `y` from a contiguous `x`; the gradient is the op itself, applied to `dy`.
fn select_scaled(mask: MaskArgs, x: &Tensor) -> Result<Tensor> {
    let y = run_pass!(NAME, x, fwd(&mask, x))?;
    node(NAME, [Some(x)], (y, x.shape()), move |back| Ok([Some(dx(mask, &back.dy.contiguous()?)?)]))
}

/// The gradient of what is dropped, from a contiguous `dy`: for every op that ends in a dropout.
pub(super) fn dx(mask: MaskArgs, dy: &Tensor) -> Result<Tensor> {
    if mask.keeps_all() { Ok(dy.clone()) } else { select_scaled(mask, dy) }
}
