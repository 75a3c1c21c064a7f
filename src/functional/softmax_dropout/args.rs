use candle_core::{DType, Result, Tensor, bail};

use crate::check::expect_dims;
use crate::cuda::sizes::{Launch, whole_rows};
use crate::mask::RowMap;

/// Which keys a query may attend to.
#[derive(Clone, Debug, Default)]
pub enum AttentionMask {
    /// All of them.
    #[default]
    None,
    /// Those up to its own position, aligned to the bottom right: query `i` of `Sq` sees the keys
    /// `0..=i + Sk - Sq`.
    Causal,
    /// A tensor that is added to the scaled scores and broadcast over them: 0 where a key is visible,
    /// -inf where it is not, or any bias. If it tracks a gradient, it gets one.
    ///
    /// Its dimensions are lined up with those of the scores `[B, H, Sq, Sk]` from the last one, as everywhere in
    /// candle and PyTorch. So `[B, Sk]`, one row a sequence, is read as `[Sq, Sk]` where `B` is `Sq` or 1: use
    /// [`per_key`](Self::per_key) for it.
    Additive(Tensor),
}

impl AttentionMask {
    /// An additive mask over the keys of each sequence, for scores `[B, H, Sq, Sk]`: `mask` of shape `[B, Sk]`, 0
    /// where a key is visible, -inf where it is padding. `batch` and `keys` are the expected sizes.
    ///
    /// # Errors
    /// `mask` has another shape than `[batch, keys]`.
    ///
    /// # Example
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_dropout::DropMask;
    /// use candle_dropout::functional::{AttentionMask, softmax_dropout};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let scores = Tensor::zeros((2, 1, 2, 2), candle_core::DType::F32, &Device::Cpu)?;
    /// // The second sequence has one token.
    /// let mask = Tensor::new(&[[0f32, 0.], [0., f32::NEG_INFINITY]], &Device::Cpu)?;
    /// let mask = AttentionMask::per_key(&mask, 2, 2)?;
    /// let y = softmax_dropout(&scores, 1., &mask, &DropMask::none())?;
    /// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [0.5, 0.5, 0.5, 0.5, 1., 0., 1., 0.]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn per_key(mask: &Tensor, batch: usize, keys: usize) -> Result<Self> {
        expect_dims("AttentionMask::per_key: mask", mask, &[("B", batch), ("Sk", keys)])?;
        Ok(Self::Additive(mask.reshape((batch, 1, 1, keys))?))
    }
}

/// How scores become softmax inputs: the argument of the kernels. Twin of `struct ScoreArgs` in
/// `kernels/softmax_dropout.cu`.
#[doc(hidden)]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoreArgs {
    /// Queries (rows of the last two dimensions).
    queries: u64,
    /// Row of the additive mask for a row of the scores.
    additive_rows: RowMap,
    /// Columns of the additive mask: as many as there are keys, or 1 if it is broadcast over them.
    additive_cols: u64,
    /// Multiplies the scores; rounded to f32 where the softmax is computed in f32.
    scale: f64,
    /// Multiplies the gradient: `scale`, or 1 for the gradient of the additive mask.
    grad_scale: f64,
    /// 1 if a query sees only the keys up to its own position.
    causal: u32,
    /// 1 if keys are dropped, not weights.
    drop_key: u32,
}

impl ScoreArgs {
    pub fn new(op: &str, dims: &[usize], scale: f64, mask: &AttentionMask) -> Result<Self> {
        let causal = matches!(mask, AttentionMask::Causal);
        if causal && dims.len() < 2 {
            bail!(
                "{op}: scores: expected [.., Sq, Sk] for a causal mask, got {dims:?}; unsqueeze it or \
                 use AttentionMask::None"
            )
        }
        let (additive_rows, additive_cols) = match mask {
            AttentionMask::Additive(additive) => additive_map(op, dims, additive.dims())?,
            AttentionMask::None | AttentionMask::Causal => (RowMap::default(), 0),
        };
        Ok(Self {
            queries: dims.len().checked_sub(2).map_or(1, |d| dims[d] as u64),
            additive_rows,
            additive_cols,
            scale,
            grad_scale: scale,
            causal: u32::from(causal),
            drop_key: 0,
        })
    }

