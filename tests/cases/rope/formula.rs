//! The naive formula of `rope`.

use candle_core::{D, Result, Tensor};
use candle_dropout::functional::RopeStyle;

/// `(x1 cos - x2 sin, x1 sin + x2 cos)` for each pair.
pub fn formula(x: &Tensor, cos: &Tensor, sin: &Tensor, style: RopeStyle) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    // Tables for each batch entry are those of all its heads.
    let is_per_head = cos.rank() == 3 && x.rank() == 4;
    let table = |table: &Tensor| if is_per_head { table.unsqueeze(1) } else { Ok(table.clone()) };
    let (cos, sin) = (table(cos)?, table(sin)?);
    let rotated = |x1: &Tensor, x2: &Tensor| -> Result<[Tensor; 2]> {
        let y1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
        let y2 = (x1.broadcast_mul(&sin)? + x2.broadcast_mul(&cos)?)?;
        Ok([y1, y2])
    };
    match style {
        RopeStyle::HalfSplit => {
            let part = |at: usize| x.narrow(D::Minus1, at * half, half);
            Tensor::cat(&rotated(&part(0)?, &part(1)?)?, D::Minus1)
        }
        RopeStyle::Interleaved => {
            let mut pairs = x.dims().to_vec();
            pairs.truncate(x.rank() - 1);
            pairs.extend([half, 2]);
            let pairs = x.reshape(pairs)?;
            let part = |at: usize| pairs.narrow(D::Minus1, at, 1)?.squeeze(D::Minus1);
            Tensor::stack(&rotated(&part(0)?, &part(1)?)?, D::Minus1)?.reshape(x.shape())
        }
    }
}
