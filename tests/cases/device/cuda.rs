//! What the driver tells: the device, time between events, memory. Functions answer `None` on the CPU.
//! Twin of `no_cuda.rs`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool};
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute, CUevent_flags, CUmemPool_attribute, CUmemoryPool,
};
use candle_core::{CudaDevice, Device, Error, Result};

/// The first CUDA device, with a memory pool that keeps what it has: by default it returns everything
/// to the driver at each synchronisation, and allocating anew would be what is timed.
pub fn open() -> Result<Device> {
    let opened = Device::new_cuda(0)?;
    if let Device::Cuda(cuda) = &opened {
        let mut threshold = u64::MAX;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the pool is the device's own, and the attribute is a u64.
        unsafe { mem_pool::set_attribute(pool(cuda)?, attribute, (&raw mut threshold).cast()) }
            .w()?;
    }
    Ok(opened)
}

fn pool(cuda: &CudaDevice) -> Result<CUmemoryPool> {
    // SAFETY: the device of a live context.
    unsafe { device::get_mem_pool(cuda.cuda_stream().context().cu_device()) }.w()
}

pub fn name(device: &Device) -> Result<Option<String>> {
    let Device::Cuda(cuda) = device else { return Ok(None) };
    Ok(Some(cuda.cuda_stream().context().name().w()?))
}

fn attribute(device: &Device, attribute: CUdevice_attribute) -> Result<Option<usize>> {
    let Device::Cuda(cuda) = device else { return Ok(None) };
    let value = cuda.cuda_stream().context().attribute(attribute).w()?;
    usize::try_from(value).map(Some).map_err(Error::wrap)
}

/// The level 2 cache.
pub fn cache_bytes(device: &Device) -> Result<Option<usize>> {
    attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)
}

/// Free memory.
pub fn memory_bytes(device: &Device) -> Result<Option<usize>> {
    let Device::Cuda(cuda) = device else { return Ok(None) };
    Ok(Some(cuda.cuda_stream().context().mem_get_info().w()?.0))
}

/// The time between two events around what `work` launches; all earlier work is done by then.
pub fn elapsed_ms(device: &Device, mut work: impl FnMut() -> Result<()>) -> Result<Option<f64>> {
    let Device::Cuda(cuda) = device else { return Ok(None) };
    let stream = cuda.cuda_stream();
    let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w();
    let (begin, end) = (event()?, event()?);
    stream.synchronize().w()?;
    begin.record(&stream).w()?;
    work()?;
    end.record(&stream).w()?;
    Ok(Some(f64::from(begin.elapsed_ms(&end).w()?)))
}

/// Makes what is in use now the peak.
pub fn forget_peak(device: &Device) -> Result<()> {
    let Device::Cuda(cuda) = device else { return Ok(()) };
    cuda.cuda_stream().synchronize().w()?;
    let mut zero = 0u64;
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    // SAFETY: the pool is the device's own, and the attribute is a u64.
    unsafe { mem_pool::set_attribute(pool(cuda)?, attribute, (&raw mut zero).cast()) }.w()?;
    Ok(())
}

/// Bytes that tensors occupy in the device's memory pool, now and at most since `forget_peak`.
pub fn used_and_peak(device: &Device) -> Result<Option<(u64, u64)>> {
    let Device::Cuda(cuda) = device else { return Ok(None) };
    cuda.cuda_stream().synchronize().w()?;
    let pool = pool(cuda)?;
    let read = |attribute| -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: the pool is the device's own, and the attribute is a u64.
        unsafe { mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()) }.w()?;
        Ok(value)
    };
    let used = read(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
    Ok(Some((used, read(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?)))
}
