//! `candle_nn::rotary_emb`, with rotations that have a gradient.

use candle_core::{Result, Tensor, bail};
pub use candle_nn::rotary_emb::*;

use crate::check::{check_dtype, has_passes};
use crate::functional::{self, RopeStyle};

/// Rotary position embedding of element `j` with element `j + D/2`, with a gradient, in the place of
/// [`candle_nn::rotary_emb::rope`], which ends the graph without a word.
///
/// The formula is that of [`functional::rope`](crate::functional::rope()). Tables that track a gradient get one, in a
/// composition of candle's operations.
///
/// # Shapes
/// `xs` `[B, H, T, D]` with an even `D`, strided or not; `cos` and `sin` `[T', D/2]` or `[B, T', D/2]` with
/// `T' >= T`, of which the first `T` positions are taken. Where `T` and `H` are equal no shape tells `[B, T, H, D]`
/// from this layout: that is [`rope_thd`]'s.
///
/// # Dtypes
/// f32, f16, bf16 and f64; the tables in any float dtype.
///
/// # Errors
/// `xs` has not four dimensions, or an odd last one; a table has another shape, dtype or device than said above.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::nn::rotary_emb::rope;
///
/// # fn main() -> candle_core::Result<()> {
/// let xs = Tensor::new(&[[[[1f32, 2., 3., 4.]]]], &Device::Cpu)?; // [1, 1, 1, 4]
/// // Tables of two positions, of which the first counts: the second pair turns by a right angle.
/// let cos = Tensor::new(&[[1f32, 0.], [9., 9.]], &Device::Cpu)?;
/// let sin = Tensor::new(&[[0f32, 1.], [9., 9.]], &Device::Cpu)?;
/// let y = rope(&xs, &cos, &sin)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [1., -4., 3., 2.]);
/// # Ok(())
/// # }
/// ```
pub fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    rotated("rope", xs, [cos, sin], RopeStyle::HalfSplit)
}

/// [`rope`] of element `2j` with element `2j + 1`, in the place of [`candle_nn::rotary_emb::rope_i`].
///
/// # Errors
/// Those of [`rope`].
pub fn rope_i(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    rotated("rope_i", xs, [cos, sin], RopeStyle::Interleaved)
}

/// [`rope`] of `xs` `[B, T, H, D]`, in the place of [`candle_nn::rotary_emb::rope_thd`].
///
/// # Errors
/// Those of [`rope`].
pub fn rope_thd(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if xs.rank() != 4 {
        bail!("rope_thd: xs: expected [B, T, H, D], got {:?}; reshape it", xs.dims())
    }
    let y = rotated("rope_thd", &xs.transpose(1, 2)?, [cos, sin], RopeStyle::HalfSplit)?;
    y.transpose(1, 2)?.contiguous()
}

/// `x` of shape `[B, H, T, D]`, rotated.
fn rotated(op: &str, x: &Tensor, tables: [&Tensor; 2], style: RopeStyle) -> Result<Tensor> {
    check_dtype_anywhere(op, "xs", x)?;
    let &[b, _, t, d] = x.dims() else {
        bail!("{op}: xs: expected [B, H, T, D], got {:?}; reshape it", x.dims())
    };
    if d % 2 != 0 {
        bail!("{op}: xs: expected an even last dimension, got {:?}; pad it", x.dims())
    }
    let narrowed = |arg: &str, table: &Tensor| -> Result<Tensor> {
        check_dtype_anywhere(op, arg, table)?;
        match *table.dims() {
            [positions, half] if positions >= t && half == d / 2 => table.narrow(0, 0, t),
            [batch, positions, half] if batch == b && positions >= t && half == d / 2 => {
                table.narrow(1, 0, t)
            }
            _ => bail!(
                "{op}: {arg}: expected shape [T, D/2] = [{t}, {half}] or [B, T, D/2] = [{b}, {t}, \
                 {half}], or with more positions, got {:?}; the tables hold one angle a pair of elements",
                table.dims(),
                half = d / 2
            ),
        }
    };
    let [cos, sin] = tables;
    let (cos, sin) = (narrowed("cos", cos)?, narrowed("sin", sin)?);
    if has_passes(x) && cos.rank() == sin.rank() && !cos.track_op() && !sin.track_op() {
        return functional::rope(x, &cos, &sin, style);
    }
    // With gradients of the tables, and for dtypes that have no kernel.
    functional::composed_rope(x, &cos, &sin, style)
}

/// f64 on CUDA has no kernel, but a composition.
fn check_dtype_anywhere(op: &str, arg: &str, x: &Tensor) -> Result<()> {
    if x.dtype() == candle_core::DType::F64 { Ok(()) } else { check_dtype(op, arg, x) }
}
