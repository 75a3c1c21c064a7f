//! The two projections that drop: connections, or what goes in.

use candle_core::{Result, Tensor};

use super::{WeightLayout, project};
use crate::functional::dropout::dropout;
use crate::mask::{DropMask, MaskArgs};

/// What of a product is dropped.
#[derive(Clone, Copy)]
pub(super) enum Dropped<'a> {
    Nothing,
    X(&'a DropMask),
    Weight(&'a DropMask),
}

impl Dropped<'_> {
    /// The masks over x and weight, where there are any.
    pub(super) fn masks(
        self,
        op: &str,
        x: &Tensor,
        weight: &Tensor,
    ) -> Result<[Option<MaskArgs>; 2]> {
        let of = |drop: &DropMask, x: &Tensor| {
            drop.args(op, x.dims()).map(|mask| Some(mask).filter(|mask| !mask.keeps_all()))
        };
        Ok(match self {
            Self::Nothing => [None, None],
            Self::X(drop) => [of(drop, x)?, None],
            Self::Weight(drop) => [None, of(drop, weight)?],
        })
    }

    /// x and weight where ops are composed of candle's.
    pub(super) fn composed(self, x: &Tensor, weight: &Tensor) -> Result<[Tensor; 2]> {
        Ok(match self {
            Self::Nothing => [x.clone(), weight.clone()],
            Self::X(drop) => [dropout(x, drop)?, weight.clone()],
            Self::Weight(drop) => [x.clone(), dropout(weight, drop)?],
        })
    }
}

/// A linear projection of which connections are dropped: DropConnect.
///
/// ```text
/// V = keep ? W * scale : 0
/// y = x Vᵀ + b
/// dx = dy V          dW = keep ? (dyᵀ x) * scale : 0 over all rows          db = sum of dy over all rows
/// ```
///
/// One mask serves all rows of `x`. `V` is made for each product and gone after it: backward, which draws the mask
/// again, keeps `x` and `W` alone.
///
/// # Shapes
/// `x [.., in]`, `weight [out, in]`, the shape of the mask, too, `bias [out]`; `y [.., out]`. All strided or not.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all tensors. How products of halves are summed up is candle's choice.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone. What is dropped becomes an exact 0 by selection. With
/// [`DropMask::none`] it is a plain projection. The bias is not dropped (in the paper it is, as one more column).
///
/// # Errors
/// `x` is no float tensor, or f64 off the CPU; it has no dimension, or its last one is not `in`; `weight` is
/// no matrix, `bias` has not the shape `[out]`; dtypes or devices differ; the window of `drop` does not fit `weight`.
///
/// Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of neural networks using DropConnect", ICML 2013, in the
/// inverted form. The paper draws a mask for each example; here it is one a call.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey};
/// use candle_dropout::functional::drop_connect_linear;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 10., 100., 1000.]], &Device::Cpu)?;
/// let weight = Tensor::new(&[[1f32, 2., 3., 4.]], &Device::Cpu)?;
/// let drop = DropMask::new(0.5, MaskKey::new(3))?; // drops the first of four
/// let y = drop_connect_linear(&x, &weight, None, &drop)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[2. * 4320.]]);
/// # Ok(())
/// # }
/// ```
pub fn drop_connect_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    drop: &DropMask,
) -> Result<Tensor> {
    if let Some(repeats) = drop.repeats("drop_connect_linear", x.dims(), None)? {
        return repeats
            .each(|part| drop_connect_linear(&part.of("x", x)?, weight, bias, &part.drop));
    }
    let dropped = Dropped::Weight(drop);
    project("drop_connect_linear", x, weight, bias, WeightLayout::OutIn, dropped)
}

/// A linear projection of [`dropout`]`(x)`, which keeps neither what is left of `x` nor a mask.
///
/// ```text
/// z = keep ? x * scale : 0
/// y = z Wᵀ + b
/// dx = keep ? (dy W) * scale : 0          dW = dyᵀ z over all rows          db = sum of dy over all rows
/// ```
///
/// `z` is made for each product and gone after it: backward, which draws the mask again, keeps `x`, which is there
/// anyway, where a projection of a dropout keeps a second tensor of its size. So several projections of one `x`, each
/// with a dropout of its own (the adapters of LoRA), keep nothing beside it.
///
/// # Shapes
/// `x [.., in]`, the shape of the mask, too, `weight [out, in]`, `bias [out]`; `y [.., out]`. All strided or not.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all tensors. How products of halves are summed up is candle's choice.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone, and the mask is that of [`dropout`] on `x`. What is dropped becomes an
/// exact 0 by selection. With [`DropMask::none`] it is a plain projection.
///
/// # Errors
/// `x` is no float tensor, or f64 off the CPU; it has no dimension, or its last one is not `in`; `weight` is
/// no matrix, `bias` has not the shape `[out]`; dtypes or devices differ; the window of `drop` does not fit `x`.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey};
/// use candle_dropout::functional::dropout_linear;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?;
/// let weight = Tensor::new(&[[1f32, 10., 100., 1000.]], &Device::Cpu)?;
/// let drop = DropMask::new(0.5, MaskKey::new(3))?; // leaves 0, 4, 6, 8
/// assert_eq!(dropout_linear(&x, &weight, None, &drop)?.to_vec1::<f32>()?, [8640.]);
/// # Ok(())
/// # }
/// ```
pub fn dropout_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    drop: &DropMask,
) -> Result<Tensor> {
    if let Some(repeats) = drop.repeats("dropout_linear", x.dims(), Some(0))? {
        return repeats.each(|part| dropout_linear(&part.of("x", x)?, weight, bias, &part.drop));
    }
    project("dropout_linear", x, weight, bias, WeightLayout::OutIn, Dropped::X(drop))
}
