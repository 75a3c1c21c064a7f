use std::collections::BTreeMap;

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{
    CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, PushKernelArg,
};
use candle_core::{DType, Device, Result, Tensor, bail};
use half::{bf16, f16};

use super::args::{AdamWArgs, AdamWProgress, AdamWRule, AdamWTensor};
use super::progress::Progress;
use super::{NAME, Step, Update};
use crate::cuda::{Module, launch, multiprocessors, output, ptx};
use crate::input::Input;
use crate::training::in_place::{Written, write};

const KERNELS: Module = Module::new(NAME, ptx::ADAMW);

/// Variables of a launch: a table of 64 KB at most is copied without waiting for the device.
const MOST_TENSORS: usize = 1024;

// SAFETY: `repr(C)` integers and floats without padding, laid out as the structs of the kernels.
unsafe impl DeviceRepr for AdamWTensor {}
// SAFETY: as above.
unsafe impl DeviceRepr for AdamWArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for AdamWRule {}

/// The variables of a launch.
struct Table {
    dtypes: Dtypes,
    tensors: Vec<AdamWTensor>,
    chunks: u64,
}

/// What chooses the kernels.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Dtypes {
    F32,
    F16,
    Bf16,
    F16WithF32Gradients,
    Bf16WithF32Gradients,
}

impl Dtypes {
    fn of(update: &Update<'_>) -> Result<Self> {
        Ok(match (update.param.dtype(), update.grad.dtype()) {
            (DType::F32, DType::F32) => Self::F32,
            (DType::F16, DType::F16) => Self::F16,
            (DType::BF16, DType::BF16) => Self::Bf16,
            (DType::F16, DType::F32) => Self::F16WithF32Gradients,
            (DType::BF16, DType::F32) => Self::Bf16WithF32Gradients,
            dtypes => bail!(
                "{NAME}: expected a float variable and its gradient, got {dtypes:?}; convert them with to_dtype"
            ),
        })
    }

    fn step(self) -> &'static str {
        match self {
            Self::F32 => "adamw_step_f32",
            Self::F16 => "adamw_step_f16",
            Self::Bf16 => "adamw_step_bf16",
            Self::F16WithF32Gradients => "adamw_step_of_f32_f16",
            Self::Bf16WithF32Gradients => "adamw_step_of_f32_bf16",
        }
    }

    /// By the gradients alone.
    fn norm(self) -> &'static str {
        match self {
            Self::F16 => "adamw_norm_f16",
            Self::Bf16 => "adamw_norm_bf16",
            Self::F32 | Self::F16WithF32Gradients | Self::Bf16WithF32Gradients => "adamw_norm_f32",
        }
    }
}

pub(super) fn step(step: &Step<'_>, progress: &mut Progress) -> Result<()> {
    let Device::Cuda(device) = step.device else {
        bail!("{NAME}: expected variables on CUDA; move them with to_device")
    };
    let stream = device.cuda_stream();
    let tables = tables(step, &stream)?;
    // On the device where this is fixed, a copy of the host otherwise.
    let (by_value, on_device) = match progress {
        Progress::Host(progress) => {
            progress.next_step(&step.rule);
            (*progress, 0)
        }
        Progress::Cuda(progress) => (AdamWProgress::new(1.), to_write(progress, &stream)?),
    };
    let uploaded = tables.iter().map(|table| device.clone_htod(&table.tensors));
    let uploaded = uploaded.collect::<Result<Vec<_>>>()?;
    let args_of =
        |table: &Table| AdamWArgs::new(step.params, &by_value, (table.tensors.len(), table.chunks));
    let multiprocessors = multiprocessors(device)?;

    if on_device != 0 {
        let chunks: u64 = tables.iter().map(|table| table.chunks).sum();
        // SAFETY: each `adamw_norm` writes the sums of its chunks.
        let partials = unsafe { output::<f64>(device, chunks as usize) }?;
        let mut first = 0;
        for (table, tensors) in tables.iter().zip(&uploaded) {
            let behind = first + table.chunks as usize;
            let (partials, args) = (partials.slice(first..behind), args_of(table));
            first = behind;
            let kernel = KERNELS.kernel_named(device, table.dtypes.norm())?;
            let mut list = kernel.args();
            list.arg(tensors).arg(&partials).arg(&args);
            // SAFETY: (tensors, partials, args); args says how many tensors and chunks there are, and the
            // tensors where their gradients lie, and how long they are.
            unsafe { launch(list, args.launch(multiprocessors)) }?;
        }
        let kernel = KERNELS.kernel_named(device, "adamw_norm_total")?;
        let mut list = kernel.args();
        list.arg(&partials).arg(&on_device).arg(&chunks).arg(&step.rule);
        // SAFETY: (partials, progress, chunks, rule); partials holds `chunks` numbers, progress its own.
        unsafe { launch(list, AdamWArgs::launch_total()) }?;
    }
    for (table, tensors) in tables.iter().zip(&uploaded) {
        let args = args_of(table);
        let kernel = KERNELS.kernel_named(device, table.dtypes.step())?;
        let mut list = kernel.args();
        list.arg(tensors).arg(&on_device).arg(&args);
        // SAFETY: (tensors, progress, args); the tensors say where gradients, and what is written, lie, each
        // of as many elements as they say; nobody else reads or writes them on this stream meanwhile.
        unsafe { launch(list, args.launch(multiprocessors)) }?;
    }
    // Once more, now that the kernels are under way: so that other streams wait for them.
    if stream.context().is_managing_stream_synchronization() {
        for update in &step.updates {
            entry(update, &stream)?;
        }
        if let Progress::Cuda(progress) = progress {
            to_write(progress, &stream)?;
        }
    }
    Ok(())
}

