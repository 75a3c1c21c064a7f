use candle_core::{D, Result, Tensor};

use super::NormArgs;
use crate::composed::{scalar, unmoved_by, wide};

pub(super) fn norm(
    args: &NormArgs,
    z: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (dtype, shape) = (z.dtype(), z.shape());
    if z.elem_count() == 0 {
        return unmoved_by([Some(weight), bias], z);
    }
    let z = if z.rank() == 0 { wide(z)?.reshape(1)? } else { wide(z)? };
    let centered = match args.removes_mean {
        // What the first mean was rounded by is the second; it alone has to carry the gradient.
        true => {
            let z = z.broadcast_sub(&rough_mean(&z.detach())?)?;
            z.broadcast_sub(&mean(&z)?)?
        }
        false => z,
    };
    let deviation = (mean(&centered.sqr()?)? + args.eps)?.sqrt()?;
    let n = centered.broadcast_div(&deviation)?.broadcast_mul(&wide(weight)?)?;
    let n = bias.map_or(Ok(n.clone()), |bias| n.broadcast_add(&wide(bias)?))?;
    n.reshape(shape)?.to_dtype(dtype)
}

/// Of each row, rounded more than once, but of numbers whose sum may be none.
fn rough_mean(x: &Tensor) -> Result<Tensor> {
    (x * (1. / x.dim(D::Minus1)? as f64))?.sum_keepdim(D::Minus1)
}

/// Of each row. By a division: a product with a rounded reciprocal would leave something of a constant row.
fn mean(x: &Tensor) -> Result<Tensor> {
    x.sum_keepdim(D::Minus1)?.broadcast_div(&scalar(x.dim(D::Minus1)? as f64, x)?)
}
