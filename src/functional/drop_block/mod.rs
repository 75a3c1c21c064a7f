//! `y = dropped ? 0 : x * scale`, with squares that are dropped around seeds.

mod args;
mod composed;
mod config;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Device, Result, Storage, Tensor, bail};

pub use args::DropBlockArgs;
pub use config::DropBlockConfig;

use crate::check::{check_dtype, unsupported_device};
use crate::composed::composes;
use crate::graph::{detached, node, run_pass};
use crate::mask::{DropMask, MaskArgs};

const NAME: &str = "drop_block";

/// Zeroes squares of feature maps and scales the rest, so that the mean of ones stays one.
///
/// ```text
/// dropped[h, w] = a seed of the same plane lies in rows h - (b-1)/2 ..= h + b/2 and columns w - (b-1)/2 ..= w + b/2
/// y = dropped ? 0 : x * scale            dx = dropped ? 0 : dy * scale
/// scale = elements of the mask / elements that are kept, or 1 without scale_by_keep
/// ```
///
/// with the side `b` of a block clipped to the height and to the width.
///
/// # Shapes
/// `x` `[N, C, H, W]`, strided or not; `y` has its shape. The mask of seeds has the shape `[N, H, W]` if channels are
/// coupled, else `[N, C, H, W]`. A window of `seeds` may split samples and channels, not planes; `scale` is that of
/// the whole mask, which each part counts anew.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU. Halves are computed in f32 and rounded once.
///
/// # Randomness
/// Seeds are the elements that `seeds` drops: its rate is that of seeds, [`DropBlockConfig::gamma`]. No mask is
/// stored, backward draws it again and keeps one number, how many elements are dropped. What is dropped becomes an
/// exact 0 by selection: a dropped infinity or NaN vanishes. If nothing is kept, all are zeros. With
/// [`DropMask::none`] nothing is launched and `x` itself is returned.
///
/// # Errors
/// `x` is no float tensor, f64 off the CPU, or not of four dimensions; a plane has more than 2^31 elements; the window
/// of `seeds` does not fit the mask or splits planes; `block_size` is 0.
///
/// Ghiasi, Lin, Le, "DropBlock: a regularization method for convolutional networks", 2018, arXiv 1810.12890
/// (algorithm 1).
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::functional::{DropBlockConfig, drop_block};
/// use candle_dropout::{DropMask, MaskKey};
///
/// # fn main() -> candle_core::Result<()> {
/// let config = DropBlockConfig { block_size: 3, ..Default::default() };
/// let seeds = DropMask::new(config.gamma(0.3, 4, 6)?, MaskKey::new(2))?;
/// let x = Tensor::ones((1, 2, 4, 6), DType::F32, &Device::Cpu)?;
/// let y = drop_block(&x, &config, &seeds)?;
/// assert_eq!(y.get(0)?.get(0)?.to_vec2::<f32>()?, y.get(0)?.get(1)?.to_vec2::<f32>()?);
/// assert!((y.mean_all()?.to_scalar::<f32>()? - 1.).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn drop_block(x: &Tensor, config: &DropBlockConfig, seeds: &DropMask) -> Result<Tensor> {
    check_dtype(NAME, "x", x)?;
    config.check()?;
    let &[n, c, h, w] = x.dims() else {
        bail!("{NAME}: x: expected [N, C, H, W], got {:?}; reshape it", x.dims())
    };
    if let Some(repeats) = seeds.repeats(NAME, x.dims(), Some(0))? {
        // The scale counts what a mask drops: here that of each sample for itself.
        let block = |x: &Tensor, seeds: &DropMask| drop_block(x, config, seeds);
        return repeats.each(|part| match config.scale_by_keep {
            true => part.each_sample(&part.of("x", x)?, block),
            false => block(&part.of("x", x)?, &part.drop),
        });
    }
    let (dims, channels) =
        if config.couple_channels { (vec![n, h, w], c) } else { (vec![n, c, h, w], 1) };
    let mask = seeds.args(NAME, &dims)?;
    let (whole, full_shape) = seeds.whole(&dims);
    if full_shape[full_shape.len() - 2..] != [h, w] {
        bail!(
            "{NAME}: seeds.window: expected whole planes [.., {h}, {w}] like x, got a part of {full_shape:?}; split \
             samples or channels"
        )
    }
    let elements =
        full_shape.iter().try_fold(1i64, |product, dim| product.checked_mul(*dim as i64));
    let Some(elements) = elements else {
        bail!(
            "{NAME}: seeds.window: expected at most 2^63 elements in the whole, got {full_shape:?}; split it"
        )
    };
    let planes = dims[..dims.len() - 2].iter().product();
    let args = DropBlockArgs::new(NAME, config, (planes, channels), [h, w], elements as u64)?;
    if seeds.is_none() || x.elem_count() == 0 {
        return Ok(x.clone());
    }
    let dropped = if config.scale_by_keep {
        let planes = full_shape[..full_shape.len() - 2].iter().product();
        let args = DropBlockArgs::new(NAME, config, (planes, 1), [h, w], elements as u64)?;
        let dropped = count(&whole.args(NAME, &full_shape)?, &args, x.device())?;
        Some(detached(dropped, 1))
    } else {
        None
    };
    if composes(x.device()) {
        let dims = if config.couple_channels { [n, 1, h, w] } else { [n, c, h, w] };
        return composed::drop_block(&mask, &args, dims, x, dropped.as_ref());
    }
    select_scaled(mask, args, dropped, &x.contiguous()?)
}

/// How many elements of a mask are dropped, where x lies; on the host where there are no passes.
fn count(mask: &MaskArgs, args: &DropBlockArgs, device: &Device) -> Result<Storage> {
    match device {
        _ if composes(device) => cpu::count(mask, args),
        Device::Cpu => cpu::count(mask, args),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => cuda::count(mask, args, device),
        device => Err(unsupported_device(NAME, device)),
    }
}

/// What is kept is multiplied by this, from a number that lies on the host.
fn scale(args: &DropBlockArgs, dropped: Option<&Tensor>) -> Result<f64> {
    let Some(dropped) = dropped else { return Ok(1.) };
    let kept = args.elements - dropped.to_vec1::<i64>()?.iter().sum::<i64>() as u64;
    // If nothing is kept, nothing is multiplied; candle ends the graph at a product with 0.
    Ok(if kept == 0 { 1. } else { args.elements as f64 / kept as f64 })
}

/// `y` from a contiguous `x`; the gradient is the op itself, applied to `dy`.
fn select_scaled(
    mask: MaskArgs,
    args: DropBlockArgs,
    dropped: Option<Tensor>,
    x: &Tensor,
) -> Result<Tensor> {
    let y = run_pass!(NAME, x, fwd(&mask, &args, x, dropped.as_ref()))?;
    node(NAME, [Some(x)], (y, x.shape()), move |back| {
        Ok([Some(select_scaled(mask, args, dropped.clone(), &back.dy.contiguous()?)?)])
    })
}
