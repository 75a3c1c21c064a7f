//! One decision for all elements of a group: `y = keep[group] ? x * scale + shift : fill`.

mod args;
mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::shape::Dims;
use candle_core::{DType, Error, Result, Tensor, bail};

use crate::check::{check_device, check_dtype};
use crate::composed::composes;
use crate::graph::{node, run_pass};
use crate::mask::DropMask;
use args::{Groups, Values};

const NAME: &str = "broadcast_dropout";

/// Dropout with a mask that is shared over some dimensions: whole channels, whole tokens, the same columns at each
/// step of time.
///
/// ```text
/// y = keep ? x * scale : 0            dx = keep ? dy * scale : 0
/// ```
///
/// # Shapes
/// `x` of any shape, strided or not; `y` has its shape. The mask has that of `x` without the dimensions `shared`, and
/// that is what a window of `drop` refers to: channels of `[N, C, H, W]`, shared over `(2, 3)`, have `[N, C]`, and
/// dropout that is locked over time in `[B, T, C]`, shared over `1`, has `[B, C]`. A dimension of size 1 that is not
/// shared is one of the mask. What Keras calls `noise_shape` has a 1 where a dimension is shared.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU. Halves are computed in f32 and rounded once.
///
/// # Randomness
/// `keep` and `scale` follow from `drop` alone, with one decision a group; no mask is stored, backward draws it
/// again. What is dropped becomes an exact 0 by selection. With [`DropMask::none`] nothing is launched and `x` itself
/// is returned.
///
/// # Errors
/// `x` is no float tensor, or f64 off the CPU; `shared` is no set of its dimensions, or alternates with others more
/// often than four groups of leading dimensions hold; the window of `drop` does not fit the mask.
///
/// Tompson, Goroshin, Jain, LeCun, Bregler, "Efficient object localization using convolutional networks", 2015, arXiv
/// 1411.4280 (channels); Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural
/// networks", 2016, arXiv 1512.05287 (time).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::functional::broadcast_dropout;
/// use candle_dropout::{DropMask, MaskKey};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
/// let drop = DropMask::new(0.5, MaskKey::new(3))?;
/// let rows = broadcast_dropout(&x, 1, &drop)?;
/// assert_eq!(rows.to_vec2::<f32>()?, [[0., 0.], [6., 8.], [10., 12.]]);
/// let columns = broadcast_dropout(&x, 0, &drop)?;
/// assert_eq!(columns.to_vec2::<f32>()?, [[0., 4.], [0., 8.], [0., 12.]]);
/// # Ok(())
/// # }
/// ```
pub fn broadcast_dropout(x: &Tensor, shared: impl Dims, drop: &DropMask) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    let shared = dimensions(NAME, x, shared)?;
    if let Some(repeats) = drop.repeats(NAME, x.dims(), batch_dim(&shared))? {
        return repeats.each(|part| broadcast_dropout(&part.of("x", x)?, &shared[..], &part.drop));
    }
    let groups = Groups::new(NAME, drop, x.dims(), &shared)?;
    dropped(NAME, groups, Values::scaled(drop.rate().scale().into()), drop, x, None)
}

/// Dropout for self-normalising networks: what is dropped takes the value at which SELU saturates, and an affine map
/// keeps mean 0 and variance 1.
///
/// ```text
/// y = a (keep ? x : α') + b           dx = keep ? a dy : 0
/// α' = -λ α = -1.7580993408473766     q: the realised probability of keeping
/// a = (q + α'² q (1 - q))^(-1/2)      b = -a (1 - q) α'
/// ```
///
/// Where everything is dropped the result is 0, as PyTorch's.
///
/// Shapes, dtypes, randomness and errors are those of [`broadcast_dropout`], but for what is dropped, which is no 0; `()`
/// shares the mask over nothing.
///
/// Klambauer, Unterthiner, Mayr, Hochreiter, "Self-normalizing neural networks", 2017, arXiv 1706.02515 (section 2,
/// "New dropout technique").
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::functional::alpha_dropout;
/// use candle_dropout::{DropMask, MaskKey};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::zeros(4, DType::F32, &Device::Cpu)?;
/// let y = alpha_dropout(&x, (), &DropMask::new(0.5, MaskKey::new(3))?)?;
/// // 0 or -1.758, times 0.886, plus 0.779.
/// assert_eq!((y * 1000.)?.round()?.to_vec1::<f32>()?, [-779., 779., 779., 779.]);
/// # Ok(())
/// # }
/// ```
pub fn alpha_dropout(x: &Tensor, shared: impl Dims, drop: &DropMask) -> Result<Tensor> {
    const NAME: &str = "alpha_dropout";
    check_dtype(NAME, "x", x)?;
    let shared = dimensions(NAME, x, shared)?;
    if let Some(repeats) = drop.repeats(NAME, x.dims(), batch_dim(&shared))? {
        return repeats.each(|part| alpha_dropout(&part.of("x", x)?, &shared[..], &part.drop));
    }
    let groups = Groups::new(NAME, drop, x.dims(), &shared)?;
    dropped(NAME, groups, Values::saturating(drop.rate()), drop, x, None)
}

