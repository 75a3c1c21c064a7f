//! `loss = mean over rows of -Σ q log softmax(logits)`.

mod args;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use std::sync::OnceLock;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Storage, Tensor, bail,
};

pub(crate) use args::CrossEntropyArgs;
pub use args::CrossEntropyConfig;

use crate::claim::detached;
use crate::elem::check_dtype;

const NAME: &str = "cross_entropy";

/// Mean cross entropy of logits and target classes, with label smoothing: one pass over the logits
/// forward, one backward, and no softmax in memory.
///
/// ```text
/// lse  = log Σ_j exp(logits_j)                 q_j = (1 - eps) * [j == target] + eps / V
/// loss = mean of (lse - Σ_j q_j logits_j)      over the rows that are not ignored
/// dlogits_j = (exp(logits_j - lse) - q_j) * dloss / count
/// ```
///
/// # Shapes
/// `logits` `[.., V]`, strided or not, and `targets` `[..]`, one class below `V` for each row; the
/// loss is a scalar. What is kept for backward is one number a row.
///
/// # Dtypes
/// `logits` in f32, f16, bf16, and f64 on the CPU; `targets` in u32 or i64. The loss is an f32
/// whatever the logits are (f64 for f64): exponentials and their sums are taken in f32 and the
/// losses of the rows are added in f64, always in the same order.
///
/// # Randomness
/// None; the same loss for any number of threads.
///
/// If every row is ignored, the loss is 0 and so is every gradient (PyTorch gives NaN there, which
/// one empty micro-batch then spreads over all weights).
///
/// # Errors
/// `logits` is no float tensor, or f64 on CUDA, or a scalar, or has no classes; `targets` has
/// another shape, dtype or device than said above; `label_smoothing` is no number from 0 to 1. On
/// the CPU also: a target that is neither a class nor ignored. On CUDA nobody waits for the device
/// to find that out: the loss and the gradient of such a row are NaN.
///
/// Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception architecture for computer
/// vision", 2016, arXiv 1512.00567 (section 7, label smoothing).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{CrossEntropyConfig, cross_entropy};
///
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[0f32, 0.], [0., 0.], [7., 5.]], &Device::Cpu)?;
/// let targets = Tensor::new(&[1i64, 0, -100], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &targets, &CrossEntropyConfig::default())?;
/// assert_eq!(loss.to_scalar::<f32>()?, std::f32::consts::LN_2);
/// # Ok(())
/// # }
/// ```
pub fn cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    config: &CrossEntropyConfig,
) -> Result<Tensor> {
    check_dtype(NAME, "logits", logits)?;
    let Some((&classes, rows)) = logits.dims().split_last() else {
        bail!("{NAME}: logits: expected [.., V], got a scalar; unsqueeze it")
    };
    if targets.dims() != rows {
        bail!(
            "{NAME}: targets: expected shape {rows:?}, one class for each row of logits {:?}, got {:?}; \
             reshape both to the same rows",
            logits.dims(),
            targets.dims()
        )
    }
    if !matches!(targets.dtype(), DType::U32 | DType::I64) {
        bail!(
            "{NAME}: targets: expected dtype u32 or i64, got {:?}; convert it with to_dtype",
            targets.dtype()
        )
    }
    if !targets.device().same_device(logits.device()) {
        bail!(
            "{NAME}: targets: expected device {:?} like logits, got {:?}; move it with to_device",
            logits.device().location(),
            targets.device().location()
        )
    }
    if classes == 0 && targets.elem_count() > 0 {
        bail!("{NAME}: logits: expected at least one class, got {:?}", logits.dims())
    }
    if !(0. ..=1.).contains(&config.label_smoothing) {
        bail!(
            "{NAME}: label_smoothing: expected a number from 0 to 1, got {}; the usual one is 0.1",
            config.label_smoothing
        )
    }
    let args = CrossEntropyArgs::new(targets.elem_count(), classes, config);
    let targets = targets.to_dtype(DType::I64)?.contiguous()?.detach();
    logits.contiguous()?.apply_op1(CrossEntropy { args, targets, kept: OnceLock::new() })
}

struct CrossEntropy {
    args: CrossEntropyArgs,
    /// i64.
    targets: Tensor,
    kept: OnceLock<Kept>,
}

/// What forward leaves for backward; never taken, for backward may run again.
#[derive(Clone)]
struct Kept {
    /// Of each row, in the type that is computed in.
    lse: Tensor,
    /// A scalar: 1 over the number of rows that count, or 0.
    inverse_count: Tensor,
}

/// What a forward pass computes.
struct Forward<S> {
    loss: S,
    lse: S,
    inverse_count: S,
}

impl CrossEntropy {
    /// Keeps what backward needs, and returns the loss.
    fn keep<S>(&self, forward: Forward<S>, storage: impl Fn(S) -> Storage) -> Result<(S, Shape)> {
        let Forward { loss, lse, inverse_count } = forward;
        let kept = Kept {
            lse: detached(storage(lse), self.targets.elem_count()),
            inverse_count: detached(storage(inverse_count), ()),
        };
        match self.kept.set(kept) {
            Ok(()) => Ok((loss, ().into())),
            Err(_) => bail!("{NAME}: expected to run once; apply a new op"),
        }
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.keep(cpu::fwd(&self.args, (logits, layout), &self.targets)?, Storage::Cpu)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        logits: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.keep(cuda::fwd(&self.args, (logits, layout), &self.targets)?, Storage::Cuda)
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, dloss: &Tensor) -> Result<Option<Tensor>> {
        let Some(kept) = self.kept.get().cloned() else {
            bail!("{NAME}: expected a forward pass before backward; apply the op")
        };
        let grad = CrossEntropyGrad { args: self.args, targets: self.targets.clone(), kept };
        logits.apply_op2_no_bwd(&dloss.contiguous()?, &grad).map(Some)
    }
}

/// `dlogits` from (logits, dloss).
struct CrossEntropyGrad {
    args: CrossEntropyArgs,
    targets: Tensor,
    kept: Kept,
}

impl CustomOp2 for CrossEntropyGrad {
    fn name(&self) -> &'static str {
        "cross_entropy_grad"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        layout: &Layout,
        dloss: &CpuStorage,
        dloss_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let dloss = (dloss, dloss_layout);
        let dlogits = cpu::bwd(&self.args, (logits, layout), &self.targets, &self.kept, dloss)?;
        Ok((dlogits, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        logits: &candle_core::CudaStorage,
        layout: &Layout,
        dloss: &candle_core::CudaStorage,
        dloss_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let dloss = (dloss, dloss_layout);
        let dlogits = cuda::bwd(&self.args, (logits, layout), &self.targets, &self.kept, dloss)?;
        Ok((dlogits, layout.shape().clone()))
    }
}