/// All variables, by their dtypes.
fn tables(step: &Step<'_>, stream: &CudaStream) -> Result<Vec<Table>> {
    let mut of_dtypes = BTreeMap::<Dtypes, Vec<AdamWTensor>>::new();
    for update in &step.updates {
        of_dtypes.entry(Dtypes::of(update)?).or_default().push(entry(update, stream)?);
    }
    let mut tables = Vec::new();
    for (dtypes, tensors) in of_dtypes {
        for tensors in tensors.chunks(MOST_TENSORS) {
            let (mut tensors, mut chunks) = (tensors.to_vec(), 0);
            for tensor in &mut tensors {
                tensor.first_chunk = chunks;
                chunks += AdamWTensor::chunks(tensor.len);
            }
            tables.push(Table { dtypes, tensors, chunks });
        }
    }
    Ok(tables)
}

/// A variable as the kernels find it, in a table that begins with it.
fn entry(update: &Update<'_>, stream: &CudaStream) -> Result<AdamWTensor> {
    Ok(AdamWTensor {
        param: to_write(update.param, stream)?,
        grad: to_read(&update.grad, stream)?,
        first_moment: to_write(update.first_moment, stream)?,
        second_moment: to_write(update.second_moment, stream)?,
        master: match update.master {
            Some(master) => to_write(master, stream)?,
            None => 0,
        },
        len: update.grad.elem_count() as u64,
        first_chunk: 0,
        lr: update.lr as f32,
        kept: update.kept() as f32,
    })
}

/// The address of a contiguous tensor, once it may be read on this stream. It is good for as long as the
/// tensor lives.
fn to_read(tensor: &Tensor, stream: &CudaStream) -> Result<u64> {
    fn of<T: CudaDType>(tensor: &Input<'_>, stream: &CudaStream) -> Result<u64> {
        Ok(tensor.view::<T>()?.device_ptr(stream).0)
    }
    let tensor = Input::new(NAME, tensor);
    match tensor.dtype() {
        DType::F32 => of::<f32>(&tensor, stream),
        DType::F16 => of::<f16>(&tensor, stream),
        DType::BF16 => of::<bf16>(&tensor, stream),
        dtype => Err(crate::check::unsupported_on_cuda(NAME, "gradient", dtype)),
    }
}

/// The same, once it may be written.
fn to_write(tensor: &Tensor, stream: &CudaStream) -> Result<u64> {
    fn of<T: CudaDType>(tensor: Written<'_>, stream: &CudaStream) -> Result<u64> {
        let (storage, (start, end)) = tensor.cuda()?;
        let mut elements = storage.as_cuda_slice_mut::<T>()?.slice_mut(start..end);
        let (address, _) = elements.device_ptr_mut(stream);
        Ok(address)
    }
    write(NAME, tensor, |written| match tensor.dtype() {
        DType::F32 => of::<f32>(written, stream),
        DType::F64 => of::<f64>(written, stream),
        DType::F16 => of::<f16>(written, stream),
        DType::BF16 => of::<bf16>(written, stream),
        dtype => Err(crate::check::unsupported_on_cuda(NAME, "variable", dtype)),
    })
}
