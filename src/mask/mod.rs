//! What is dropped: one pure function of a key and a coordinate.
//!
//! ```text
//! keep(key, threshold, row, col)  =  u16(key, row, col) < threshold
//! ```
//!
//! The last dimension of a mask is its column, all leading dimensions flattened are its row. The
//! sixteen bits come from Philox4x32 with 7 rounds at the counter `(col / 8, row >> 32, row, 0)`: one
//! call serves 8 neighbouring columns. CPU code and CUDA kernels, forward and backward passes, fused
//! and unfused ops evaluate this function at the same coordinates, so they see the same mask, bit for
//! bit, and nobody stores one.

mod args;
mod generator;
mod key;
mod philox;
mod rate;
mod rows;

use candle_core::{Device, Result, Shape, Tensor, bail};

pub use args::MaskArgs;
pub(crate) use args::{NO_DRAWS, RUN};
pub use generator::{MaskGenerator, MaskState};
pub use key::MaskKey;
pub use rate::Rate;
pub(crate) use rows::RowMap;

/// Which elements an op drops: a rate, a key and, for a shard of a larger tensor, a window.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskGenerator, dropout};
///
/// # fn main() -> candle_core::Result<()> {
/// let generator = MaskGenerator::new(42);
/// let drop = DropMask::new(0.5, generator.next_key())?;
/// let x = Tensor::ones((2, 8), candle_core::DType::F32, &Device::Cpu)?;
/// let whole = dropout(&x, &drop)?;
///
/// // The second row alone, as a shard of the whole, sees the second row of the mask.
/// let shard = dropout(&x.narrow(0, 1, 1)?, &drop.window(&[2, 8], &[1, 0]))?;
/// assert_eq!(shard.to_vec2::<f32>()?[0], whole.to_vec2::<f32>()?[1]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct DropMask {
    rate: Rate,
    key: MaskKey,
    window: Option<Window>,
}

/// The part of a larger mask that a shard covers.
#[derive(Clone, Debug, PartialEq)]
struct Window {
    full_shape: Vec<usize>,
    start: Vec<usize>,
}

impl DropMask {
    /// The mask of `key` that drops with probability `drop_p`.
    ///
    /// The realised rate is the nearest multiple of 1/65536, and at least that for any
    /// `drop_p > 0`; see [`Rate`].
    ///
    /// # Errors
    /// `drop_p` is negative, above 1 or NaN.
    pub fn new(drop_p: f32, key: MaskKey) -> Result<Self> {
        Ok(Self::with_rate(Rate::new(drop_p)?, key))
    }

    /// The mask of `key` at a realised rate.
    pub const fn with_rate(rate: Rate, key: MaskKey) -> Self {
        Self { rate, key, window: None }
    }

    /// The mask that drops nothing and draws nothing: evaluation.
    pub const fn none() -> Self {
        Self::with_rate(Rate::KEEP_ALL, MaskKey::new(0))
    }

    /// Reads this mask as the part of a mask of shape `full_shape` that begins at `start`.
    ///
    /// Any split of a tensor (batch, heads, sequence, hidden) over devices or micro-batches then draws
    /// exactly the mask of the unsplit tensor. The op checks both against the shape of what it drops.
    ///
    /// `full_shape` and `start` are those of the whole mask, also where this one has a window already:
    /// the new window replaces it, so windows do not nest.
    pub fn window(&self, full_shape: &[usize], start: &[usize]) -> Self {
        let window = Window { full_shape: full_shape.to_vec(), start: start.to_vec() };
        Self { window: Some(window), ..*self }
    }

    /// The realised rate.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// The key.
    pub fn key(&self) -> MaskKey {
        self.key
    }

    /// True if nothing is dropped, whatever the key.
    pub fn is_none(&self) -> bool {
        self.rate == Rate::KEEP_ALL
    }

    /// The mask itself, 1 where an element of a tensor of this shape is kept and 0 where it is
    /// dropped, as u8.
    ///
    /// No op needs it; it is for looking at masks and for reference implementations.
    ///
    /// # Errors
    /// The window does not fit `shape`.
    pub fn to_tensor(&self, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        let args = self.args("to_tensor", shape.dims())?;
        let cols = shape.dims().last().copied().unwrap_or(1);
        let mut keep = vec![0u8; shape.elem_count()];
        let mut runs = args.runs(0, keep.len(), cols);
        while let Some((at, _, draws)) = runs.next() {
            for (keep, draw) in keep[at..].iter_mut().zip(draws) {
                *keep = u8::from(args.keeps(*draw));
            }
        }
        Tensor::from_vec(keep, shape, device)
    }

    /// The mask over a tensor of shape `dims`, in the form that every kernel takes.
    #[doc(hidden)]
    pub fn args(&self, op: &str, dims: &[usize]) -> Result<MaskArgs> {
        let Some(Window { full_shape, start }) = &self.window else {
            return MaskArgs::new(op, self.rate, self.key, dims, dims, &vec![0; dims.len()]);
        };
        if full_shape.len() != dims.len() || start.len() != dims.len() {
            bail!(
                "{op}: drop.window: expected full_shape and start of rank {} like the mask {dims:?}, \
                 got {full_shape:?} and {start:?}; give one entry for each dimension of the mask",
                dims.len()
            )
        }
        for d in 0..dims.len() {
            if start[d].checked_add(dims[d]).is_none_or(|end| end > full_shape[d]) {
                bail!(
                    "{op}: drop.window: expected start + shape <= full_shape in every dimension, got \
                     {start:?} + {dims:?} > {full_shape:?} in dimension {d}; pass the shape of the \
                     whole mask and the position of this part in it"
                )
            }
        }
        MaskArgs::new(op, self.rate, self.key, dims, full_shape, start)
    }
}
