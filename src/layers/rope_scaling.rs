//! How the frequencies of rotary embeddings are stretched for long contexts.

use std::f64::consts::TAU;

use candle_core::{Result, bail};

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
    /// As LLaMA 3.1, with a ramp over the pairs of a head between the two bounds, and longer queries and
    /// keys: YaRN (Peng et al. 2023, arXiv 2309.00071).
    Yarn {
        /// Divides the low frequencies.
        factor: f64,
        /// Multiplies queries and keys; `0.1 ln(factor) + 1` in the paper.
        attention_factor: f64,
        /// Frequencies are high above this number of turns in the original context; the usual one is 32.
        beta_fast: f64,
        /// Frequencies are low below this number of turns in the original context; the usual one is 1.
        beta_slow: f64,
        /// Positions of the original context.
        original_max_positions: usize,
        /// Whether the ramp begins and ends at whole pairs; it usually does.
        truncate: bool,
    },
}

impl RopeScaling {
    /// Frequency of each of the `head_size / 2` pairs of a head.
    pub(super) fn frequencies(self, theta: f64, head_size: usize) -> Result<Vec<f64>> {
        let (size, half) = (head_size as f64, head_size / 2);
        let mut frequencies = Vec::new();
        if frequencies.try_reserve_exact(half).is_err() {
            bail!(
                "rope: head_size: expected one that fits into memory, got {head_size}; the usual one is 128"
            )
        }
        let plain = |j: usize| theta.powf(-2. * j as f64 / size);
        frequencies.extend((0..half).map(plain));
        match self {
            Self::None => {}
            Self::Linear { factor } => frequencies.iter_mut().for_each(|f| *f /= factor),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                for frequency in &mut frequencies {
                    let turns = original_max_positions as f64 * *frequency / TAU;
                    let high = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let high = high.clamp(0., 1.);
                    *frequency *= high + (1. - high) / factor;
                }
            }
            Self::Yarn {
                factor, beta_fast, beta_slow, original_max_positions, truncate, ..
            } => {
                // The pair that turns so often in the original context, a fraction of one.
                let pair = |turns: f64| {
                    size * (original_max_positions as f64 / (turns * TAU)).ln() / (2. * theta.ln())
                };
                let (first, last) = (pair(beta_fast), pair(beta_slow));
                if !(first.is_finite() && last.is_finite()) {
                    bail!(
                        "rope: scaling: expected a ramp of YaRN between two pairs, got {first} and \
                         {last} with theta {theta}; the usual theta is 10000"
                    )
                }
                let (first, last) =
                    if truncate { (first.floor(), last.ceil()) } else { (first, last) };
                let (first, last) = (first.max(0.), last.min(size - 1.));
                // As Hugging Face has it, a step is a steep ramp.
                let width = if first == last { 0.001 } else { last - first };
                for (j, frequency) in frequencies.iter_mut().enumerate() {
                    let low = ((j as f64 - first) / width).clamp(0., 1.);
                    *frequency *= (1. - low) + low / factor;
                }
            }
        }
        Ok(frequencies)
    }

    /// Multiplies cosines and sines.
    pub(super) fn attention_factor(self) -> f64 {
        match self {
            Self::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.,
        }
    }

    pub(crate) fn validate(self) -> Result<()> {
        let positive = |name: &str, number: f64| match number.is_finite() && number > 0. {
            true => Ok(()),
            false => bail!(
                "rope: scaling.{name}: expected a positive number, got {number}; RopeScaling::None \
                 scales nothing"
            ),
        };
        match self {
            Self::None => Ok(()),
            Self::Linear { factor } => positive("factor", factor),
            Self::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, .. } => {
                positive("factor", factor)?;
                if !(low.is_finite() && high.is_finite() && 0. < low && low < high) {
                    bail!(
                        "rope: scaling: expected 0 < low_freq_factor < high_freq_factor, got {low} and \
                         {high}; LLaMA 3.1 has 1 and 4"
                    )
                }
                Ok(())
            }
            Self::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                original_max_positions,
                ..
            } => {
                positive("factor", factor)?;
                positive("attention_factor", attention_factor)?;
                positive("beta_fast", beta_fast)?;
                positive("beta_slow", beta_slow)?;
                positive("original_max_positions", original_max_positions as f64)
            }
        }
    }
}
