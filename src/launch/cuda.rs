//! What the `cuda.rs` of an op needs to launch its kernels: argument types, functions, outputs.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute, CUfunction_attribute_enum,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaView, DeviceRepr, LaunchArgs, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Layout, Result, WithDType, bail};

use super::config::Launch;
use super::ptx_text::kernel_alone;
use crate::mask::MaskArgs;
use crate::ops::{
    AttentionArgs, AttentionLayout, CrossEntropyArgs, HeadStrides, RopeArgs, ScoreArgs,
};

/// The PTX of each `kernels/<op>.cu`.
pub(crate) mod ptx {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

// SAFETY: `repr(C)` integers and floats without padding, laid out as `struct MaskArgs` of the kernels.
unsafe impl DeviceRepr for MaskArgs {}
// SAFETY: as above, for `struct ScoreArgs`.
unsafe impl DeviceRepr for ScoreArgs {}
// SAFETY: as above, for `struct RopeArgs`.
unsafe impl DeviceRepr for RopeArgs {}
// SAFETY: as above, for `struct CrossEntropyArgs`.
unsafe impl DeviceRepr for CrossEntropyArgs {}
// SAFETY: as above, for `struct AttentionArgs`.
unsafe impl DeviceRepr for AttentionArgs {}
// SAFETY: as above, for `struct AttentionLayout`.
unsafe impl DeviceRepr for AttentionLayout {}
// SAFETY: as above, for `struct HeadStrides`.
unsafe impl DeviceRepr for HeadStrides {}

/// Runs `$body` with `$T` bound to the element type of a storage on CUDA.
macro_rules! for_cuda_dtype {
    ($op:expr, $storage:expr, |$T:ident| $body:expr) => {
        match &$storage.slice {
            candle_core::cuda_backend::CudaStorageSlice::F32(_) => {
                type $T = f32;
                $body
            }
            candle_core::cuda_backend::CudaStorageSlice::F16(_) => {
                type $T = half::f16;
                $body
            }
            candle_core::cuda_backend::CudaStorageSlice::BF16(_) => {
                type $T = half::bf16;
                $body
            }
            _ => {
                let dtype = candle_core::backend::BackendStorage::dtype($storage);
                Err($crate::elem::unsupported_on_cuda($op, "x", dtype))
            }
        }
    };
}
pub(crate) use for_cuda_dtype;

/// `<kernel>_<dtype>`, as the `.cu` files name their kernels.
pub(crate) fn kernel_name<T: WithDType>(kernel: &str) -> String {
    format!("{kernel}_{}", T::DTYPE.as_str())
}

/// The elements of a contiguous tensor on CUDA.
pub(crate) fn view<'a, T: CudaDType>(
    op: &str,
    storage: &'a CudaStorage,
    layout: &Layout,
) -> Result<CudaView<'a, T>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{op}: expected a contiguous tensor, got {layout:?}; call contiguous() on it")
    };
    Ok(storage.as_cuda_slice::<T>()?.slice(start..end))
}

/// The elements of a tensor on CUDA from its first one on, whatever its strides.
pub(crate) fn strided_view<'a, T: CudaDType>(
    storage: &'a CudaStorage,
    layout: &Layout,
) -> Result<CudaView<'a, T>> {
    Ok(storage.as_cuda_slice::<T>()?.slice(layout.start_offset()..))
}

/// The view of a tensor that may be absent; a null pointer for the kernel then.
pub(crate) fn optional_view<'a, T: CudaDType>(
    op: &str,
    tensor: Option<(&'a CudaStorage, &Layout)>,
) -> Result<Option<CudaView<'a, T>>> {
    tensor.map(|(storage, layout)| view(op, storage, layout)).transpose()
}

/// Adds an [`optional_view`] to the arguments of a kernel.
pub(crate) fn push_optional<'a, 'b: 'a, T: DeviceRepr>(
    args: &mut LaunchArgs<'a>,
    view: &'b Option<CudaView<'b, T>>,
) {
    match view {
        Some(view) => args.arg(view),
        None => args.arg(&0u64),
    };
}

pub(crate) fn multiprocessors(device: &CudaDevice) -> Result<usize> {
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    Ok(device.cuda_stream().context().attribute(attribute).w()? as usize)
}

