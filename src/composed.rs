//! Where there are no passes of ours: an op as a composition of candle's own ops, with the mask of the law.
//!
//! On Metal, and on any other device that candle may have, an op's `composed.rs` takes the place of its `cpu.rs` and
//! `cuda.rs`: it is made of candle's differentiable ops alone, so gradients are candle's. It keeps to the dtypes that
//! candle's Metal computes in: no f64, conditions in u8, constants made on the host. Here is what these files share.

use std::cell::Cell;
use std::marker::PhantomData;

use candle_core::{D, DType, Device, Result, Tensor};

use crate::mask::MaskArgs;

thread_local! {
    /// Guards that live in this thread.
    static COMPOSING: Cell<usize> = const { Cell::new(0) };
}

/// True if ops on this device are compositions of candle's.
pub(crate) fn composes(device: &Device) -> bool {
    match device {
        Device::Cpu | Device::Cuda(_) => COMPOSING.get() > 0,
        _ => true,
    }
}

/// Has every op of this thread composed of candle's ops, whatever the device, while the guard lives: for tests.
#[doc(hidden)]
pub fn compose() -> Composing {
    COMPOSING.set(COMPOSING.get() + 1);
    Composing(PhantomData)
}

/// See [`compose`]. It stays in its thread.
#[doc(hidden)]
#[must_use = "ops are composed while this lives"]
#[derive(Debug)]
pub struct Composing(PhantomData<*const ()>);

impl Drop for Composing {
    fn drop(&mut self) {
        COMPOSING.set(COMPOSING.get() - 1);
    }
}

/// In the dtype that is computed in: f32 for halves.
pub(crate) fn wide(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32),
        _ => Ok(x.clone()),
    }
}

/// A number with the dtype and the device of `like`; made on the host, for Metal knows no f64.
pub(crate) fn scalar(number: f64, like: &Tensor) -> Result<Tensor> {
    Tensor::new(number, &Device::Cpu)?.to_dtype(like.dtype())?.to_device(like.device())
}

/// `x * factor`, also where candle's own would end the graph: at 0.
pub(crate) fn times(x: &Tensor, factor: f64) -> Result<Tensor> {
    if factor == 0. { x.broadcast_mul(&scalar(0., x)?) } else { x * factor }
}

/// `condition ? x : otherwise`; the condition, u8, is broadcast over `x`.
pub(crate) fn select(condition: &Tensor, x: &Tensor, otherwise: f64) -> Result<Tensor> {
    let otherwise = scalar(otherwise, x)?.broadcast_as(x.shape())?;
    condition.broadcast_as(x.shape())?.where_cond(x, &otherwise)
}

/// `condition ? replacement : x`
pub(crate) fn replace(condition: &Tensor, x: &Tensor, replacement: f64) -> Result<Tensor> {
    condition.where_cond(&scalar(replacement, x)?.broadcast_as(x.shape())?, x)
}

/// The maximum of each row, a constant; 0 stands in for that of a row of -inf alone.
pub(crate) fn row_max(x: &Tensor) -> Result<Tensor> {
    let max = x.detach().max_keepdim(D::Minus1)?;
    replace(&max.eq(f64::NEG_INFINITY)?, &max, 0.)
}

