//! The naive formulas of `broadcast_dropout` and of those who share its pass.

use candle_core::{Result, Tensor};

use crate::dropout;

/// `keep ? x * drop_scale : 0`, with a mask that lacks the dimension `shared` of `x`.
pub fn formula(x: &Tensor, keep: &Tensor, shared: usize, drop_scale: f64) -> Result<Tensor> {
    dropout::formula(x, &spread(x, keep, shared)?, drop_scale)
}

/// `a (keep ? x : α') + b`.
pub fn alpha(x: &Tensor, keep: &Tensor, shared: usize, drop_scale: f64) -> Result<Tensor> {
    const SATURATION: f64 = -1.758_099_340_847_376_6;
    // Both ends of the grid have the scale 1, and at one of them nothing is dropped.
    if drop_scale == 1. && keep.flatten_all()?.to_vec1::<u8>()?.contains(&0) {
        return formula(x, keep, shared, 1.);
    }
    // The realised probability is a multiple of 1/65536; the scale is rounded.
    let keep_p = (65536. / drop_scale).round() / 65536.;
    let a = (keep_p + SATURATION.powi(2) * keep_p * (1. - keep_p)).powf(-0.5);
    let saturated = (x.zeros_like()? + SATURATION)?;
    let saturated = spread(x, keep, shared)?.where_cond(x, &saturated)?;
    saturated.affine(a, -a * (1. - keep_p) * SATURATION)
}

/// `keep[ids] ? x * drop_scale : 0`, with a mask of a row whose column is the id.
pub fn words(x: &Tensor, ids: &Tensor, keep: &Tensor, drop_scale: f64) -> Result<Tensor> {
    let keep = keep.index_select(&ids.flatten_all()?, 0)?.reshape(ids.shape())?;
    formula(x, &keep, x.rank() - 1, drop_scale)
}

fn spread(x: &Tensor, keep: &Tensor, shared: usize) -> Result<Tensor> {
    keep.unsqueeze(shared)?.broadcast_as(x.shape())?.contiguous()
}
