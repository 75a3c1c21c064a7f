//! Where the optimiser stands.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::NAME;
use super::args::AdamWProgress;

/// On CUDA with a norm, on which the next step depends, it stays on the device, so that the host does not
/// wait; otherwise the host knows.
#[derive(Clone, Debug)]
pub(super) enum Progress {
    Host(AdamWProgress),
    Cuda(Tensor),
}

impl Progress {
    /// What the host knows, or waits for.
    pub(super) fn read(&self) -> Result<AdamWProgress> {
        match self {
            Self::Host(progress) => Ok(*progress),
            Self::Cuda(progress) => match progress.to_vec1::<f64>()?.try_into() {
                Ok(values) => Ok(AdamWProgress::from_array(values)),
                Err(values) => {
                    bail!(
                        "{NAME}: expected {} numbers, got {values:?}; build it anew",
                        AdamWProgress::LEN
                    )
                }
            },
        }
    }

    pub(super) fn on(device: &Device, progress: AdamWProgress, needs_norm: bool) -> Result<Self> {
        match needs_norm && device.is_cuda() {
            false => Ok(Self::Host(progress)),
            true => Ok(Self::Cuda(Tensor::new(&progress.to_array(), device)?)),
        }
    }

    /// The loss scale as a number of f32, without waiting for it; a copy, since the next step changes it.
    pub(super) fn loss_scale(&self) -> Result<Tensor> {
        match self {
            Self::Host(progress) => Tensor::new(progress.loss_scale as f32, &Device::Cpu),
            Self::Cuda(progress) => progress.get(AdamWProgress::LOSS_SCALE)?.to_dtype(DType::F32),
        }
    }
}
