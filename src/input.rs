//! Tensors as the passes of an op read them.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor, bail};

/// A tensor whose storage is locked for reading, and the op that reads it.
pub(crate) struct Input<'a> {
    op: &'static str,
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Input<'a> {
    pub(crate) fn new(op: &'static str, tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { op, storage, layout }
    }

    /// A tensor that may be absent.
    pub(crate) fn optional(op: &'static str, tensor: Option<&'a Tensor>) -> Option<Self> {
        tensor.map(|tensor| Self::new(op, tensor))
    }

    pub(crate) fn op(&self) -> &'static str {
        self.op
    }

    /// What no two storages have in common.
    pub(crate) fn storage_key(&self) -> usize {
        std::ptr::from_ref::<Storage>(&self.storage).addr()
    }

    pub(crate) fn dtype(&self) -> DType {
        self.storage.dtype()
    }

    pub(crate) fn layout(&self) -> &Layout {
        self.layout
    }

    /// Where the first element lies in the storage.
    pub(crate) fn start(&self) -> usize {
        self.layout.start_offset()
    }

    /// Where the first element of a contiguous tensor lies in the storage, and where the last one ends.
    pub(crate) fn contiguous_offsets(&self) -> Result<(usize, usize)> {
        let (op, layout) = (self.op, self.layout);
        match layout.contiguous_offsets() {
            Some(offsets) => Ok(offsets),
            None => {
                bail!("{op}: expected a contiguous tensor, got {layout:?}; call contiguous() on it")
            }
        }
    }

    pub(crate) fn cpu(&self) -> Result<&CpuStorage> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => bail!("{}: expected a tensor on the CPU; move it with to_device", self.op),
        }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&self) -> Result<&CudaStorage> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok(storage),
            _ => bail!("{}: expected a tensor on CUDA; move it with to_device", self.op),
        }
    }
}