/// True if the multiprocessors are of this compute capability or a later one.
pub(crate) fn has_capability(device: &CudaDevice, at_least: (i32, i32)) -> Result<bool> {
    Ok(device.cuda_stream().context().compute_capability().w()? >= at_least)
}

/// The text of [`kernel_alone`], cut out once.
fn alone(op: &str, ptx: &str, name: &str) -> Result<Arc<str>> {
    static TEXTS: LazyLock<Mutex<HashMap<String, Arc<str>>>> = LazyLock::new(Mutex::default);
    // A text is there or not, so a panic elsewhere leaves nothing half done.
    let mut texts = TEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(text) = texts.get(name) {
        return Ok(text.clone());
    }
    let Some(text) = kernel_alone(ptx, name) else { bail!("{op}: there is no kernel {name}") };
    let text: Arc<str> = text.into();
    texts.insert(name.into(), text.clone());
    Ok(text)
}

/// A kernel, from a module of its own, that may use as much dynamic shared memory as its launch gives it.
/// Names of kernels are those of the crate, whatever `ptx` they are in.
pub(crate) fn load_with_shared_memory(
    op: &str,
    device: &CudaDevice,
    name: &str,
    (module, ptx): (&str, &str),
    launch: Launch,
) -> Result<CudaFunction> {
    /// What every kernel may use without asking.
    const DEFAULT_BYTES: u32 = 48 << 10;
    // The attribute below is set in the context of the thread, which need not have one yet.
    device.cuda_stream().context().bind_to_thread().w()?;
    let (module, ptx) = (format!("{module}::{name}"), alone(op, ptx, name)?);
    let kernel = device.get_or_load_custom_func(name, &module, &ptx)?.into_cuda_function();
    if launch.shared_bytes > DEFAULT_BYTES {
        let limit = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let limit = device.cuda_stream().context().attribute(limit).w()?;
        let wanted = launch.shared_bytes as i32;
        if wanted > limit {
            bail!(
                "{op}: q: expected a GPU with {wanted} bytes of shared memory a block for {name}, got \
                 {limit}; use f32 or a smaller head size (last dimension)"
            )
        }
        let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        kernel.set_attribute(attribute, wanted).w()?;
    }
    Ok(kernel)
}

/// `len` elements that nobody has written yet.
///
/// # Safety
/// A kernel writes all of them before they are read.
pub(crate) unsafe fn output<T: DeviceRepr>(
    device: &CudaDevice,
    len: usize,
) -> Result<CudaSlice<T>> {
    // SAFETY: the caller's. An allocation of no bytes is an error of the driver, so there is one more.
    unsafe { device.alloc::<T>(len.max(1)) }
}

/// Launches a kernel.
///
/// # Safety
/// The arguments are those of the kernel, in order and type, and its slices hold as many elements as its
/// sizes say.
pub(crate) unsafe fn launch(mut args: LaunchArgs<'_>, launch: Launch) -> Result<()> {
    let [grid, block] = [launch.grid, launch.block].map(|[x, y, z]| (x, y, z));
    let shared_mem_bytes = launch.shared_bytes;
    let config = LaunchConfig { grid_dim: grid, block_dim: block, shared_mem_bytes };
    // SAFETY: the caller's.
    unsafe { args.launch(config) }.w()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_of_the_large_modules_stands_alone() {
        for (module, kernels) in [(ptx::ATTENTION, 60), (ptx::ATTENTION_F32, 18)] {
            let names: Vec<&str> = module
                .split(".visible .entry ")
                .skip(1)
                .filter_map(|entry| entry.split('(').next())
                .collect();
            assert_eq!(names.len(), kernels);
            // What stands between two of them, one or the other would lack.
            let is_shared = |line: &str| {
                line.contains(".func") || line.starts_with(".global") || line.starts_with(".const")
            };
            assert_eq!(module.lines().find(|line| is_shared(line)), None);
            for name in names {
                let text = alone("test", module, name).unwrap();
                assert_eq!(text.matches(".entry").count(), 1, "{name}");
                let [opened, closed] = ['{', '}'].map(|brace| text.matches(brace).count());
                assert!(opened > 0 && opened == closed, "{name}");
            }
        }
    }
}
