//! `y = dropout(softmax(scale * scores + mask))`.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod mask;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail,
};

use crate::elem::{check_alike, check_dtype};
use crate::mask::{DropMask, MaskArgs};
pub use mask::AttentionMask;
pub(crate) use mask::ScoreArgs;
use mask::sum_to_shape;

const NAME: &str = "softmax_dropout";

/// Attention probabilities from scores: scale, mask, softmax and dropout in one pass over memory.
///
/// ```text
/// t = scale * scores + mask          P = softmax(t) over the last dimension
/// y = keep ? P * drop_scale : 0
/// dP = keep ? dy * drop_scale : 0    dt = P * (dP - Σ P dP)    dscores = scale * dt    dmask = Σ dt
/// ```
///
/// # Shapes
/// `scores` of shape `[.., Sq, Sk]`, strided or not; `y` and the drop mask have its shape. A causal
/// mask is aligned to the bottom right: query `i` sees the keys up to `i + Sk - Sq`. An additive mask
/// is broadcast over `scores`.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for scores and additive mask. The softmax is computed in
/// f32 (f64 for f64) whatever the dtype, and rounded once.
///
/// # Randomness
/// `y` is `dropout(softmax(..), drop)` with the same mask, bit for bit. Backward stores neither mask nor
/// softmax: it computes both again from the scores.
///
/// A row with every key masked gives zeros and zero gradients. A key of probability 0 passes nothing on,
/// whatever the gradient that arrives there.
///
/// # Errors
/// `scores` is no float tensor, or f64 on CUDA; it has fewer than two dimensions with a causal mask;
/// `scale` is not finite as an f32; the additive mask has another dtype or device or does not
/// broadcast; the window of `drop` does not fit `scores`.
///
/// Vaswani et al., "Attention is all you need", 2017, arXiv 1706.03762 (eq. 1, with the dropout on the
/// weights of its reference implementation).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{AttentionMask, DropMask, softmax_dropout};
///
/// # fn main() -> candle_core::Result<()> {
/// let scores = Tensor::new(&[[1f32, 5.], [2., 2.]], &Device::Cpu)?;
/// let y = softmax_dropout(&scores, 1., &AttentionMask::Causal, &DropMask::none())?;
/// assert_eq!(y.to_vec2::<f32>()?, [[1., 0.], [0.5, 0.5]]);
/// # Ok(())
/// # }
/// ```
pub fn softmax_dropout(
    scores: &Tensor,
    scale: f64,
    mask: &AttentionMask,
    drop: &DropMask,
) -> Result<Tensor> {
    check_dtype(NAME, "scores", scores)?;
    if !(scale as f32).is_finite() {
        bail!("{NAME}: scale: expected a finite f32, got {scale}; the usual one is 1/sqrt(D)")
    }
    let op = SoftmaxDropout {
        drop: drop.args(NAME, scores.dims())?,
        scores: ScoreArgs::new(NAME, scores.dims(), scale, mask)?,
    };
    let scores = scores.contiguous()?;
    match mask {
        AttentionMask::None | AttentionMask::Causal => scores.apply_op1(op),
        AttentionMask::Additive(additive) => {
            check_alike(NAME, "mask", additive, &scores)?;
            scores.apply_op2(&additive.contiguous()?, op)
        }
    }
}

#[derive(Clone, Copy)]
struct SoftmaxDropout {
    drop: MaskArgs,
    scores: ScoreArgs,
}

impl CustomOp1 for SoftmaxDropout {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = cpu::fwd(&self.drop, &self.scores, (scores, layout), None)?;
        Ok((y, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        scores: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let y = cuda::fwd(&self.drop, &self.scores, (scores, layout), None)?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, scores: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if self.drop.drops_all() {
            return scores.zeros_like().map(Some);
        }
        let grad = SoftmaxDropoutGrad(*self);
        scores.apply_op2_no_bwd(&dy.contiguous()?, &grad).map(Some)
    }
}

impl CustomOp2 for SoftmaxDropout {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        scores: &CpuStorage,
        layout: &Layout,
        additive: &CpuStorage,
        additive_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let additive = Some((additive, additive_layout));
        let y = cpu::fwd(&self.drop, &self.scores, (scores, layout), additive)?;
        Ok((y, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        scores: &candle_core::CudaStorage,
        layout: &Layout,
        additive: &candle_core::CudaStorage,
        additive_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let additive = Some((additive, additive_layout));
        let y = cuda::fwd(&self.drop, &self.scores, (scores, layout), additive)?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(
        &self,
        scores: &Tensor,
        additive: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        if self.drop.drops_all() {
            let zeros = |arg: &Tensor| arg.track_op().then(|| arg.zeros_like()).transpose();
            return Ok((zeros(scores)?, zeros(additive)?));
        }
        let dy = dy.contiguous()?;
        if !additive.track_op() {
            let grad = SoftmaxDropoutGrad(*self);
            return Ok((Some(scores.apply_op3_no_bwd(additive, &dy, &grad)?), None));
        }
        // The mask is added after the scaling, so its gradient is that of unscaled scores.
        let unscaled =
            SoftmaxDropoutGrad(Self { scores: self.scores.with_unit_gradient(), ..*self });
        let dt = scores.apply_op3_no_bwd(additive, &dy, &unscaled)?;
        let dadditive = sum_to_shape(&dt, additive.dims())?;
        let dscores = scores.track_op().then(|| &dt * self.scores.scale()).transpose()?;
        Ok((dscores, Some(dadditive)))
    }
}

/// `dscores` from (scores, dy), or from (scores, additive mask, dy).
struct SoftmaxDropoutGrad(SoftmaxDropout);

impl CustomOp2 for SoftmaxDropoutGrad {
    fn name(&self) -> &'static str {
        "softmax_dropout_grad"
    }

    fn cpu_fwd(
        &self,
        scores: &CpuStorage,
        layout: &Layout,
        dy: &CpuStorage,
        dy_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let SoftmaxDropout { drop, scores: args } = &self.0;
        let dscores = cpu::bwd(drop, args, (scores, layout), None, (dy, dy_layout))?;
        Ok((dscores, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        scores: &candle_core::CudaStorage,
        layout: &Layout,
        dy: &candle_core::CudaStorage,
        dy_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let SoftmaxDropout { drop, scores: args } = &self.0;
        let dscores = cuda::bwd(drop, args, (scores, layout), None, (dy, dy_layout))?;
        Ok((dscores, layout.shape().clone()))
    }
}

impl CustomOp3 for SoftmaxDropoutGrad {
    fn name(&self) -> &'static str {
        "softmax_dropout_grad"
    }

    fn cpu_fwd(
        &self,
        scores: &CpuStorage,
        layout: &Layout,
        additive: &CpuStorage,
        additive_layout: &Layout,
        dy: &CpuStorage,
        dy_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let SoftmaxDropout { drop, scores: args } = &self.0;
        let additive = Some((additive, additive_layout));
        let dscores = cpu::bwd(drop, args, (scores, layout), additive, (dy, dy_layout))?;
        Ok((dscores, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        scores: &candle_core::CudaStorage,
        layout: &Layout,
        additive: &candle_core::CudaStorage,
        additive_layout: &Layout,
        dy: &candle_core::CudaStorage,
        dy_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let SoftmaxDropout { drop, scores: args } = &self.0;
        let additive = Some((additive, additive_layout));
        let dscores = cuda::bwd(drop, args, (scores, layout), additive, (dy, dy_layout))?;
        Ok((dscores, layout.shape().clone()))
    }
}
