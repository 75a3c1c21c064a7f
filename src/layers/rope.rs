use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Tensor, bail};

use super::RopeScaling;
use crate::functional::{RopeStyle, rope};

/// What the angles of a [`Rope`] follow from.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Elements of a head (`D`); even.
    pub head_size: usize,
    /// Positions that there are; the tables hold those that have been asked for.
    pub max_positions: usize,
    /// Base of the frequencies: pair `j` turns by `theta^(-2j / head_size)` a position.
    pub theta: f64,
    /// How the frequencies are stretched for contexts longer than those of training.
    pub scaling: RopeScaling,
    /// Which elements are a pair.
    pub style: RopeStyle,
}

impl Default for RopeConfig {
    /// LLaMA: heads of 128 elements, 4096 positions, a base of 10,000.
    fn default() -> Self {
        Self {
            head_size: 128,
            max_positions: 4096,
            theta: 10_000.,
            scaling: RopeScaling::None,
            style: RopeStyle::HalfSplit,
        }
    }
}

/// The tables of rotary position embeddings, for all layers of a model.
///
/// ```text
/// angle(position, j) = position * scaling(theta^(-2j / head_size))        j in 0..head_size/2
/// ```
///
/// Angles are computed in f64 and their cosines and sines kept as f32 (f64 if asked for): a bf16 angle
/// at position 1000 would be off by whole radians. Two tables of `head_size / 2` numbers a position, which
/// grow with the positions that are asked for, at most twofold ahead of them; clones share them, and
/// threads. On CUDA they grow on the stream of the thread that asks: threads that share a `Rope` there
/// synchronise as if each call handed a tensor over.
///
/// Su et al., "RoFormer", 2021, arXiv 2104.09864.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_dropout::{Rope, RopeConfig};
///
/// # fn main() -> candle_core::Result<()> {
/// let config = RopeConfig { head_size: 4, max_positions: 16, ..Default::default() };
/// let rope = Rope::new(&config, DType::F32, &Device::Cpu)?;
/// let q = Tensor::ones((1, 2, 3, 4), DType::F32, &Device::Cpu)?; // [B, H, T, D]
/// let k = Tensor::ones((1, 1, 3, 4), DType::F32, &Device::Cpu)?; // fewer heads: grouped queries
/// let (q, k) = rope.apply(&q, &k, 5)?; // the positions 5, 6 and 7
/// assert_eq!((q.dims(), k.dims()), (&[1, 2, 3, 4][..], &[1, 1, 3, 4][..]));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Rope {
    angles: Arc<Angles>,
    style: RopeStyle,
}

/// What the tables are made from, and as much of them as there is.
#[derive(Debug)]
struct Angles {
    frequencies: Vec<f64>,
    /// Multiplies cosines and sines.
    factor: f64,
    max_positions: usize,
    dtype: DType,
    device: Device,
    /// Cosines and sines, `[positions, head_size / 2]`.
    tables: Mutex<Option<(Tensor, Tensor)>>,
}

/// Rows of the first tables.
const FEWEST_POSITIONS: usize = 64;

impl Angles {
    /// Those of the positions from `start` to `end`, on the device.
    fn rows(&self, start: usize, end: usize) -> Result<(Tensor, Tensor)> {
        let (positions, pairs) = (end - start, self.frequencies.len());
        let table = |of: fn(f64) -> f64| -> Result<Tensor> {
            let mut table = Vec::new();
            let elements = positions.checked_mul(pairs);
            if elements.is_none_or(|elements| table.try_reserve_exact(elements).is_err()) {
                bail!(
                    "rope: positions: expected tables that fit into memory, got {positions} positions of \
                     {pairs} pairs; ask for fewer at a time"
                )
            }
            let angles = (start..end)
                .flat_map(|position| self.frequencies.iter().map(move |f| position as f64 * f));
            table.extend(angles.map(|angle| self.factor * of(angle)));
            let table = Tensor::from_vec(table, (positions, pairs), &Device::Cpu)?;
            table.to_dtype(self.dtype)?.to_device(&self.device)
        };
        Ok((table(f64::cos)?, table(f64::sin)?))
    }

