//! `y = a + scale * b * z`, with z standard normal: noise that is added, noise that multiplies, a sample.

mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Storage, Tensor, bail};

use crate::check::{check_dtype, check_same};
use crate::composed::composes;
use crate::graph::{detached, node, run_pass};
use crate::mask::{MaskArgs, NoiseKey};

const DROPOUT: &str = "gaussian_dropout";
const NOISE: &str = "gaussian_noise";
const REPARAMETERIZE: &str = "reparameterize";

/// Multiplies each element by a normal number of mean 1: dropout without zeros.
///
/// ```text
/// y = x (1 + std z)            dx = dy (1 + std z)            z standard normal
/// ```
///
/// It has the mean and the variance of a [`dropout`](super::dropout()) of rate p for `std = sqrt(p / (1 - p))`.
///
/// # Shapes
/// `x` of any shape, strided or not; `y` has its shape, and so has the noise.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU. Halves are computed in f32 and rounded once; the numbers z are those of f32 in
/// each dtype.
///
/// # Randomness
/// z follows from `noise` alone; none is stored, backward draws it again. With `None`, evaluation, `x` itself is
/// returned.
///
/// # Errors
/// `x` is no float tensor, or f64 off the CPU; `std` is negative or no finite f32; the window of `noise` does not fit
/// `x`, or `x` has more than 2^34 columns.
///
/// Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: a simple way to prevent neural networks from
/// overfitting", JMLR 15, 2014 (section 10).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{MaskKey, NoiseKey};
/// use candle_dropout::functional::gaussian_dropout;
///
/// # fn main() -> candle_core::Result<()> {
/// let (x, noise) = (Tensor::new(&[1f32, 2.], &Device::Cpu)?, NoiseKey::new(MaskKey::new(3)));
/// let z = noise.to_tensor(2, &Device::Cpu)?.to_vec1::<f32>()?;
/// let y = gaussian_dropout(&x, 0.5, Some(&noise))?;
/// assert_eq!(y.to_vec1::<f32>()?, [1. + 0.5 * z[0], 2. + 2. * (0.5 * z[1])]);
/// # Ok(())
/// # }
/// ```
pub fn gaussian_dropout(x: &Tensor, std: f64, noise: Option<&NoiseKey>) -> Result<Tensor> {
    check_std(DROPOUT, "std", std)?;
    check_dtype(DROPOUT, "x", x)?;
    let Some(noise) = noise else { return Ok(x.clone()) };
    if let Some(repeats) = noise.repeats(DROPOUT, x.dims())? {
        return repeats.each(|part| {
            gaussian_dropout(&part.of("x", x)?, std, Some(&NoiseKey::from(&part.drop)))
        });
    }
    let z = noise.args(DROPOUT, x.dims())?;
    if composes(x.device()) {
        return composed::sum(&z, std, x, Some(x));
    }
    let x = x.contiguous()?;
    let y = pass(DROPOUT, &z, std, Some(&x), Some(&x))?;
    node(DROPOUT, [Some(&x)], (y, x.shape()), move |back| {
        let dy = back.dy.contiguous()?;
        Ok([Some(detached(pass(DROPOUT, &z, std, Some(&dy), Some(&dy))?, dy.shape()))])
    })
}

/// Adds a normal number of mean 0 to each element.
///
/// ```text
/// y = x + std z            dx = dy            z standard normal
/// ```
///
/// Shapes, dtypes, randomness and errors are those of [`gaussian_dropout`].
///
/// Bishop, "Training with noise is equivalent to Tikhonov regularization", Neural Computation 7, 1995.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{MaskKey, NoiseKey};
/// use candle_dropout::functional::gaussian_noise;
///
/// # fn main() -> candle_core::Result<()> {
/// let (x, noise) = (Tensor::new(&[1f32, 2.], &Device::Cpu)?, NoiseKey::new(MaskKey::new(3)));
/// let z = noise.to_tensor(2, &Device::Cpu)?.to_vec1::<f32>()?;
/// let y = gaussian_noise(&x, 0.5, Some(&noise))?;
/// assert_eq!(y.to_vec1::<f32>()?, [1. + 0.5 * z[0], 2. + 0.5 * z[1]]);
/// assert_eq!(gaussian_noise(&x, 0.5, None)?.to_vec1::<f32>()?, [1., 2.]);
/// # Ok(())
/// # }
/// ```
pub fn gaussian_noise(x: &Tensor, std: f64, noise: Option<&NoiseKey>) -> Result<Tensor> {
    check_std(NOISE, "std", std)?;
    check_dtype(NOISE, "x", x)?;
    let Some(noise) = noise else { return Ok(x.clone()) };
    if let Some(repeats) = noise.repeats(NOISE, x.dims())? {
        return repeats.each(|part| {
            gaussian_noise(&part.of("x", x)?, std, Some(&NoiseKey::from(&part.drop)))
        });
    }
    let z = noise.args(NOISE, x.dims())?;
    if composes(x.device()) {
        return composed::sum(&z, std, x, None);
    }
    let x = x.contiguous()?;
    let y = pass(NOISE, &z, std, Some(&x), None)?;
    node(NOISE, [Some(&x)], (y, x.shape()), |back| Ok([Some(back.dy.contiguous()?)]))
}

