use candle_core::{Device, Result, Shape, Tensor};

use super::normal::normals_of;
use super::repeats::Repeats;
use super::{DropMask, MaskArgs, MaskKey, Rate};

/// Which standard normal numbers an op draws: a key and, for a shard of a larger tensor, a window.
///
/// What [`DropMask`] is for ops that drop, this is for ops that add or multiply noise: element (row, column) of a tensor
/// gets the number of that coordinate, on every device, in every pass, and nobody stores it. The same key may name a
/// mask, too; the two are drawn from different bits.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{MaskGenerator, NoiseKey};
/// use candle_dropout::functional::gaussian_noise;
///
/// # fn main() -> candle_core::Result<()> {
/// let noise = NoiseKey::new(MaskGenerator::new(42).next_key());
/// let x = Tensor::zeros((2, 8), candle_core::DType::F32, &Device::Cpu)?;
/// let y = gaussian_noise(&x, 1., Some(&noise))?;
/// assert_eq!(y.to_vec2::<f32>()?, noise.to_tensor((2, 8), &Device::Cpu)?.to_vec2::<f32>()?);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseKey(DropMask);

impl NoiseKey {
    /// The noise of `key`.
    pub const fn new(key: MaskKey) -> Self {
        // A rate has no part in it.
        Self(DropMask::with_rate(Rate::KEEP_ALL, key))
    }

    /// Reads this noise as the part of a noise of shape `full_shape` that begins at `start`; see
    /// [`DropMask::window`].
    pub fn window(&self, full_shape: &[usize], start: &[usize]) -> Self {
        Self(self.0.window(full_shape, start))
    }

    /// The key.
    pub fn key(&self) -> MaskKey {
        self.0.key()
    }

    /// The noise itself, in f32, over a tensor of this shape.
    ///
    /// No op needs it; it is for looking at noise and for reference implementations.
    ///
    /// # Errors
    /// The window does not fit `shape`.
    pub fn to_tensor(&self, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        let z = self.args("to_tensor", shape.dims())?.normals(shape.dims());
        Tensor::from_vec(z, shape, device)
    }

    /// [`DropMask::repeats`] of noise over a tensor with the batch in its first dimension.
    pub(crate) fn repeats(&self, op: &'static str, dims: &[usize]) -> Result<Option<Repeats>> {
        self.0.repeats(op, dims, Some(0))
    }

    /// The noise over a tensor of shape `dims`, in the form that every kernel takes.
    #[doc(hidden)]
    pub fn args(&self, op: &str, dims: &[usize]) -> Result<MaskArgs> {
        let args = self.0.args(op, dims)?;
        args.check_wide(op, dims)?;
        Ok(args)
    }
}

/// The noise of a mask's key and window, whatever its rate.
impl From<&DropMask> for NoiseKey {
    fn from(drop: &DropMask) -> Self {
        Self(DropMask { rate: Rate::KEEP_ALL, ..drop.clone() })
    }
}

impl MaskArgs {
    /// The normal numbers of all elements of a tensor of shape `dims`.
    pub(crate) fn normals(&self, dims: &[usize]) -> Vec<f32> {
        normals_of(self, dims)
    }
}