    /// Tables that hold the positions from `start` to `end`, and the position that they begin at.
    fn holding(&self, start: usize, end: usize) -> Result<(usize, (Tensor, Tensor))> {
        let Ok(mut tables) = self.tables.lock() else {
            bail!(
                "rope: the tables are lost, since a thread panicked while they grew; make a new Rope"
            )
        };
        let has = tables.as_ref().map_or(Ok(0), |(cos, _)| cos.dim(0))?;
        if let Some(tables) = tables.as_ref().filter(|_| end <= has) {
            return Ok((0, tables.clone()));
        }
        // Far behind what was asked for so far: not all that lies between.
        if start > has.saturating_mul(2).max(FEWEST_POSITIONS) {
            return Ok((start, self.rows(start, end)?));
        }
        let wanted = end.max(has.saturating_mul(2)).max(FEWEST_POSITIONS).min(self.max_positions);
        let (mut cos, mut sin) = self.rows(has, wanted)?;
        if let Some((old_cos, old_sin)) = tables.as_ref() {
            (cos, sin) = (Tensor::cat(&[old_cos, &cos], 0)?, Tensor::cat(&[old_sin, &sin], 0)?);
        }
        *tables = Some((cos.clone(), sin.clone()));
        Ok((0, (cos, sin)))
    }
}

impl Rope {
    /// Tables that grow on a device. `dtype` is that of the model: f64 tables for f64, f32 ones for
    /// anything else.
    ///
    /// # Errors
    /// `head_size` is 0 or odd, `max_positions` is 0, `theta` or a number of the scaling is not positive,
    /// or `dtype` is f64 on a device other than the CPU.
    pub fn new(config: &RopeConfig, dtype: DType, device: &Device) -> Result<Self> {
        let &RopeConfig { head_size, max_positions, theta, scaling, style } = config;
        if head_size == 0 || head_size % 2 != 0 {
            bail!("rope: head_size: expected an even number of at least 2, got {head_size}")
        }
        if max_positions == 0 {
            bail!("rope: max_positions: expected at least 1, got 0; take the longest context")
        }
        if !(theta.is_finite() && theta > 0.) {
            bail!("rope: theta: expected a positive number, got {theta}; the usual one is 10000")
        }
        scaling.validate()?;
        if dtype == DType::F64 && !device.is_cpu() {
            bail!(
                "rope: dtype: expected f64 on the CPU alone, got it on {:?}; use f32",
                device.location()
            )
        }
        let dtype = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let angles = Angles {
            frequencies: scaling.frequencies(theta, head_size)?,
            factor: scaling.attention_factor(),
            max_positions,
            dtype,
            device: device.clone(),
            tables: Mutex::default(),
        };
        Ok(Self { angles: Arc::new(angles), style })
    }

    /// Rotates queries `[B, H, T, D]` and keys `[B, Hkv, T, D]` that stand at the positions
    /// `start_pos..start_pos + T`; `start_pos` is the length of the cache when generating.
    ///
    /// # Errors
    /// There are more positions than `max_positions`, or their tables do not fit into memory; `q` and `k`
    /// differ in `T`, or [`rope`](crate::functional::rope()) refuses one of them.
    pub fn apply(&self, q: &Tensor, k: &Tensor, start_pos: usize) -> Result<(Tensor, Tensor)> {
        let positions = |x: &Tensor| x.rank().checked_sub(2).map(|d| x.dims()[d]);
        if positions(q) != positions(k) {
            bail!(
                "rope: k: expected as many positions as q {:?} has, got {:?}; rotate new keys before \
                 they join the cache",
                q.dims(),
                k.dims()
            )
        }
        Ok((self.rotate(q, start_pos)?, self.rotate(k, start_pos)?))
    }

    /// One tensor `[.., T, D]` at the positions `start_pos..start_pos + T`.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn rotate(&self, x: &Tensor, start_pos: usize) -> Result<Tensor> {
        let &[.., t, _] = x.dims() else {
            bail!("rope: x: expected [.., T, D], got {:?}; unsqueeze it", x.dims())
        };
        let (cos, sin) = self.tables(start_pos, t)?;
        rope(x, &cos, &sin, self.style)
    }

    /// Cosines and sines, `[T, D/2]` each, of the positions `start_pos..start_pos + T`, for
    /// [`rope`](crate::functional::rope()) at positions of your own.
    ///
    /// # Errors
    /// There are fewer positions, or their tables do not fit into memory.
    pub fn tables(&self, start_pos: usize, t: usize) -> Result<(Tensor, Tensor)> {
        let max_positions = self.angles.max_positions;
        let Some(end) = start_pos.checked_add(t).filter(|end| *end <= max_positions) else {
            bail!(
                "rope: start_pos: expected start_pos + T <= max_positions = {max_positions}, got \
                 {start_pos} + {t}; raise max_positions"
            )
        };
        let (first, (cos, sin)) = self.angles.holding(start_pos, end)?;
        Ok((cos.narrow(0, start_pos - first, t)?, sin.narrow(0, start_pos - first, t)?))
    }
}
