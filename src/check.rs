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
    unsupported_on("CUDA", op, arg, dtype)
}

fn unsupported_on(device: &str, op: &str, arg: &str, dtype: DType) -> Error {
    Error::Msg(format!(
        "{op}: {arg}: expected dtype f32, f16 or bf16 on {device}, got {dtype:?}; convert it with \
         to_dtype(DType::F32) or move it to the CPU"
    ))
}

/// A device that this build has no pass for: CUDA, since ops are composed on all others.
pub(crate) fn unsupported_device(op: &str, device: &Device) -> Error {
    let device = if device.is_cuda() { "CUDA" } else { "another device" };
    Error::Msg(format!(
        "{op}: expected tensors on the CPU, since candle-dropout was built without its feature cuda, got one \
         on {device}; build with `candle-dropout/cuda`, as with `candle-core/cuda`, or move it with to_device"
    ))
}

/// Checks that `arg` is a float tensor that its device computes in.
pub(crate) fn check_dtype(op: &str, arg: &str, x: &Tensor) -> Result<()> {
    match x.dtype() {
        DType::F64 if x.device().is_cuda() => Err(unsupported_on_cuda(op, arg, DType::F64)),
        DType::F64 if !x.device().is_cpu() => Err(unsupported_on("Metal", op, arg, DType::F64)),
        DType::F32 | DType::F64 | DType::F16 | DType::BF16 => Ok(()),
        dtype => Err(unsupported_dtype(op, arg, dtype)),
    }
}

/// True if ops take a tensor of the dtype of `x` where it lies: what is left to candle otherwise.
pub(crate) fn has_passes(x: &Tensor) -> bool {
    check_dtype("", "", x).is_ok()
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

/// Checks that `arg` has the dtype and the device of the argument `like`, which is `x`.
pub(crate) fn check_alike(
    op: &str,
    arg: &str,
    tensor: &Tensor,
    like: &str,
    x: &Tensor,
) -> Result<()> {
    if tensor.dtype() != x.dtype() {
        bail!(
            "{op}: {arg}: expected dtype {:?} like {like}, got {:?}; convert it with to_dtype",
            x.dtype(),
            tensor.dtype()
        )
    }
    check_device(op, arg, tensor, like, x.device())
}

/// Checks that `arg` has the shape, the dtype and the device of the argument `like`, which is `x`.
pub(crate) fn check_same(
    op: &str,
    arg: &str,
    tensor: &Tensor,
    like: &str,
    x: &Tensor,
) -> Result<()> {
    if tensor.dims() != x.dims() {
        bail!(
            "{op}: {arg}: expected shape {:?} like {like}, got {:?}; expand it with broadcast_as",
            x.dims(),
            tensor.dims()
        )
    }
    check_alike(op, arg, tensor, like, x)
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
    check_alike(op, "bias", bias, "x", x)
}

/// Checks that a tensor has the dimensions that the caller has in mind, by name.
///
/// Ops take layouts from positions: [`attention`](crate::functional::attention()) reads `[B, S, H, D]` as `S` heads of
/// `H` positions, and no error can tell, since every size fits. State the sizes that your model knows where a tensor
/// comes from elsewhere. Sizes that are equal (as many heads as positions) still tell nothing apart: test with a text
/// of another length.
///
/// # Errors
/// The dimensions differ; the message names them, and the transposition that would mend it if there is one.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::functional::expect_dims;
///
/// # fn main() -> candle_core::Result<()> {
/// let q = Tensor::zeros((2, 7, 4, 16), DType::F32, &Device::Cpu)?; // of a model that keeps tokens first
/// let error = expect_dims("q", &q, &[("B", 2), ("H", 4), ("S", 7), ("D", 16)]).unwrap_err();
/// assert!(error.to_string().contains("expected [B 2, H 4, S 7, D 16], got [2, 7, 4, 16]; transpose(1, 2) it"));
/// expect_dims("q", &q.transpose(1, 2)?, &[("B", 2), ("H", 4), ("S", 7), ("D", 16)])?;
/// # Ok(())
/// # }
/// ```
pub fn expect_dims(arg: &str, tensor: &Tensor, dims: &[(&str, usize)]) -> Result<()> {
    let expected: Vec<usize> = dims.iter().map(|(_, size)| *size).collect();
    let got = tensor.dims();
    if got == expected {
        return Ok(());
    }
    let differing: Vec<usize> =
        (0..got.len().min(expected.len())).filter(|&at| got[at] != expected[at]).collect();
    let remedy = match differing[..] {
        [a, b] if got.len() == expected.len() && (got[a], got[b]) == (expected[b], expected[a]) => {
            format!("transpose({a}, {b}) it")
        }
        _ => "reshape it, or look where it comes from".to_string(),
    };
    let named: Vec<String> = dims.iter().map(|(name, size)| format!("{name} {size}")).collect();
    bail!("{arg}: expected [{}], got {got:?}; {remedy}", named.join(", "))
}

#[cfg(test)]
#[cfg(not(feature = "cuda"))]
mod tests {
    use candle_core::CudaDevice;

    use super::*;

    #[test]
    fn cuda_in_a_build_without_it_is_an_error_that_names_the_feature() {
        let error = unsupported_device("dropout", &Device::Cuda(CudaDevice)).to_string();
        assert!(error.starts_with("dropout: expected tensors on the CPU"), "{error}");
        assert!(error.contains("got one on CUDA; build with `candle-dropout/cuda`"), "{error}");
    }
}