/// A sample of a normal distribution, with gradients of its mean and of its standard deviation.
///
/// ```text
/// y = mean + std z            dmean = dy            dstd = dy z            z standard normal
/// ```
///
/// # Shapes
/// `mean` and `std` of one shape, strided or not; `y` has it, and so has the noise.
///
/// # Dtypes
/// f32, f16, bf16, and f64 on the CPU, one for both. Halves are computed in f32 and rounded once; the numbers z are
/// those of f32 in each dtype.
///
/// # Randomness
/// z follows from `noise` alone; none is stored, backward draws it again. With `None`, evaluation, `mean` itself is
/// returned, and `std` gets no gradient.
///
/// # Errors
/// A tensor is no float tensor, or f64 off the CPU; shapes, dtypes or devices differ; the window of `noise` does not
/// fit `mean`, or it has more than 2^34 columns. What lies in `std` is not looked at: its sign makes no difference to
/// the distribution.
///
/// Kingma, Welling, "Auto-encoding variational Bayes", 2014, arXiv 1312.6114 (section 2.4).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{MaskKey, NoiseKey};
/// use candle_dropout::functional::reparameterize;
///
/// # fn main() -> candle_core::Result<()> {
/// let mean = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
/// let std = Tensor::new(&[0.5f32, 0.], &Device::Cpu)?;
/// let noise = NoiseKey::new(MaskKey::new(3));
/// let z = noise.to_tensor(2, &Device::Cpu)?.to_vec1::<f32>()?;
/// let y = reparameterize(&mean, &std, Some(&noise))?;
/// assert_eq!(y.to_vec1::<f32>()?, [1. + 0.5 * z[0], 2.]);
/// # Ok(())
/// # }
/// ```
pub fn reparameterize(mean: &Tensor, std: &Tensor, noise: Option<&NoiseKey>) -> Result<Tensor> {
    check_dtype(REPARAMETERIZE, "mean", mean)?;
    check_same(REPARAMETERIZE, "std", std, "mean", mean)?;
    let Some(noise) = noise else { return Ok(mean.clone()) };
    if let Some(repeats) = noise.repeats(REPARAMETERIZE, mean.dims())? {
        return repeats.each(|part| {
            let (mean, std) = (part.of("mean", mean)?, part.of("std", std)?);
            reparameterize(&mean, &std, Some(&NoiseKey::from(&part.drop)))
        });
    }
    let z = noise.args(REPARAMETERIZE, mean.dims())?;
    if composes(mean.device()) {
        return composed::sum(&z, 1., mean, Some(std));
    }
    let (mean, std) = (mean.contiguous()?, std.contiguous()?);
    let y = pass(REPARAMETERIZE, &z, 1., Some(&mean), Some(&std))?;
    node(REPARAMETERIZE, [Some(&mean), Some(&std)], (y, mean.shape()), move |back| {
        let dy = back.dy.contiguous()?;
        let dstd = back.of(1, || {
            let dstd = pass(REPARAMETERIZE, &z, 1., None, Some(&dy))?;
            Ok(detached(dstd, dy.shape()))
        })?;
        Ok([Some(dy), dstd])
    })
}

/// Refuses what is no standard deviation in f32.
pub(crate) fn check_std(op: &str, arg: &str, std: f64) -> Result<()> {
    if !(0. ..=f64::from(f32::MAX)).contains(&std) {
        bail!(
            "{op}: {arg}: expected a finite standard deviation of at least 0, got {std}; pass 0 for no noise"
        )
    }
    Ok(())
}

/// `a + scale * b * z` of contiguous tensors, of which one is there; without b, 1 stands for it.
fn pass(
    op: &'static str,
    z: &MaskArgs,
    scale: f64,
    a: Option<&Tensor>,
    b: Option<&Tensor>,
) -> Result<Storage> {
    let Some(like) = a.or(b) else { bail!("{op}: expected a tensor, got none") };
    run_pass!(op, like, fwd(op, z, scale, like, a, b))
}
