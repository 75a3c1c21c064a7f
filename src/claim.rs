//! Ops with more than one result, although an op of candle returns a single tensor.
//!
//! One pass computes all results; then each becomes the output of an op of its own, which claims it
//! instead of computing it. What backward computes is no part of a graph and needs no op.

use std::sync::{Mutex, PoisonError};

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, Layout, Result, Shape, Storage, StorageRef, Tensor, bail,
};

/// A finished result, for the forward pass of one op to take.
pub(crate) struct Claim(Mutex<Option<Storage>>);

impl Claim {
    pub(crate) fn new(result: Storage) -> Self {
        Self(Mutex::new(Some(result)))
    }

    fn take(&self) -> Option<Storage> {
        // A storage is moved or not, so a panic elsewhere leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn cpu(&self, op: &str) -> Result<CpuStorage> {
        match self.take() {
            Some(Storage::Cpu(result)) => Ok(result),
            _ => bail!("{op}: expected a result on the CPU, got none; apply the op once"),
        }
    }

    pub(crate) fn cuda(&self, op: &str) -> Result<CudaStorage> {
        match self.take() {
            Some(Storage::Cuda(result)) => Ok(result),
            _ => bail!("{op}: expected a result on CUDA, got none; apply the op once"),
        }
    }
}

/// A tensor whose storage is locked for reading.
pub(crate) struct Input<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Input<'a> {
    pub(crate) fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    pub(crate) fn cpu(&self, op: &str) -> Result<(&CpuStorage, &Layout)> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok((storage, self.layout)),
            _ => bail!("{op}: expected a tensor on the CPU; move it with to_device"),
        }
    }

    /// The storage, and where the first element of the tensor lies in it.
    pub(crate) fn cpu_start(&self, op: &str) -> Result<(&CpuStorage, usize)> {
        self.cpu(op).map(|(storage, layout)| (storage, layout.start_offset()))
    }

    /// The storage, and where the first element of the tensor lies in it.
    #[cfg(feature = "cuda")]
    pub(crate) fn cuda_start(&self, op: &str) -> Result<(&CudaStorage, usize)> {
        self.cuda(op).map(|(storage, layout)| (storage, layout.start_offset()))
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&self, op: &str) -> Result<(&CudaStorage, &Layout)> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok((storage, self.layout)),
            _ => bail!("{op}: expected a tensor on CUDA; move it with to_device"),
        }
    }
}

/// A result that no gradient flows through.
pub(crate) fn detached(result: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(result, shape, BackpropOp::none(), false)
}