    /// A team takes a row and holds it in registers, up to a number of columns.
    pub fn launch(rows: usize, cols: usize, multiprocessors: usize) -> Launch {
        whole_rows(rows, cols, multiprocessors)
    }

    /// The same scores, for the gradient of the scaled and masked ones.
    pub fn with_unit_gradient(self) -> Self {
        Self { grad_scale: 1., ..self }
    }

    /// The same scores, of which keys are dropped.
    pub fn dropping_keys(self) -> Self {
        Self { drop_key: 1, ..self }
    }

    pub(super) fn drops_keys(&self) -> bool {
        self.drop_key != 0
    }

    pub(super) fn scale(&self) -> f64 {
        self.scale
    }

    pub(super) fn grad_scale(&self) -> f64 {
        self.grad_scale
    }

    /// How many of the `keys` a row sees; those that follow are masked.
    #[inline(always)]
    pub(super) fn visible(&self, row: usize, keys: usize) -> usize {
        if self.causal == 0 {
            return keys;
        }
        let query = row as u64 % self.queries;
        (query + 1 + keys as u64).saturating_sub(self.queries) as usize
    }

    /// Where the additive mask of a row begins, and the step from key to key.
    #[inline(always)]
    pub(super) fn additive(&self, row: usize) -> (usize, usize) {
        let start = self.additive_rows.map(row as u64) * self.additive_cols;
        (start as usize, usize::from(self.additive_cols != 1))
    }
}

/// The rows and columns of a contiguous additive mask of shape `mask` that is broadcast over `dims`.
fn additive_map(op: &str, dims: &[usize], mask: &[usize]) -> Result<(RowMap, u64)> {
    let fits = mask.len() <= dims.len()
        && mask.iter().rev().zip(dims.iter().rev()).all(|(m, d)| m == d || *m == 1);
    if !fits {
        bail!(
            "{op}: mask: expected a shape that broadcasts over the scores {dims:?}, got {mask:?}; give \
             every dimension its full size or 1"
        )
    }
    let (cols, mask_leading) = mask.split_last().map_or((1, mask), |(cols, rest)| (*cols, rest));
    let leading = &dims[..dims.len().saturating_sub(1)];
    let mut strides = vec![0; leading.len()];
    let mut stride = 1;
    for (s, &size) in strides.iter_mut().rev().zip(mask_leading.iter().rev()) {
        *s = if size == 1 { 0 } else { stride };
        stride *= size as u64;
    }
    let Some(rows) = RowMap::new(leading, &strides, 0) else {
        bail!(
            "{op}: mask: expected at most four groups of dimensions that are alternately broadcast and \
             not, got {mask:?} over {dims:?}; expand it with broadcast_as"
        )
    };
    Ok((rows, cols as u64))
}

/// Sums a tensor over the dimensions along which one of shape `dims` was broadcast to it.
pub(super) fn sum_to_shape(x: &Tensor, dims: &[usize]) -> Result<Tensor> {
    let extra = x.rank() - dims.len();
    let broadcast: Vec<usize> = (0..x.rank())
        .filter(|&d| d < extra || (dims[d - extra] == 1 && x.dims()[d] != 1))
        .collect();
    // Sums of halves are taken in f32.
    let wide = match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32)?,
        _ => x.clone(),
    };
    wide.sum_keepdim(broadcast)?.reshape(dims)?.to_dtype(x.dtype())
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_layout_is_that_of_the_kernels() {
        assert_eq!(size_of::<ScoreArgs>(), 104);
        let rows = [offset_of!(ScoreArgs, queries), offset_of!(ScoreArgs, additive_rows)];
        let scales = [offset_of!(ScoreArgs, scale), offset_of!(ScoreArgs, grad_scale)];
        assert_eq!(rows, [0, 8]);
        assert_eq!(offset_of!(ScoreArgs, additive_cols), 72);
        assert_eq!(scales, [80, 88]);
        assert_eq!([offset_of!(ScoreArgs, causal), offset_of!(ScoreArgs, drop_key)], [96, 100]);
    }
}
