//! `y = R(position) x`: rotary position embeddings.

mod args;
pub(super) mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{D, DType, Result, Tensor, bail};

pub use args::RopeArgs;

use crate::check::{check_device, check_dtype};
use crate::composed::composes;
use crate::graph::{node, run_pass};

const NAME: &str = "rope";

/// Which elements of a head are rotated together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RopeStyle {
    /// Element `j` with element `j + D/2`: GPT-NeoX and the LLaMA weights of Hugging Face.
    #[default]
    HalfSplit,
    /// Element `2j` with element `2j + 1`: the paper, GPT-J and Meta's own LLaMA weights.
    Interleaved,
}

/// Rotary position embedding: rotates pairs of elements by an angle that depends on the position.
///
/// ```text
/// y1 = x1 * cos - x2 * sin        y2 = x1 * sin + x2 * cos        for each pair (x1, x2)
/// dx1 = dy1 * cos + dy2 * sin     dx2 = dy2 * cos - dy1 * sin     the rotation backwards
/// ```
///
/// It is made for queries and keys, `x = [B, H, T, D]`, and reads the view that a projection leaves
/// (`[B, T, H, D]` transposed) without copying it first. [`Rope`](crate::Rope) makes the tables.
///
/// # Shapes
/// `x` `[B, H, T, D]`, `[B, T, D]` or `[T, D]` with an even `D`, strided or not; `y` has its shape and is
/// contiguous. `cos` and `sin` `[T, D/2]`, or `[B, T, D/2]` with angles for each batch entry. The positions are
/// the last dimension but one: where there are as many heads as positions, `[B, T, H, D]` has the same shape and
/// would be rotated by head; see [`expect_dims`](super::expect_dims).
///
/// # Dtypes
/// `x` in f32, f16, bf16, and f64 on the CPU. The tables may have any float dtype and are used in f32
/// (f64 for an f64 `x`): half an angle would be no angle. Products and sums are computed in f32 and
/// rounded once.
///
/// # Randomness
/// None.
///
/// # Errors
/// `x` is no float tensor, or f64 off the CPU; it has another rank or an odd last dimension; the tables
/// have another shape, dtype or device than said above, or track a gradient: they are constants.
///
/// Su, Lu, Pan, Murtadha, Wen, Liu, "RoFormer: enhanced transformer with rotary position embedding",
/// 2021, arXiv 2104.09864 (eq. 15 and 34).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::functional::{RopeStyle, rope};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 2., 3., 4.]], &Device::Cpu)?;
/// // The first pair stays, the second turns by a right angle.
/// let cos = Tensor::new(&[[1f32, 0.]], &Device::Cpu)?;
/// let sin = Tensor::new(&[[0f32, 1.]], &Device::Cpu)?;
/// let y = rope(&x, &cos, &sin, RopeStyle::HalfSplit)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[1., -4., 3., 2.]]);
/// let y = rope(&x, &cos, &sin, RopeStyle::Interleaved)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[1., 2., -4., 3.]]);
/// # Ok(())
/// # }
/// ```
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, style: RopeStyle) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    let &[.., t, d] = x.dims() else {
        bail!("{NAME}: x: expected [.., T, D], got {:?}; unsqueeze it", x.dims())
    };
    if x.rank() > 4 {
        bail!(
            "{NAME}: x: expected [T, D], [B, T, D] or [B, H, T, D], got {:?}; reshape it",
            x.dims()
        )
    }
    if d % 2 != 0 {
        bail!(
            "{NAME}: x: expected an even last dimension, got {:?}; pad it or rotate a part",
            x.dims()
        )
    }
    let cos = table("cos", cos, x, [t, d / 2], style)?;
    let sin = table("sin", sin, x, [t, d / 2], style)?;
    if cos.dims() != sin.dims() {
        bail!(
            "{NAME}: sin: expected shape {:?} like cos, got {:?}; give both for each batch entry, or \
             neither",
            cos.dims(),
            sin.dims()
        )
    }
    if composes(x.device()) {
        return composed::rope(x, &cos, &sin, style);
    }
    rotate(x, cos, sin, style, false)
}

/// A table in the form that kernels take.
fn table(
    arg: &str,
    table: &Tensor,
    x: &Tensor,
    shared: [usize; 2],
    style: RopeStyle,
) -> Result<Tensor> {
    check_dtype(NAME, arg, table)?;
    let per_batch = [x.dims()[0], shared[0], shared[1]];
    if table.dims() != shared && (table.dims() != per_batch || x.rank() < 3) {
        let or_per_batch = match x.rank() {
            2 => String::new(),
            _ => format!(" or [B, T, D/2] = {per_batch:?}"),
        };
        let remedy = match table.dims() {
            [.., columns] if *columns == 2 * shared[1] && shared[1] > 0 => match style {
                RopeStyle::HalfSplit => {
                    "each angle stands there twice: take the first half, narrow(D::Minus1, 0, D/2)"
                }
                RopeStyle::Interleaved => {
                    "each angle stands there twice: take every second column, reshape((T, D/2, 2))?.narrow(2, 0, \
                     1)?.squeeze(2), or the first half of tables made for RopeStyle::HalfSplit"
                }
            },
            [.., rows, _] if *rows > shared[0] => {
                "narrow it to the positions of x, narrow(D::Minus2, first_position, T)"
            }
            _ => "give one row for each position of x, one column for each pair of its columns",
        };
        bail!(
            "{NAME}: {arg}: expected shape [T, D/2] = {shared:?}{or_per_batch} for x {:?}, got {:?}; {remedy}",
            x.dims(),
            table.dims()
        )
    }
    check_device(NAME, arg, table, "x", x.device())?;
    if table.track_op() {
        bail!("{NAME}: {arg}: expected a constant, got one that tracks a gradient; detach() it")
    }
    let dtype = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    table.to_dtype(dtype)?.contiguous()
}

/// Forwards or backwards; the gradient is the other of the two.
fn rotate(x: &Tensor, cos: Tensor, sin: Tensor, style: RopeStyle, inverse: bool) -> Result<Tensor> {
    let is_dense = x.dim(D::Minus1)? <= 1 || x.stride().last() == Some(&1);
    let x = if is_dense { x.clone() } else { x.contiguous()? };
    let interleaved = style == RopeStyle::Interleaved;
    let args = RopeArgs::new(NAME, (x.dims(), x.stride()), cos.dims(), inverse, interleaved)?;
    let y = run_pass!(NAME, x, fwd(&args, &x, &cos, &sin))?;
    node(NAME, [Some(&x)], (y, x.shape()), move |back| {
        Ok([Some(rotate(back.dy, cos.clone(), sin.clone(), style, !inverse)?)])
    })
}
