//! `y[n] = residual[n] + (keep[n] ? branch(x[kept])[n] * scale : 0)`, without computing what is
//! dropped.

mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Device, Result, Tensor, bail};

use super::drop_path_add::{StochasticDepth, drop_path_add, samples};
use crate::check::{check_alike, check_device, check_dtype};
use crate::composed::composes;
use crate::graph::{detached, node, run_pass};
use crate::mask::DropMask;

const NAME: &str = "drop_path_kept";

/// Adds a residual branch that is computed for the kept samples only: stochastic depth whose cost
/// in time and memory falls with the rate.
///
/// ```text
/// y[n] = residual[n] + (keep[n] ? branch(x[kept])[n] * scale : 0)
/// ```
///
/// The samples that `drop` keeps are gathered, `branch` runs on them alone, and its scaled result
/// is added to the residual at their places. The output is that of [`drop_path_add`]`(branch(x),
/// residual, mode, drop)` if `branch` treats each sample by itself (as everything but batch
/// normalisation does), and bit for bit where it also gives a sample the same bits among `K` as
/// among `N` (a matrix product may not). The gradients are its gradients up to the order of sums
/// over samples and the signs of zeros.
///
/// # Shapes
/// `x` `[N, ..]` and `residual` `[N, ..]`, strided or not, of the same `N`; the rest of their
/// shapes may differ. `branch` maps `[K, ..]`, the kept samples of `x` in their order, to `[K,
/// ..]`, shaped like the kept samples of `residual`; `y` has the shape of `residual`. The mask has
/// the shape `[1, N]`, or `[1, 1]` for [`StochasticDepth::Batch`], and that is what a window of
/// `drop` refers to.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for `residual` and the result of `branch`. Halves are
/// computed in f32 and rounded once.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone, so which samples are kept is known on the host and
/// no device is waited for. What `branch` itself drops is drawn for `K` samples, by their position
/// among the kept.
///
/// In the passes of a [`McDropout`](crate::McDropout) it is computed for all samples: there what a sample sees depends
/// on no other.
///
/// If no sample is kept, `branch` is not called: `x` gets zero gradients, and parameters that
/// nothing else uses get none in this step.
///
/// # Errors
/// A tensor is no float tensor, or f64 off the CPU; `x` or `residual` is a scalar, or they differ in
/// `N` or device; `branch` fails or returns another shape, dtype or device; the window of `drop`
/// does not fit the mask.
///
/// Oquab et al., "DINOv2: learning robust visual features without supervision", 2023, arXiv
/// 2304.07193 (section 5, efficient stochastic depth; here each sample draws for itself); Huang,
/// Sun, Liu, Sedra, Weinberger, "Deep networks with stochastic depth", 2016, arXiv 1603.09382.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskKey};
/// use candle_dropout::functional::{StochasticDepth, drop_path_kept};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let stream = Tensor::new(&[[10f32, 20.], [30., 40.]], &Device::Cpu)?;
/// let drop = DropMask::new(0.5, MaskKey::new(3))?; // keeps the second sample
/// let y = drop_path_kept(&x, &stream, StochasticDepth::Row, &drop, |kept| {
///     assert_eq!(kept.to_vec2::<f32>()?, [[3., 4.]]);
///     kept * 10.
/// })?;
/// assert_eq!(y.to_vec2::<f32>()?, [[10., 20.], [90., 120.]]);
/// # Ok(())
/// # }
/// ```
pub fn drop_path_kept(
    x: &Tensor,
    residual: &Tensor,
    mode: StochasticDepth,
    drop: &DropMask,
    branch: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    check_dtype(NAME, "residual", residual)?;
    let (&[n, ..], &[residual_n, ..]) = (x.dims(), residual.dims()) else {
        bail!(
            "{NAME}: x, residual: expected a batch dimension, got {:?} and {:?}; unsqueeze them",
            x.dims(),
            residual.dims()
        )
    };
    if n != residual_n {
        bail!(
            "{NAME}: residual: expected {n} samples like x {:?}, got {:?}; both are batches of the same \
             samples",
            x.dims(),
            residual.dims()
        )
    }
    check_device(NAME, "residual", residual, "x", x.device())?;
    if drop.is_repeated() {
        // What the branch itself drops is drawn by sample there, so that none may be missing.
        let branch = branch(x)?;
        check_branch(&branch, residual, n)?;
        return drop_path_add(&branch, residual, mode, drop);
    }
    let samples = samples(NAME, mode, x)?;
    let mask = drop.args(NAME, &[1, samples])?;
    let keep = mask.keep(&[samples]);
    let kept = keep.iter().filter(|keep| **keep == 1).count();
    let residual = residual.contiguous()?;
    if kept == samples {
        let branch = branch(x)?;
        check_branch(&branch, &residual, n)?;
        return drop_path_add(&branch, &residual, mode, drop);
    }
    let places = Places::new(&keep, x.device())?;
    let x = x.contiguous()?;
    let Some(of_kept) = places.of_kept.clone() else {
        return scatter_add(places, mask.scale(), &x, &residual);
    };
    let branch = branch(&gather(&places, &of_kept, &x)?)?;
    check_branch(&branch, &residual, kept)?;
    scatter_add(places, mask.scale(), &branch.contiguous()?, &residual)
}

