//! The naive formula of `norm`.

use candle_core::{D, Result, Tensor};
use candle_dropout::functional::Norm;

/// LayerNorm or RMSNorm over the last dimension.
pub fn formula(z: &Tensor, norm: &Norm) -> Result<Tensor> {
    if z.rank() == 0 {
        return formula(&z.unsqueeze(0)?, norm)?.squeeze(0);
    }
    let centered = match norm.remove_mean() {
        true => z.broadcast_sub(&z.mean_keepdim(D::Minus1)?)?,
        false => z.clone(),
    };
    let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
    let n = centered.broadcast_div(&(variance + norm.eps())?.sqrt()?)?;
    let n = n.broadcast_mul(norm.weight())?;
    match norm.bias() {
        Some(bias) => n.broadcast_add(bias),
        None => Ok(n),
    }
}
