//! `z = residual + dropout(x + bias)`, `n = norm(z)`.

mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Module, Result, Tensor};

use super::dropout_add;
use super::norm::Norm;
use crate::check::{check_bias, check_dtype, check_same};
use crate::composed::composes;
use crate::graph::{node, run_pass};
use crate::mask::DropMask;

const NAME: &str = "dropout_add_norm";

/// Adds the dropout of a (biased) branch to its residual stream and normalises the sum, in one pass over
/// memory.
///
/// ```text
/// z = residual + (keep ? (x + bias) * scale : 0)          n = norm(z)
/// dx = keep ? dz * scale : 0          dresidual = dz          dbias = sum of dx over all rows
/// ```
///
/// Returns `(z, n)`: a pre-norm block passes the stream `z` on to its next residual addition and `n` to its
/// next branch, a post-norm block goes on with `n` alone. `dz` is the gradient of `z` as the stream, plus
/// that of the norm; see [`Norm`].
///
/// # Shapes
/// `x` and `residual` of one shape `[.., C]`, strided or not; `bias` and the parameters of the norm of shape
/// `[C]`. `z` and `n` have the shape of `x`, and so has the mask. Without a residual, `z` is the dropout of
/// the biased branch.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all tensors. Halves are computed in f32. The norm is that of
/// the stored, rounded `z`: `n` equals `norm.forward(&z)`, bit for bit.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone: `z` equals
/// [`dropout_add(x, residual, bias, drop)`](super::dropout_add()), bit for bit. Nothing is stored for backward
/// but `z` itself: it draws the mask and takes the statistics again.
///
/// # Errors
/// A tensor is no float tensor, or f64 off the CPU; shapes, dtypes or devices differ; `eps` of the norm is
/// negative or not finite; the window of `drop` does not fit `x`.
///
/// The order of residual, dropout and norm is that of Vaswani et al., "Attention is all you need", 2017, arXiv
/// 1706.03762 (section 5.4, post-norm), and Xiong et al., "On layer normalization in the Transformer
/// architecture", 2020, arXiv 2002.04745 (pre-norm).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey};
/// use candle_dropout::functional::{Norm, dropout_add_norm};
///
/// # fn main() -> candle_core::Result<()> {
/// let branch = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?;
/// let stream = Tensor::new(&[-5f32, -3., 0., -5.], &Device::Cpu)?;
/// let norm = Norm::rms_norm(Tensor::ones(4, candle_core::DType::F32, &Device::Cpu)?, 0.);
/// let drop = DropMask::new(0.5, MaskKey::new(3))?;
/// let (z, n) = dropout_add_norm(&branch, Some(&stream), None, &norm, &drop)?;
/// assert_eq!(z.to_vec1::<f32>()?, [-5., 1., 6., 3.]);
/// let rms = (71f32 / 4.).sqrt();
/// assert!((n.to_vec1::<f32>()?[0] + 5. / rms).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn dropout_add_norm(
    x: &Tensor,
    residual: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: impl AsRef<Norm>,
    drop: &DropMask,
) -> Result<(Tensor, Tensor)> {
    check_dtype(NAME, "x", x)?;
    if let Some(residual) = residual {
        check_same(NAME, "residual", residual, "x", x)?;
    }
    if let Some(bias) = bias {
        check_bias(NAME, bias, x)?;
    }
    let norm = norm.as_ref().checked(NAME, x)?;
    if let Some(repeats) = drop.repeats(NAME, x.dims(), Some(0))? {
        return repeats.each(|part| {
            let residual = part.of_optional("residual", residual)?;
            dropout_add_norm(&part.of("x", x)?, residual.as_ref(), bias, &norm, &part.drop)
        });
    }
    let mask = drop.args(NAME, x.dims())?;
    if residual.is_none() && bias.is_none() && drop.is_none() {
        return Ok((x.clone(), norm.forward(x)?));
    }
    if composes(x.device()) {
        return composed::dropout_add_norm(&mask, x, residual, bias, &norm);
    }
    let x = x.contiguous()?;
    let residual = residual.map(Tensor::contiguous).transpose()?;
    let bias = bias.map(Tensor::contiguous).transpose()?;

    let [z, n] = run_pass!(NAME, x, fwd(&mask, &x, residual.as_ref(), bias.as_ref(), &norm))?;
    let inputs = [Some(&x), residual.as_ref(), bias.as_ref()];
    let z = node(NAME, inputs, (z, x.shape()), move |back| dropout_add::gradients(mask, back))?;
    let n = norm.node(&z, n)?;
    Ok((z, n))
}
