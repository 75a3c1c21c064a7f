//! The functions of an unfused model: chains of candle's own ops around [`dropout`].

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{ops as nn_ops, rotary_emb::rope_slow};

use super::functions::{Functions, Joint, Stream};
use crate::layers::Rope;
use crate::mask::DropMask;
use crate::ops::{Activation, Norm, dropout};

pub(super) const UNFUSED: Functions =
    Functions { linear, rotate, flash: false, weights, activate, embed, residual };

/// One matrix product over all tokens.
fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (b, t, c) = x.dims3()?;
    let y = x.reshape((b * t, c))?.matmul(weight)?.reshape((b, t, ()))?; // [B, T, out]
    add_bias(&y, bias)
}

fn add_bias(y: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y.clone()),
    }
}

fn rotate(rope: &Rope, x: &Tensor, start: usize) -> Result<Tensor> {
    let (dtype, t) = (x.dtype(), x.dim(2)?);
    let angles = |table: &Tensor| table.narrow(0, start, t); // [T, D/2]
    let x = x.to_dtype(rope.cos().dtype())?;
    rope_slow(&x, &angles(rope.cos())?, &angles(rope.sin())?)?.to_dtype(dtype)
}

fn weights(scores: &Tensor, scale: f64, drop: &DropMask) -> Result<Tensor> {
    let (t, s) = (scores.dim(2)?, scores.dim(3)?);
    let is_future = |at: usize| at % s > at / s + s - t;
    let future: Vec<f32> =
        (0..t * s).map(|at| if is_future(at) { f32::NEG_INFINITY } else { 0.0 }).collect();
    let future = Tensor::from_vec(future, (t, s), scores.device())?; // [T, S]
    let future = future.to_dtype(scores.dtype())?;
    let scores = (scores * scale)?.broadcast_add(&future)?; // [B, H, T, S]
    dropout(&nn_ops::softmax(&scores, D::Minus1)?, drop) // [B, H, T, S]
}

fn activate(h: &Tensor, bias: Option<&Tensor>, act: Activation) -> Result<Tensor> {
    let h = add_bias(h, bias)?;
    let gated = |gate: fn(&Tensor) -> Result<Tensor>| {
        let half = h.dim(D::Minus1)? / 2;
        gate(&h.narrow(D::Minus1, 0, half)?)? * h.narrow(D::Minus1, half, half)?
    };
    match act {
        Activation::GeluTanh => gelu(&h),
        Activation::GeluErf => h.gelu_erf(),
        Activation::Silu => h.silu(),
        Activation::Relu => h.relu(),
        Activation::SwiGlu => gated(Tensor::silu),
        Activation::GeGlu => gated(gelu),
    }
}

/// GELU's tanh form (Hendrycks & Gimpel 2016, arXiv 1606.08415), written `x sigmoid(2 u)` for the
/// same `u = sqrt(2 / pi) (x + 0.044715 x^3)`: candle's own evaluates tanh and powers one element
/// at a time, which took 40 % of a training step on the CPU.
///
/// Halves are computed in f32: the square of an f16 above 255 is infinite, and the gradient then no
/// number.
fn gelu(x: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = if dtype == DType::F64 { x.clone() } else { x.to_dtype(DType::F32)? };
    let twice = 2.0 * std::f64::consts::FRAC_2_PI.sqrt();
    let s = nn_ops::sigmoid(&(&x * x.sqr()?.affine(0.044715 * twice, twice)?)?)?;
    (x * s)?.to_dtype(dtype)
}

fn embed(e: &Tensor, norm: &Norm, drop: &DropMask) -> Result<Stream> {
    let x = dropout(e, drop)?; // [B, T, C]
    let n = normalise(&x, norm)?; // [B, T, C]
    Ok((x, n))
}

fn residual(y: &Tensor, joint: &Joint) -> Result<Stream> {
    let Joint { bias, drop, drop_path, residual, norm } = joint;
    let y = dropout(&add_bias(y, *bias)?, drop)?; // [B, T, C]
    let z = if drop_path.is_none() {
        (*residual + y)? // [B, T, C]
    } else {
        let b = y.dim(0)?;
        let ones = Tensor::ones((1, b), y.dtype(), y.device())?;
        let keep = dropout(&ones, drop_path)?; // [1, B]
        (*residual + y.broadcast_mul(&keep.reshape((b, 1, 1))?)?)? // [B, T, C]
    };
    let n = normalise(&z, norm)?; // [B, T, C]
    Ok((z, n))
}

/// By candle's chains of ops: its layers end the graph.
fn normalise(x: &Tensor, norm: &Norm) -> Result<Tensor> {
    let (weight, eps) = (norm.weight(), norm.eps() as f32);
    match norm.bias() {
        Some(bias) => nn_ops::layer_norm_slow(x, weight, bias, eps),
        None => nn_ops::rms_norm_slow(x, weight, eps),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var, bail};

    use super::*;

    #[test]
    fn gelu_and_its_gradient_are_candles() -> Result<()> {
        let x = Var::new(&[-30f32, -5.0, -1.5, -0.1, 0.0, 0.1, 0.7, 2.0, 6.0, 30.0], &Device::Cpu)?;
        let with_gradient = |y: Tensor| -> Result<Vec<f32>> {
            let grads = y.backward()?;
            let Some(grad) = grads.get(&x) else { bail!("no gradient") };
            Tensor::cat(&[&y, grad], 0)?.to_vec1()
        };
        for (ours, candles) in with_gradient(gelu(&x)?)?.iter().zip(with_gradient(x.gelu()?)?) {
            assert!((ours - candles).abs() < 1e-5, "{ours}, not {candles}");
        }
        Ok(())
    }

    #[test]
    fn gelu_of_large_inputs_has_a_gradient_in_every_dtype() -> Result<()> {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let x = Tensor::new(&[-6e4f32, -257., 257., 6e4], &Device::Cpu)?.to_dtype(dtype)?;
            let x = Var::from_tensor(&x)?;
            let grads = gelu(&x)?.backward()?;
            let Some(grad) = grads.get(&x) else { bail!("no gradient") };
            assert_eq!(grad.to_dtype(DType::F32)?.to_vec1::<f32>()?, [0., 0., 1., 1.], "{dtype:?}");
        }
        Ok(())
    }
}
