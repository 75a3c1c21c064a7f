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
mod noise;
mod normal;
mod philox;
mod rate;
mod repeats;
mod rows;

use candle_core::{Device, Result, Shape, Tensor, bail};

pub use args::MaskArgs;
pub(crate) use args::{NO_DRAWS, NO_WIDE_DRAWS, RUN};
pub use generator::{MaskGenerator, MaskState};
pub use key::MaskKey;
pub use noise::NoiseKey;
pub use rate::Rate;
pub(crate) use repeats::{Repeat, Repeated, next_repeated, repeat};
pub(crate) use rows::RowMap;

/// Which elements an op drops: a rate, a key and, for a shard of a larger tensor, a window.
///
/// One mask is for one site of a model and one step. The same mask at a second site drops the same elements there:
/// two dropouts of 0.1 in a row then keep 0.90 of all elements and scale them twice, where two keys keep 0.81.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_dropout::{DropMask, MaskGenerator};
/// use candle_dropout::functional::dropout;
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
    /// Whether what is dropped is a batch that lies there several times.
    repeated: Option<Repeated>,
}

/// The part of a larger mask that a shard covers.
#[derive(Clone, Debug, PartialEq)]
enum Window {
    /// The part that begins at `start` of a mask of this shape.
    Part { full_shape: Vec<usize>, start: Vec<usize> },
    /// What follows `start` in a dimension, whole in all others.
    From { dim: usize, start: usize },
}

impl DropMask {
    /// The mask of `key` that drops with probability `drop_p`.
    ///
    /// The realised rate is the nearest multiple of 1/65536, and at least that for any
    /// `drop_p > 0`; see [`Rate`].
    ///
    /// # Errors
    /// `drop_p` is negative, above 1 or NaN.
    pub fn new(drop_p: impl Into<f64>, key: MaskKey) -> Result<Self> {
        Ok(Self::with_rate(Rate::new(drop_p)?, key))
    }

    /// The mask of `key` at a realised rate.
    pub const fn with_rate(rate: Rate, key: MaskKey) -> Self {
        Self { rate, key, window: None, repeated: None }
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
        let window = Window::Part { full_shape: full_shape.to_vec(), start: start.to_vec() };
        Self { window: Some(window), ..*self }
    }

    /// Sample `k` of this mask, where one site and step takes several: that of [`MaskKey::draw`]. The window stays.
    pub fn draw(&self, k: u64) -> Self {
        Self { key: self.key.draw(k), ..self.clone() }
    }

    /// The same mask at another rate.
    pub(crate) fn at_rate(self, rate: Rate) -> Self {
        Self { rate, ..self }
    }

    /// The realised rate.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// The key.
    pub fn key(&self) -> MaskKey {
        self.key
    }

    /// True if this is a part of a larger mask.
    pub(crate) fn has_window(&self) -> bool {
        self.window.is_some()
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
        if let Some(repeats) = self.repeats("to_tensor", shape.dims(), Some(0))? {
            let mut dims = shape.into_dims();
            dims[0] /= repeats.times();
            return repeats.each(|part| part.drop.to_tensor(&dims[..], device));
        }
        let keep = self.args("to_tensor", shape.dims())?.keep(shape.dims());
        Tensor::from_vec(keep, shape, device)
    }

    /// The wide draw of each element of a tensor of this shape, as u32, whatever the rate: for reference
    /// implementations of what takes numbers of a mask.
    ///
    /// # Errors
    /// The window does not fit `shape`.
    #[doc(hidden)]
    pub fn wide_draws(&self, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        let args = self.args("wide_draws", shape.dims())?;
        args.check_wide("wide_draws", shape.dims())?;
        Tensor::from_vec(args.wide_words(shape.dims()), shape, device)
    }

    /// The whole of which this mask, over a tensor of shape `dims`, is a part, and its shape.
    pub(crate) fn whole(&self, dims: &[usize]) -> (Self, Vec<usize>) {
        match &self.window {
            Some(Window::Part { full_shape, .. }) => {
                (Self { window: None, ..*self }, full_shape.clone())
            }
            // Of samples that go on without an end the part is all there is.
            Some(Window::From { .. }) | None => (self.clone(), dims.to_vec()),
        }
    }

    /// The mask over a tensor of shape `dims`, in the form that every kernel takes.
    #[doc(hidden)]
    pub fn args(&self, op: &str, dims: &[usize]) -> Result<MaskArgs> {
        self.args_shared(op, dims, &[])
    }

    /// The same, shared over the dimensions `shared`, in ascending order, which its own shape lacks.
    #[doc(hidden)]
    pub fn args_shared(&self, op: &str, dims: &[usize], shared: &[usize]) -> Result<MaskArgs> {
        if let Some(Repeated { times, .. }) = self.repeated {
            bail!(
                "{op}: drop: expected the mask of one pass, got that of {times} Monte-Carlo passes in one, which this \
                 op does not take; call its layer with train = false, or run the passes one by one"
            )
        }
        let own = dims.iter().enumerate().filter(|(d, _)| !shared.contains(d));
        let own: Vec<usize> = own.map(|(_, dim)| *dim).collect();
        let whole = |full: &[usize], start: &[usize]| {
            MaskArgs::new(op, self.rate, self.key, dims, shared, full, start)
        };
        let (full_shape, start) = match &self.window {
            None => return whole(&own, &vec![0; own.len()]),
            Some(Window::Part { full_shape, start }) => (full_shape, start),
            Some(Window::From { dim, start }) => {
                let (mut full, mut first) = (own.clone(), vec![0; own.len()]);
                if let (Some(full), Some(first)) = (full.get_mut(*dim), first.get_mut(*dim)) {
                    (*full, *first) = (full.saturating_add(*start), *start);
                }
                return whole(&full, &first);
            }
        };
        if full_shape.len() != own.len() || start.len() != own.len() {
            bail!(
                "{op}: drop.window: expected full_shape and start of rank {} like the mask {own:?}, \
                 got {full_shape:?} and {start:?}; give one entry for each dimension of the mask",
                own.len()
            )
        }
        for d in 0..own.len() {
            if start[d].checked_add(own[d]).is_none_or(|end| end > full_shape[d]) {
                bail!(
                    "{op}: drop.window: expected start + shape <= full_shape in every dimension, got \
                     {start:?} + {own:?} > {full_shape:?} in dimension {d}; pass the shape of the \
                     whole mask and the position of this part in it"
                )
            }
        }
        MaskArgs::new(op, self.rate, self.key, dims, shared, full_shape, start)
    }
}
