use candle_core::{DType, Device, Result, Tensor, bail};

use crate::ops::{RopeStyle, rope};

/// What the angles of a [`Rope`] follow from.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Elements of a head (`D`); even.
    pub head_size: usize,
    /// Positions that the tables hold.
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

/// How the frequencies of rotary embeddings are stretched for long contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// All by one factor: position interpolation (Chen et al. 2023, arXiv 2306.15595).
    Linear {
        /// Divides every frequency.
        factor: f64,
    },
    /// Low frequencies by the factor, high ones not, those between in part: LLaMA 3.1
    /// (Grattafiori et al. 2024, arXiv 2407.21783, and Meta's reference code).
    Llama3 {
        /// Divides the low frequencies.
        factor: f64,
        /// Frequencies are low below this number of turns in the original context.
        low_freq_factor: f64,
        /// Frequencies are high above this number of turns in the original context.
        high_freq_factor: f64,
        /// Positions of the original context.
        original_max_positions: usize,
    },
}

impl RopeScaling {
    fn frequency(self, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let turns = original_max_positions as f64 * frequency / std::f64::consts::TAU;
                let high = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let high = high.clamp(0., 1.);
                frequency * (high + (1. - high) / factor)
            }
        }
    }

    pub(crate) fn validate(self) -> Result<()> {
        let factor = match self {
            Self::None => return Ok(()),
            Self::Linear { factor } | Self::Llama3 { factor, .. } => factor,
        };
        if !(factor.is_finite() && factor > 0.) {
            bail!("rope: scaling.factor: expected a positive number, got {factor}")
        }
        if let Self::Llama3 { low_freq_factor: low, high_freq_factor: high, .. } = self
            && !(low.is_finite() && high.is_finite() && 0. < low && low < high)
        {
            bail!(
                "rope: scaling: expected 0 < low_freq_factor < high_freq_factor, got {low} and {high}; \
                 LLaMA 3.1 has 1 and 4"
            )
        }
        Ok(())
    }
}

/// The tables of rotary position embeddings, for all layers of a model.
///
/// ```text
/// angle(position, j) = position * scaling(theta^(-2j / head_size))        j in 0..head_size/2
/// ```
///
/// Angles are computed in f64 and kept as f32 (f64 if asked for): a bf16 angle at position 1000
/// would be off by whole radians. Two tables of `max_positions * head_size / 2` numbers.
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
    cos: Tensor,
    sin: Tensor,
    style: RopeStyle,
}

impl Rope {
    /// Makes the tables on a device. `dtype` is that of the model: f64 tables for f64, f32 ones for
    /// anything else.
    ///
    /// # Errors
    /// `head_size` is 0 or odd, `max_positions` is 0, `theta` or a factor is not a positive number,
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
        let half = head_size / 2;
        let frequency = |j: usize| scaling.frequency(theta.powf(-2. * j as f64 / head_size as f64));
        let frequencies: Vec<f64> = (0..half).map(frequency).collect();
        let table = |of: fn(f64) -> f64| -> Result<Tensor> {
            let angles = (0..max_positions)
                .flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
            let table = angles.map(of).collect();
            let table = Tensor::from_vec(table, (max_positions, half), &Device::Cpu)?;
            let dtype = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
            table.to_dtype(dtype)?.to_device(device)
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)?, style })
    }

    /// Rotates queries `[B, H, T, D]` and keys `[B, Hkv, T, D]` that stand at the positions
    /// `start_pos..start_pos + T`; `start_pos` is the length of the cache when generating.
    ///
    /// # Errors
    /// There are more positions than the tables hold, `q` and `k` differ in `T`, or
    /// [`rope`](crate::rope()) refuses one of them.
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
        let max_positions = self.cos.dim(0)?;
        if start_pos.checked_add(t).is_none_or(|end| end > max_positions) {
            bail!(
                "rope: start_pos: expected start_pos + T <= max_positions = {max_positions}, got \
                 {start_pos} + {t}; make the tables longer"
            )
        }
        let part = |table: &Tensor| table.narrow(0, start_pos, t);
        rope(x, &part(&self.cos)?, &part(&self.sin)?, self.style)
    }

    /// Cosines `[max_positions, D/2]`, for [`rope`](crate::rope()) at positions of your own.
    pub fn cos(&self) -> &Tensor {
        &self.cos
    }

    /// Sines, likewise.
    pub fn sin(&self) -> &Tensor {
        &self.sin
    }
}
