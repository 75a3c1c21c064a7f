//! The functions of an unfused model: chains of candle's own ops around [`dropout`].

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{ops as nn_ops, rotary_emb::rope_slow};

use super::functions::{Functions, Joint, Stream, hidden_keys};
use crate::functional::{Activation, Norm, StochasticDepth, drop_path, dropout};
use crate::layers::Rope;
use crate::mask::DropMask;

pub(super) const UNFUSED: Functions = Functions {
    linear,
    rotate,
    norm: normalise,
    flash: false,
    weights,
    activate,
    gate,
    embed,
    residual,
};

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
    let (cos, sin) = rope.tables(start, x.dim(2)?)?; // [T, D/2]
    rope_slow(&x.to_dtype(cos.dtype())?, &cos, &sin)?.to_dtype(x.dtype())
}

fn weights(scores: &Tensor, scale: f64, window: Option<usize>, drop: &DropMask) -> Result<Tensor> {
    let hidden = hidden_keys(scores, window)?; // [T, S]
    let scores = (scores * scale)?.broadcast_add(&hidden)?; // [B, H, T, S]
    dropout(&nn_ops::softmax(&scores, D::Minus1)?, drop) // [B, H, T, S]
}

fn activate(h: &Tensor, bias: Option<&Tensor>, act: Activation) -> Result<Tensor> {
    let h = add_bias(h, bias)?;
    if !act.is_gated() {
        return function(&h, act);
    }
    let half = h.dim(D::Minus1)? / 2;
    gate(&h.narrow(D::Minus1, 0, half)?, &h.narrow(D::Minus1, half, half)?, act)
}

fn gate(gate: &Tensor, up: &Tensor, act: Activation) -> Result<Tensor> {
    function(gate, act)? * up
}

/// The activation of `u`, or its gate.
fn function(u: &Tensor, act: Activation) -> Result<Tensor> {
    match act {
        Activation::GeluTanh | Activation::GeGlu => gelu(u),
        Activation::GeluErf | Activation::GeGluErf => u.gelu_erf(),
        Activation::Silu | Activation::SwiGlu => u.silu(),
        Activation::Relu | Activation::ReGlu => u.relu(),
        Activation::QuickGelu | Activation::QuickGeGlu => quick_gelu(u),
        Activation::Relu2 | Activation::Relu2Glu => relu2(u),
        Activation::Tanh | Activation::TanhGlu => u.tanh(),
        Activation::Sigmoid | Activation::Glu => nn_ops::sigmoid(u),
    }
}

fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    x * nn_ops::sigmoid(&(x * 1.702)?)?
}

fn relu2(x: &Tensor) -> Result<Tensor> {
    x.relu()?.sqr()
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
    let n = normalise(norm, &x)?; // [B, T, C]
    Ok((x, n))
}

fn residual(y: &Tensor, joint: &Joint) -> Result<Stream> {
    let Joint { bias, drop, drop_path: mask, residual, norm } = joint;
    let y = dropout(&add_bias(y, *bias)?, drop)?; // [B, T, C]
    let z = if mask.is_none() {
        (*residual + y)? // [B, T, C]
    } else {
        let b = y.dim(0)?;
        let ones = Tensor::ones((b, 1, 1), y.dtype(), y.device())?;
        let keep = drop_path(&ones, StochasticDepth::Row, mask)?; // [B, 1, 1]
        (*residual + y.broadcast_mul(&keep)?)? // [B, T, C]
    };
    let n = normalise(norm, &z)?; // [B, T, C]
    Ok((z, n))
}

/// By a chain of ops: candle's layers end the graph.
fn normalise(norm: &Norm, x: &Tensor) -> Result<Tensor> {
    norm.composed(x)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var, bail};

    use super::*;

    #[test]
    fn rows_far_from_0_keep_their_digits() -> Result<()> {
        let cols = 768;
        let steps: Vec<f32> = (0..cols).map(|i| 1000. + (i * 31 % cols) as f32 * 1e-3).collect();
        let rows = [steps, vec![1972.7168; cols], vec![1.59e5; cols], vec![-3e6; cols]].concat();
        let x = Tensor::from_vec(rows, (4, cols), &Device::Cpu)?;
        let with_gradient = |dtype| -> Result<Vec<f64>> {
            let (x, one) = (Var::from_tensor(&x.to_dtype(dtype)?)?, |value: f64| {
                Tensor::full(value, cols, &Device::Cpu)?.to_dtype(dtype)
            });
            let n = normalise(&Norm::layer_norm(one(1.)?, Some(one(0.)?), 1e-5), &x)?;
            let grads = n.narrow(1, 0, 1)?.backward()?;
            let Some(grad) = grads.get(&x) else { bail!("no gradient") };
            let grad = (grad * 1e-3)?; // the constant rows have a gradient of 316
            Tensor::cat(&[&n, &grad], 0)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
        };
        let exact = with_gradient(DType::F64)?;
        for (at, (ours, exact)) in with_gradient(DType::F32)?.iter().zip(exact).enumerate() {
            assert!((ours - exact).abs() <= 2e-6, "element {at}: {ours}, not {exact}");
        }
        Ok(())
    }

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