/// The logarithm of the softmax of each row.
pub(crate) fn log_softmax(logits: &Tensor) -> Result<Tensor> {
    let below_max = logits.broadcast_sub(&row_max(logits)?)?;
    below_max.broadcast_sub(&below_max.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// `x + bias` in the dtype that is computed in.
pub(crate) fn biased(x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let x = wide(x)?;
    match bias {
        // A scalar has one column.
        Some(bias) => x.broadcast_add(&wide(bias)?)?.reshape(x.shape()),
        None => Ok(x),
    }
}

/// `y`, of which `inputs` get gradients of zeros. Of tensors without elements candle's own ops with two arguments
/// give one of them, and the other no gradient.
pub(crate) fn unmoved_by<const N: usize>(
    inputs: [Option<&Tensor>; N],
    y: &Tensor,
) -> Result<Tensor> {
    let never = Tensor::zeros((), DType::U8, y.device())?.broadcast_as(y.shape())?;
    inputs.into_iter().flatten().try_fold(y.clone(), |y, x| {
        // An element of each is selected nowhere; one without elements has none.
        let nothing = match x.elem_count() {
            0 => x.flatten_all()?.sum(0)?,
            _ => x.flatten_all()?.narrow(0, 0, 1)?.reshape(())?,
        };
        never.where_cond(&nothing.to_dtype(y.dtype())?.broadcast_as(y.shape())?, &y)
    })
}

/// A mask, drawn on the host and moved to the device of what it drops.
pub(crate) struct Keep {
    /// u8; nothing if all is kept.
    kept: Option<Tensor>,
    scale: f64,
}

impl Keep {
    /// Over a tensor of shape `dims`, that of the mask.
    pub(crate) fn new(mask: &MaskArgs, dims: &[usize], device: &Device) -> Result<Self> {
        let kept = match mask.keeps_all() {
            true => None,
            false => Some(Tensor::from_vec(mask.keep(dims), dims, device)?),
        };
        // Nothing is kept at a scale of 0, at which candle would end the graph.
        let scale = if mask.drops_all() { 1. } else { f64::from(mask.scale()) };
        Ok(Self { kept, scale })
    }

    /// Over the samples of `x`, along its first dimension, or over all of it if there is one.
    pub(crate) fn of_samples(mask: &MaskArgs, samples: usize, x: &Tensor) -> Result<Self> {
        let Self { kept, scale } = Self::new(mask, &[samples], x.device())?;
        let mut dims = vec![1; x.rank()];
        if let Some(first) = dims.first_mut() {
            *first = samples;
        }
        Ok(Self { kept: kept.map(|kept| kept.reshape(dims)).transpose()?, scale })
    }

    /// `keep ? x : otherwise`
    pub(crate) fn select(&self, x: &Tensor, otherwise: &Tensor) -> Result<Tensor> {
        match &self.kept {
            Some(kept) => kept.broadcast_as(x.shape())?.where_cond(x, otherwise),
            None => Ok(x.clone()),
        }
    }

    /// `keep ? x : otherwise`, for a number: what is dropped, infinite or NaN, reaches nothing.
    pub(crate) fn or(&self, x: &Tensor, otherwise: f64) -> Result<Tensor> {
        self.kept.as_ref().map_or(Ok(x.clone()), |kept| select(kept, x, otherwise))
    }

    /// `x * scale`
    fn scaled(&self, x: &Tensor) -> Result<Tensor> {
        if self.scale == 1. { Ok(x.clone()) } else { x * self.scale }
    }

    /// `keep ? x : 0`
    pub(crate) fn or_zero(&self, x: &Tensor) -> Result<Tensor> {
        self.or(x, 0.)
    }

    /// `residual + (keep ? x * scale : 0)`, where nothing is kept the bare residual; or without one.
    pub(crate) fn add(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        match residual {
            Some(residual) => {
                let residual = wide(residual)?;
                self.select(&(&residual + self.scaled(x)?)?, &residual)
            }
            None => self.drop(x),
        }
    }

    /// `keep ? x * scale : 0`
    pub(crate) fn drop(&self, x: &Tensor) -> Result<Tensor> {
        self.or_zero(&self.scaled(x)?)
    }
}

#[cfg(test)]
mod tests {
    #[cfg(not(feature = "cuda"))]
    use candle_core::{CudaDevice, MetalDevice};

    use super::*;

    #[test]
    fn ops_are_composed_where_there_are_no_kernels_or_while_a_guard_lives() {
        assert!(!composes(&Device::Cpu));
        let outer = compose();
        {
            let _inner = compose();
            assert!(composes(&Device::Cpu));
        }
        assert!(composes(&Device::Cpu));
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(!composes(&Device::Cpu), "another thread"));
        });
        drop(outer);
        assert!(!composes(&Device::Cpu));
    }

    /// Without candle's features for them such devices have a name and nothing else.
    #[test]
    #[cfg(not(feature = "cuda"))]
    fn metal_is_composed_and_cuda_is_not() {
        assert!(composes(&Device::Metal(MetalDevice)));
        assert!(!composes(&Device::Cuda(CudaDevice)));
    }
}
