use candle_core::{D, Result, Tensor};

use super::RopeStyle;
use crate::composed::{unmoved_by, wide};

/// Tables may track a gradient here, and one of them may be of each batch entry, the other not.
pub(crate) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, style: RopeStyle) -> Result<Tensor> {
    if x.elem_count() == 0 {
        return unmoved_by([Some(cos), Some(sin)], x);
    }
    let (dtype, shape, half) = (x.dtype(), x.shape(), x.dim(D::Minus1)? / 2);
    let x = wide(x)?.contiguous()?;
    // Tables for each batch entry are those of all its heads.
    let table = |table: &Tensor| {
        let table = table.to_dtype(x.dtype())?;
        if table.rank() == 3 && x.rank() == 4 { table.unsqueeze(1) } else { Ok(table) }
    };
    let (cos, sin) = (table(cos)?, table(sin)?);
    let rotated = |x1: &Tensor, x2: &Tensor| -> Result<[Tensor; 2]> {
        Ok([
            (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?,
            (x1.broadcast_mul(&sin)? + x2.broadcast_mul(&cos)?)?,
        ])
    };
    let y = match style {
        RopeStyle::HalfSplit => {
            let part = |at: usize| x.narrow(D::Minus1, at * half, half);
            Tensor::cat(&rotated(&part(0)?, &part(1)?)?, D::Minus1)?
        }
        RopeStyle::Interleaved => {
            let leading = &shape.dims()[..shape.rank() - 1];
            let pairs = x.reshape([leading, &[half, 2]].concat())?;
            let part = |at: usize| pairs.narrow(D::Minus1, at, 1)?.squeeze(D::Minus1);
            Tensor::stack(&rotated(&part(0)?, &part(1)?)?, D::Minus1)?.reshape(shape)?
        }
    };
    y.to_dtype(dtype)
}