fn check_branch(branch: &Tensor, residual: &Tensor, kept: usize) -> Result<()> {
    let mut expected = residual.dims().to_vec();
    expected[0] = kept;
    if branch.dims() != expected {
        bail!(
            "{NAME}: branch: expected shape {expected:?}, the kept samples of residual, got {:?}; reshape \
             its result",
            branch.dims()
        )
    }
    check_alike(NAME, "branch", branch, "residual", residual)
}

/// Marks a sample that is nowhere: `NOWHERE` of `kernels/drop_path_kept.cu`.
const NOWHERE: u32 = u32::MAX;

/// Both ways between a batch and its kept samples: where each sample comes from, or nowhere.
#[derive(Clone)]
struct Places {
    /// For each sample of the batch its position among the kept.
    of_samples: Tensor,
    /// For each kept sample its position in the batch; nothing if none is kept.
    of_kept: Option<Tensor>,
}

impl Places {
    fn new(keep: &[u8], device: &Device) -> Result<Self> {
        let mut of_kept = Vec::new();
        let mut of_samples = vec![NOWHERE; keep.len()];
        for sample in (0..keep.len()).filter(|sample| keep[*sample] == 1) {
            of_samples[sample] = of_kept.len() as u32;
            of_kept.push(sample as u32);
        }
        let kept = of_kept.len();
        let of_kept = (kept > 0).then(|| Tensor::from_vec(of_kept, kept, device)).transpose()?;
        Ok(Self { of_samples: Tensor::from_vec(of_samples, keep.len(), device)?, of_kept })
    }
}

/// `y[n] = x[places[n]] * scale`, or 0 where a sample comes from nowhere; no part of a graph.
fn moved(x: &Tensor, places: &Tensor, scale: f32) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    if let Some(samples) = dims.first_mut() {
        *samples = places.elem_count();
    }
    let len = dims.iter().product();
    Ok(detached(run_pass!(NAME, x, fwd(places, scale, x, None, len))?, dims))
}

/// The kept samples of a batch, of which there is at least one.
fn gather(places: &Places, of_kept: &Tensor, x: &Tensor) -> Result<Tensor> {
    if composes(x.device()) {
        return composed::gather(of_kept, x);
    }
    let mut dims = x.dims().to_vec();
    dims[0] = of_kept.elem_count();
    let len = dims.iter().product();
    let kept = run_pass!(NAME, x, fwd(of_kept, 1., x, None, len))?;
    let of_samples = places.of_samples.clone();
    node("drop_path_gather", [Some(x)], (kept, dims), move |back| {
        Ok([Some(moved(&back.dy.contiguous()?, &of_samples, 1.)?)])
    })
}

/// The result of the branch, scaled and added to the residual. Where no sample is kept there is no such
/// result: x takes its place, is not read, and gets zero gradients.
fn scatter_add(places: Places, scale: f32, branch: &Tensor, residual: &Tensor) -> Result<Tensor> {
    if composes(residual.device()) {
        return composed::scatter_add(&places, scale, branch, residual);
    }
    // What is not read may be any tensor of the right dtype.
    let read = if places.of_kept.is_some() { branch } else { residual };
    let (of_samples, len) = (&places.of_samples, residual.elem_count());
    let y = run_pass!(NAME, read, fwd(of_samples, scale, read, Some(residual), len))?;
    let unread = places.of_kept.is_none().then(|| branch.detach());
    node(NAME, [Some(branch), Some(residual)], (y, residual.shape()), move |back| {
        let dy = back.dy.contiguous()?;
        let dbranch = back.of(0, || match (&places.of_kept, &unread) {
            (Some(of_kept), _) => moved(&dy, of_kept, scale),
            (None, Some(unread)) => unread.zeros_like(),
            (None, None) => {
                bail!("{NAME}: backward: expected a branch or its stand-in, got neither")
            }
        })?;
        Ok([dbranch, Some(dy)])
    })
}