/// Dropout as it was published: nothing is scaled in training, and evaluation multiplies by the probability of keeping
/// ([`ClassicDropout`](crate::ClassicDropout)).
///
/// ```text
/// y = keep ? x : 0            dx = keep ? dy : 0
/// ```
///
/// Shapes, dtypes, randomness and errors are those of [`broadcast_dropout`]; `()` shares the mask over nothing.
///
/// Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: a simple way to prevent neural networks from
/// overfitting", JMLR 15, 2014 (eq. 1-3).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::functional::unscaled_dropout;
/// use candle_dropout::{DropMask, MaskKey};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?;
/// let y = unscaled_dropout(&x, (), &DropMask::new(0.5, MaskKey::new(3))?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [0., 2., 3., 4.]);
/// # Ok(())
/// # }
/// ```
pub fn unscaled_dropout(x: &Tensor, shared: impl Dims, drop: &DropMask) -> Result<Tensor> {
    const NAME: &str = "unscaled_dropout";
    check_dtype(NAME, "x", x)?;
    let shared = dimensions(NAME, x, shared)?;
    if let Some(repeats) = drop.repeats(NAME, x.dims(), batch_dim(&shared))? {
        return repeats.each(|part| unscaled_dropout(&part.of("x", x)?, &shared[..], &part.drop));
    }
    let groups = Groups::new(NAME, drop, x.dims(), &shared)?;
    dropped(NAME, groups, Values::scaled(1.), drop, x, None)
}

/// Drops whole words of a text: all embeddings of a word, wherever it occurs, or none.
///
/// ```text
/// y[i] = keep[ids[i]] ? x[i] * scale : 0            dx[i] = keep[ids[i]] ? dy[i] * scale : 0
/// ```
///
/// # Shapes
/// `x` `[.., D]`, the embeddings of `ids` `[..]`; `y` has the shape of `x`. The mask has one entry a word of the
/// vocabulary: it is `[V]`, of which nobody has to know how large it is, and takes no window.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU; `ids` u32 or, below 2^32, i64.
///
/// # Randomness
/// As [`broadcast_dropout`]; kept for backward are the ids, which are there anyway.
///
/// # Errors
/// `x` is no float tensor, or f64 off the CPU; `ids` are no integers, have another shape than `[..]` or lie on another
/// device; `drop` has a window.
///
/// Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", 2016, arXiv
/// 1512.05287 (section 4.2); Merity, Keskar, Socher, "Regularizing and optimizing LSTM language models", 2017, arXiv
/// 1708.02182 (section 4.3).
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::functional::embedding_dropout;
/// use candle_dropout::{DropMask, MaskKey};
///
/// # fn main() -> candle_core::Result<()> {
/// let ids = Tensor::new(&[0u32, 1, 0, 2], &Device::Cpu)?;
/// let x = Tensor::ones((4, 2), DType::F32, &Device::Cpu)?;
/// let y = embedding_dropout(&x, &ids, &DropMask::new(0.5, MaskKey::new(3))?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[0., 0.], [2., 2.], [0., 0.], [2., 2.]]);
/// # Ok(())
/// # }
/// ```
pub fn embedding_dropout(x: &Tensor, ids: &Tensor, drop: &DropMask) -> Result<Tensor> {
    const NAME: &str = "embedding_dropout";
    check_dtype(NAME, "x", x)?;
    let Some((cols, leading)) = x.dims().split_last() else {
        bail!(
            "{NAME}: x: expected embeddings [.., D], got a scalar; look the ids up in a table first"
        )
    };
    if ids.dims() != leading {
        bail!(
            "{NAME}: ids: expected shape {leading:?} like x {:?} without its last dimension, got {:?}; pass the ids \
             that x was looked up by",
            x.dims(),
            ids.dims()
        )
    }
    if !matches!(ids.dtype(), DType::U32 | DType::I64) {
        bail!(
            "{NAME}: ids: expected dtype u32 or i64, got {:?}; convert them with to_dtype",
            ids.dtype()
        )
    }
    check_device(NAME, "ids", ids, "x", x.device())?;
    if let Some(repeats) = drop.repeats(NAME, x.dims(), None)? {
        return repeats
            .each(|part| embedding_dropout(&part.of("x", x)?, &part.of("ids", ids)?, &part.drop));
    }
    if drop.has_window() {
        bail!(
            "{NAME}: drop.window: expected none, since a word has its decision wherever it stands, got one; pass the \
             mask without it"
        )
    }
    let groups = Groups::of_words(drop.args(NAME, &[1])?, ids.elem_count(), *cols);
    let ids = ids.to_dtype(DType::U32)?.contiguous()?;
    dropped(NAME, groups, Values::scaled(drop.rate().scale().into()), drop, x, Some(ids))
}

/// Those that are shared, in ascending order.
fn dimensions(op: &str, x: &Tensor, shared: impl Dims) -> Result<Vec<usize>> {
    let shared = shared.to_indexes(x.shape(), "shared");
    let mut shared = shared.map_err(|error| {
        Error::Msg(format!("{op}: shared: expected dimensions of x, each once, got: {error}"))
    })?;
    shared.sort_unstable();
    Ok(shared)
}

/// The dimension of the mask that has the samples of a batch, unless all share it.
fn batch_dim(shared: &[usize]) -> Option<usize> {
    (shared.first() != Some(&0)).then_some(0)
}

fn dropped(
    op: &'static str,
    groups: Groups,
    values: Values,
    drop: &DropMask,
    x: &Tensor,
    ids: Option<Tensor>,
) -> Result<Tensor> {
    if drop.is_none() {
        return Ok(x.clone());
    }
    if composes(x.device()) {
        return composed::broadcast_dropout(&groups, values, x, ids.as_ref());
    }
    select(op, groups, values, &x.contiguous()?, ids)
}

/// `y` from a contiguous `x`; the gradient is the op itself, applied to `dy`.
fn select(
    op: &'static str,
    groups: Groups,
    values: Values,
    x: &Tensor,
    ids: Option<Tensor>,
) -> Result<Tensor> {
    let y = run_pass!(op, x, fwd(op, &groups, values, x, ids.as_ref()))?;
    node(op, [Some(x)], (y, x.shape()), move |back| {
        let scaled = Values::scaled(values.scale);
        Ok([Some(select(op, groups, scaled, &back.dy.contiguous()?, ids.clone())?)])
    })
}
