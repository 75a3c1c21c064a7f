//! `y[n] = residual[n] + (keep[n] ? x[n] * scale : 0)`.

mod composed;
pub(super) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor, bail};

use crate::check::{check_dtype, check_same};
use crate::composed::composes;
use crate::graph::{node, run_pass};
use crate::mask::{DropMask, MaskArgs};

const NAME: &str = "drop_path_add";

/// What stochastic depth drops together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StochasticDepth {
    /// Each sample of the batch (index of the first dimension) draws for itself.
    #[default]
    Row,
    /// The whole batch draws once, as in the paper.
    Batch,
}

impl StochasticDepth {
    /// The dimension of the mask that has the samples.
    fn batch_dim(self) -> Option<usize> {
        match self {
            Self::Row => Some(1),
            Self::Batch => None,
        }
    }
}

/// Adds a residual branch that is dropped as a whole, sample by sample or batch by batch.
///
/// ```text
/// y[n] = residual[n] + (keep[n] ? x[n] * scale : 0)
/// dx[n] = keep[n] ? dy[n] * scale : 0          dresidual = dy
/// ```
///
/// # Shapes
/// `x` and `residual` of one shape `[N, ..]`, strided or not; `y` has their shape. The mask has the
/// shape `[1, N]` ([`StochasticDepth::Row`]) or `[1, 1]` ([`StochasticDepth::Batch`]), and that is what
/// a window of `drop` refers to.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for all tensors. Halves are computed in f32 and rounded
/// once.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone. A dropped branch leaves the bare residual, whatever `x`
/// holds; the CUDA kernel does not even read it.
///
/// # Errors
/// A tensor is no float tensor, or f64 off the CPU; shapes, dtypes or devices differ; `x` is a scalar and
/// has no samples; the window of `drop` does not fit the mask.
///
/// Huang, Sun, Liu, Sedra, Weinberger, "Deep networks with stochastic depth", 2016, arXiv 1603.09382
/// (eq. 2; here the kept branch is scaled in training instead of at test time).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey};
/// use candle_dropout::functional::{StochasticDepth, drop_path_add};
///
/// # fn main() -> candle_core::Result<()> {
/// let branch = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let stream = Tensor::new(&[[10f32, 20.], [30., 40.]], &Device::Cpu)?;
/// let drop = DropMask::new(0.5, MaskKey::new(3))?;
/// let y = drop_path_add(&branch, &stream, StochasticDepth::Row, &drop)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[10., 20.], [36., 48.]]);
/// # Ok(())
/// # }
/// ```
pub fn drop_path_add(
    x: &Tensor,
    residual: &Tensor,
    mode: StochasticDepth,
    drop: &DropMask,
) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    check_same(NAME, "residual", residual, "x", x)?;
    if let Some(repeats) = drop.repeats(NAME, x.dims(), mode.batch_dim())? {
        return repeats.each(|part| {
            drop_path_add(&part.of("x", x)?, &part.of("residual", residual)?, mode, &part.drop)
        });
    }
    let samples = samples(NAME, mode, x)?;
    let mask = drop.args(NAME, &[1, samples])?;
    if composes(x.device()) {
        return composed::drop_path_add(&mask, samples, x, Some(residual));
    }
    let (x, residual) = (x.contiguous()?, residual.contiguous()?);
    let y = run_pass!(NAME, x, fwd(&mask, samples, &x, Some(&residual)))?;
    node(NAME, [Some(&x), Some(&residual)], (y, x.shape()), move |back| {
        let dy = back.dy.contiguous()?;
        let dx = back.of(0, || match mask.keeps_all() {
            true => Ok(dy.clone()),
            false => branch_alone(mask, samples, &dy),
        })?;
        Ok([dx, Some(dy)])
    })
}

/// Drops a branch as a whole, sample by sample or batch by batch, and leaves it to the caller to add the residual;
/// [`drop_path_add`] does both in one pass.
///
/// ```text
/// y[n] = keep[n] ? x[n] * scale : 0            dx[n] = keep[n] ? dy[n] * scale : 0
/// ```
///
/// Shapes, dtypes, randomness, errors and the paper are those of [`drop_path_add`], of which it is the branch. With
/// [`DropMask::none`] nothing is launched and `x` itself is returned.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::functional::{StochasticDepth, drop_path};
/// use candle_dropout::{DropMask, MaskKey};
///
/// # fn main() -> candle_core::Result<()> {
/// let branch = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let drop = DropMask::new(0.5, MaskKey::new(3))?;
/// let y = drop_path(&branch, StochasticDepth::Row, &drop)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[0., 0.], [6., 8.]]);
/// # Ok(())
/// # }
/// ```
pub fn drop_path(x: &Tensor, mode: StochasticDepth, drop: &DropMask) -> Result<Tensor> {
    const NAME: &str = "drop_path";
    check_dtype(NAME, "x", x)?;
    if let Some(repeats) = drop.repeats(NAME, x.dims(), mode.batch_dim())? {
        return repeats.each(|part| drop_path(&part.of("x", x)?, mode, &part.drop));
    }
    let samples = samples(NAME, mode, x)?;
    let mask = drop.args(NAME, &[1, samples])?;
    if drop.is_none() {
        return Ok(x.clone());
    }
    if composes(x.device()) {
        return composed::drop_path_add(&mask, samples, x, None);
    }
    branch_alone(mask, samples, &x.contiguous()?)
}

/// The branch without a residual: the gradient of x, and its own.
fn branch_alone(mask: MaskArgs, samples: usize, x: &Tensor) -> Result<Tensor> {
    let y = run_pass!(NAME, x, fwd(&mask, samples, x, None))?;
    node("drop_path", [Some(x)], (y, x.shape()), move |back| {
        Ok([Some(branch_alone(mask, samples, &back.dy.contiguous()?)?)])
    })
}

/// How many samples draw for themselves.
pub(super) fn samples(op: &str, mode: StochasticDepth, x: &Tensor) -> Result<usize> {
    match (mode, x.dims()) {
        (StochasticDepth::Batch, _) => Ok(1),
        (StochasticDepth::Row, [samples, ..]) => Ok(*samples),
        (StochasticDepth::Row, []) => bail!(
            "{op}: x: expected a batch dimension, got a scalar; unsqueeze it or use \
             StochasticDepth::Batch"
        ),
    }
}
