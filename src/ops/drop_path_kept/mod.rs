//! `y[n] = residual[n] + (keep[n] ? branch(x[kept])[n] * scale : 0)`, without computing what is
//! dropped.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Device, Layout, Result, Shape, Tensor, bail};

use crate::elem::{check_alike, check_dtype};
use crate::mask::DropMask;
use crate::ops::drop_path_add::{StochasticDepth, drop_path_add, samples};

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
/// residual, depth, drop)` if `branch` treats each sample by itself (as everything but batch
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
/// If no sample is kept, `branch` is not called: `x` gets zero gradients, and parameters that
/// nothing else uses get none in this step.
///
/// # Errors
/// A tensor is no float tensor, or f64 on CUDA; `x` or `residual` is a scalar, or they differ in
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
/// use candle_dropout::{DropMask, MaskKey, StochasticDepth, drop_path_kept};
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
    depth: StochasticDepth,
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
    if !residual.device().same_device(x.device()) {
        bail!(
            "{NAME}: residual: expected device {:?} like x, got {:?}; move it with to_device",
            x.device().location(),
            residual.device().location()
        )
    }
    let samples = samples(NAME, depth, x)?;
    let mask = drop.args(NAME, &[1, samples])?;
    let keep = mask.keep_first_row(samples);
    let kept = keep.iter().filter(|keep| **keep).count();
    let residual = residual.contiguous()?;
    if kept == samples {
        let branch = branch(x)?;
        check_branch(&branch, &residual, n)?;
        return drop_path_add(&branch, &residual, depth, drop);
    }
    let places = Places::new(&keep, x.device())?;
    let op = ScatterAdd { places: places.clone(), scale: mask.scale() };
    if places.of_kept.is_none() {
        return x.contiguous()?.apply_op2(&residual, op);
    }
    let branch = branch(&x.contiguous()?.apply_op1(Gather(places))?)?;
    check_branch(&branch, &residual, kept)?;
    branch.contiguous()?.apply_op2(&residual, op)
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
    check_alike(NAME, "branch", branch, residual)
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
    fn new(keep: &[bool], device: &Device) -> Result<Self> {
        let mut of_kept = Vec::new();
        let mut of_samples = vec![NOWHERE; keep.len()];
        for sample in (0..keep.len()).filter(|sample| keep[*sample]) {
            of_samples[sample] = of_kept.len() as u32;
            of_kept.push(sample as u32);
        }
        let kept = of_kept.len();
        let of_kept = (kept > 0).then(|| Tensor::from_vec(of_kept, kept, device)).transpose()?;
        Ok(Self { of_samples: Tensor::from_vec(of_samples, keep.len(), device)?, of_kept })
    }
}

/// `y[n] = x[places[n]] * scale`, or 0 where a sample comes from nowhere. It has no backward pass:
/// the two ops below have, and are made of it.
struct Move<'a> {
    places: &'a Tensor,
    scale: f32,
}

impl Move<'_> {
    /// x with as many samples as there are places.
    fn output(&self, x: &Layout) -> Shape {
        let mut dims = x.dims().to_vec();
        if let Some(samples) = dims.first_mut() {
            *samples = self.places.elem_count();
        }
        dims.into()
    }
}

impl CustomOp1 for Move<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = self.output(layout);
        let y = cpu::fwd(self.places, self.scale, (x, layout), None, &shape)?;
        Ok((y, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let shape = self.output(layout);
        let y = cuda::fwd(self.places, self.scale, (x, layout), None, &shape)?;
        Ok((y, shape))
    }
}

/// The kept samples of a batch, of which there is at least one.
struct Gather(Places);

impl Gather {
    fn forward(&self) -> Result<Move<'_>> {
        let Some(places) = &self.0.of_kept else {
            bail!("{NAME}: expected a kept sample to gather, got none; leave the branch out")
        };
        Ok(Move { places, scale: 1. })
    }
}

impl CustomOp1 for Gather {
    fn name(&self) -> &'static str {
        "drop_path_gather"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward()?.cpu_fwd(x, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.forward()?.cuda_fwd(x, layout)
    }

    fn bwd(&self, _x: &Tensor, _kept: &Tensor, dkept: &Tensor) -> Result<Option<Tensor>> {
        let backward = Move { places: &self.0.of_samples, scale: 1. };
        dkept.contiguous()?.apply_op1_no_bwd(&backward).map(Some)
    }
}

/// The result of the branch, scaled and added to the residual. Where no sample is kept there is no
/// such result: x takes its place, is not read, and gets zero gradients.
struct ScatterAdd {
    places: Places,
    scale: f32,
}

impl CustomOp2 for ScatterAdd {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        branch: &CpuStorage,
        branch_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let residual = (residual, residual_layout);
        // What is not read may be any tensor of the right dtype.
        let branch = if self.places.of_kept.is_some() { (branch, branch_layout) } else { residual };
        let shape = residual_layout.shape().clone();
        let y = cpu::fwd(&self.places.of_samples, self.scale, branch, Some(residual), &shape)?;
        Ok((y, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        branch: &candle_core::CudaStorage,
        branch_layout: &Layout,
        residual: &candle_core::CudaStorage,
        residual_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let residual = (residual, residual_layout);
        let branch = if self.places.of_kept.is_some() { (branch, branch_layout) } else { residual };
        let shape = residual_layout.shape().clone();
        let y = cuda::fwd(&self.places.of_samples, self.scale, branch, Some(residual), &shape)?;
        Ok((y, shape))
    }

    fn bwd(
        &self,
        branch: &Tensor,
        residual: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let dbranch = match &self.places.of_kept {
            _ if !branch.track_op() => None,
            None => Some(branch.zeros_like()?),
            Some(places) => Some(dy.apply_op1_no_bwd(&Move { places, scale: self.scale })?),
        };
        Ok((dbranch, residual.track_op().then_some(dy)))
    }
}
