//! Kernels: found by name, loaded once, launched.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute, CUfunction_attribute_enum,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, CudaView, DeviceRepr, LaunchArgs, LaunchConfig,
    PushKernelArg,
};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Result, Storage, WithDType, bail};

use super::ptx_text;
use super::sizes::Launch;
use crate::input::Input;
use crate::mask::MaskArgs;

/// The PTX of each `kernels/<file>.cu`.
pub(crate) mod ptx {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

// SAFETY: `repr(C)` integers and floats without padding, laid out as `struct MaskArgs` of the kernels.
unsafe impl DeviceRepr for MaskArgs {}

/// Runs `$body` with `$T` bound to the element type of an [`Input`] on CUDA.
macro_rules! for_cuda_dtype {
    ($x:expr, |$T:ident| $body:expr) => {
        match $x.dtype() {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            dtype => Err($crate::check::unsupported_on_cuda($x.op(), "x", dtype)),
        }
    };
}
pub(crate) use for_cuda_dtype;

impl Input<'_> {
    pub(crate) fn cuda_device(&self) -> Result<&CudaDevice> {
        Ok(&self.cuda()?.device)
    }

    /// The elements of a contiguous tensor.
    pub(crate) fn view<T: CudaDType>(&self) -> Result<CudaView<'_, T>> {
        let (start, end) = self.contiguous_offsets()?;
        Ok(self.cuda()?.as_cuda_slice::<T>()?.slice(start..end))
    }

    /// The elements from so many behind the first one of the tensor on, whatever its strides.
    pub(crate) fn view_from<T: CudaDType>(&self, offset: usize) -> Result<CudaView<'_, T>> {
        Ok(self.cuda()?.as_cuda_slice::<T>()?.slice(self.start() + offset..))
    }
}

/// The view of a tensor that may be absent; a null pointer for the kernel then.
pub(crate) fn optional_view<'a, T: CudaDType>(
    x: &'a Option<Input<'_>>,
) -> Result<Option<CudaView<'a, T>>> {
    x.as_ref().map(Input::view).transpose()
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

/// The kernels of one file.
#[derive(Clone, Copy)]
pub(crate) struct Module {
    /// The op that says what is wrong.
    op: &'static str,
    ptx: &'static str,
}

impl Module {
    pub(crate) const fn new(op: &'static str, ptx: &'static str) -> Self {
        Self { op, ptx }
    }

    /// The compute capability it was built for, 80 for 8.0.
    pub(crate) fn target(self) -> Option<u32> {
        ptx_text::target(self.ptx)
    }

    /// The kernel `<name>_<dtype>`, as the `.cu` files name them.
    pub(crate) fn kernel<T: WithDType>(self, device: &CudaDevice, name: &str) -> Result<Kernel> {
        self.kernel_named(device, &format!("{name}_{}", T::DTYPE.as_str()))
    }

    /// The kernel of this very name, which no other of the crate has.
    ///
    /// It is loaded alone: a driver compiles all that a module holds.
    pub(crate) fn kernel_named(self, device: &CudaDevice, name: &str) -> Result<Kernel> {
        // What the driver is asked for belongs to the context of the thread, which need not have one yet.
        device.cuda_stream().context().bind_to_thread().w()?;
        // Candle keeps what is loaded under this name, for all crates of a program.
        let module = format!("candle_dropout {}::{name}", env!("CARGO_PKG_VERSION"));
        let function = device.get_or_load_custom_func(name, &module, &self.alone(name)?)?;
        let (op, stream) = (self.op, device.cuda_stream());
        Ok(Kernel { op, name: name.into(), function: function.into_cuda_function(), stream })
    }

    /// The text of a module that holds one kernel alone, cut out once.
    fn alone(self, name: &str) -> Result<Arc<str>> {
        static TEXTS: LazyLock<Mutex<HashMap<String, Arc<str>>>> = LazyLock::new(Mutex::default);
        // A text is there or not, so a panic elsewhere leaves nothing half done.
        let mut texts = TEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(text) = texts.get(name) {
            return Ok(text.clone());
        }
        let Some(text) = ptx_text::kernel_alone(self.ptx, name) else {
            bail!("{}: there is no kernel {name}", self.op)
        };
        let text: Arc<str> = text.into();
        texts.insert(name.into(), text.clone());
        Ok(text)
    }
}

/// A kernel on a device.
pub(crate) struct Kernel {
    op: &'static str,
    name: String,
    function: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Kernel {
    /// An empty list of arguments.
    pub(crate) fn args(&self) -> LaunchArgs<'_> {
        self.stream.launch_builder(&self.function)
    }

    /// Lets it use as much dynamic shared memory as `launch` gives it.
    pub(crate) fn allow_shared_memory(&self, launch: Launch) -> Result<()> {
        /// What every kernel may use without asking.
        const DEFAULT_BYTES: u32 = 48 << 10;
        if launch.shared_bytes <= DEFAULT_BYTES {
            return Ok(());
        }
        let context = self.stream.context();
        let limit = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let (limit, wanted) = (context.attribute(limit).w()?, launch.shared_bytes as i32);
        if wanted > limit {
            bail!(
                "{}: q: expected a GPU with {wanted} bytes of shared memory a block for {}, got {limit}; \
                 use f32 or a smaller head size (last dimension)",
                self.op,
                self.name
            )
        }
        let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        self.function.set_attribute(attribute, wanted).w()
    }
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

/// An output as the storage of a tensor.
pub(crate) fn storage<T: CudaDType>(output: CudaSlice<T>, device: &CudaDevice) -> Storage {
    Storage::Cuda(CudaStorage::wrap_cuda_slice(output, device.clone()))
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
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_kernel_stands_alone() {
        let mut names = HashSet::new();
        for module in ptx::ALL {
            // What stands between two of them, one or the other would lack.
            let is_shared = |line: &str| {
                line.contains(".func") || line.starts_with(".global") || line.starts_with(".const")
            };
            assert_eq!(module.lines().find(|line| is_shared(line)), None);
            for name in module.split(".visible .entry ").skip(1).filter_map(|e| e.split('(').next())
            {
                let text = Module::new("test", module).alone(name).unwrap();
                assert_eq!(text.matches(".entry").count(), 1, "{name}");
                let [opened, closed] = ['{', '}'].map(|brace| text.matches(brace).count());
                assert!(opened > 0 && opened == closed, "{name}");
                // Texts and modules are kept by this name alone.
                assert!(names.insert(name), "{name}");
            }
        }
        assert!(names.len() > 100, "{names:?}");
    }
}
