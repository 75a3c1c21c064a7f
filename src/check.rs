//! Checks of arguments, before any work is done. Messages name op, argument, expected, got and remedy.

use candle_core::{DType, Device, Error, Result, Tensor, bail};

/// Rows and columns of a tensor: its leading dimensions flattened, and its last one.
pub(crate) fn rows_cols(dims: &[usize]) -> (usize, usize) {
    let (cols, leading) = dims.split_last().map_or((1, dims), |(cols, leading)| (*cols, leading));
    (leading.iter().product(), cols)
}

pub(crate) fn unsupported_dtype(op: &str, arg: &str, dtype: DType) -> Error {
    Error::Msg(format!(
        "{op}: {arg}: expected dtype f32, f64, f16 or bf16, got {dtype:?}; convert it with to_dtype"
    ))
}

pub(crate) fn unsupported_on_cuda(op: &str, arg: &str, dtype: DType) -> Error {
    Error::Msg(format!(
        "{op}: {arg}: expected dtype f32, f16 or bf16 on CUDA, got {dtype:?}; convert it with \
         to_dtype(DType::F32) or move it to the CPU"
    ))
}

/// There are no kernels for this device.
pub(crate) fn unsupported_device(op: &str, device: &Device) -> Error {
    Error::Msg(format!(
        "{op}: x: expected the CPU, or CUDA with the feature cuda, got {:?}; move it with to_device",
        device.location()
    ))
}

/// Checks that `arg` is a float tensor that its device computes in.
pub(crate) fn check_dtype(op: &str, arg: &str, x: &Tensor) -> Result<()> {
    match x.dtype() {
        DType::F64 if x.device().is_cuda() => Err(unsupported_on_cuda(op, arg, DType::F64)),
        DType::F32 | DType::F64 | DType::F16 | DType::BF16 => Ok(()),
        dtype => Err(unsupported_dtype(op, arg, dtype)),
    }
}

/// Checks that `arg` lies on `device`, as the argument `like` does.
pub(crate) fn check_device(
    op: &str,
    arg: &str,
    tensor: &Tensor,
    like: &str,
    device: &Device,
) -> Result<()> {
    if !tensor.device().same_device(device) {
        bail!(
            "{op}: {arg}: expected device {:?} like {like}, got {:?}; move it with to_device",
            device.location(),
            tensor.device().location()
        )
    }
    Ok(())
}

/// Checks that `arg` has the dtype and the device of `x`.
pub(crate) fn check_alike(op: &str, arg: &str, tensor: &Tensor, x: &Tensor) -> Result<()> {
    if tensor.dtype() != x.dtype() {
        bail!(
            "{op}: {arg}: expected dtype {:?} like x, got {:?}; convert it with to_dtype",
            x.dtype(),
            tensor.dtype()
        )
    }
    check_device(op, arg, tensor, "x", x.device())
}

/// Checks that `arg` has the shape, the dtype and the device of `x`.
pub(crate) fn check_same(op: &str, arg: &str, tensor: &Tensor, x: &Tensor) -> Result<()> {
    if tensor.dims() != x.dims() {
        bail!(
            "{op}: {arg}: expected shape {:?} like x, got {:?}; expand it with broadcast_as",
            x.dims(),
            tensor.dims()
        )
    }
    check_alike(op, arg, tensor, x)
}

/// Checks that `bias` can be added to each row of `x`.
pub(crate) fn check_bias(op: &str, bias: &Tensor, x: &Tensor) -> Result<()> {
    let (_, cols) = rows_cols(x.dims());
    if bias.dims() != [cols] {
        bail!(
            "{op}: bias: expected shape [{cols}] like the last dimension of x {:?}, got {:?}; \
             reshape it to one dimension",
            x.dims(),
            bias.dims()
        )
    }
    check_alike(op, "bias", bias, x)
}
