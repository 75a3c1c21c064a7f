//! Text from a model: one token a step, with a cache of keys and values.

use candle_core::{DType, Result, Tensor, bail};

use super::Transformer;
use crate::mask::MaskGenerator;

/// Tokens by which caches grow at most: their memory follows the text, not the longest one that is
/// allowed.
const LARGEST_STEP: usize = 4096;

/// How [`Transformer::generate`] picks tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// Number of tokens to add to the prompt.
    pub max_new_tokens: usize,
    /// Divides the logits; 0 picks the likeliest token every time.
    pub temperature: f64,
    /// Sample from this many likeliest tokens only.
    pub top_k: Option<usize>,
    /// Seed of the sampler: equal seeds give equal text.
    pub seed: u64,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self { max_new_tokens: 50, temperature: 1.0, top_k: Some(50), seed: 0 }
    }
}

impl Transformer {
    /// Continues `prompt` and returns prompt and continuation together.
    ///
    /// Keys and values are cached, so a step computes one token. A text of more than
    /// `max_position_embeddings` tokens is seen through a window that moves on by half of that
    /// whenever it is full: the model sees between half and all of the tokens it can, and computes
    /// them all again, with their new positions, only when the window moves. Where the window
    /// stands follows from the length of the text alone, so at temperature 0 a text continued in
    /// two calls is that of one. At others it is not: each call begins its draws anew.
    ///
    /// # Randomness
    /// Draws come from `config.seed` by the key derivation of the masks, so equal logits give equal
    /// text in every release. No dropout mask is drawn.
    ///
    /// # Errors
    /// `prompt` is empty or holds a token outside the vocabulary (found on the host, before any
    /// computing), `temperature` is negative or not finite, `top_k` is 0, or a logit is not finite.
    pub fn generate(&self, prompt: &[u32], config: &GenerationConfig) -> Result<Vec<u32>> {
        self.check_request(prompt, config)?;
        let draws = MaskGenerator::new(config.seed);
        let (mut ids, mut start) = (prompt.to_vec(), 0);
        let longest = prompt.len().saturating_add(config.max_new_tokens);
        let mut caches = self.kv_caches(longest.min(self.max_positions).min(LARGEST_STEP));
        for _ in 0..config.max_new_tokens {
            let window = window_start(ids.len(), self.max_positions);
            if window != start {
                start = window;
                caches.iter_mut().for_each(|cache| cache.reset());
            }
            let seen = start + caches.first().map_or(0, |cache| cache.current_seq_len());
            let new = Tensor::new(&ids[seen..], self.device())?.unsqueeze(0)?; // [1, T]
            let logits = self.forward_cached(&new, &mut caches)?; // [1, V]
            let logits = logits.squeeze(0)?.to_dtype(DType::F32)?.to_vec1()?;
            ids.push(sample(&logits, config, &draws)?);
        }
        Ok(ids)
    }

    fn check_request(&self, prompt: &[u32], config: &GenerationConfig) -> Result<()> {
        let (temperature, vocab_size) = (config.temperature, self.vocab_size()?);
        if prompt.is_empty() {
            bail!("generate: prompt: expected at least 1 token, got none")
        }
        if let Some(at) = prompt.iter().position(|&token| token as usize >= vocab_size) {
            let token = prompt[at];
            bail!(
                "generate: prompt: expected tokens below vocab_size = {vocab_size}, got {token} at \
                 position {at}: was the text encoded for another vocabulary?"
            )
        }
        if !(temperature.is_finite() && temperature >= 0.0) {
            bail!(
                "generate: temperature: expected a finite number of at least 0, got {temperature}"
            )
        }
        if config.top_k == Some(0) {
            bail!(
                "generate: top_k: expected at least 1, got 0: use `None` to sample from all tokens"
            )
        }
        Ok(())
    }
}

/// Where the window on a text of `len` tokens begins: at 0, then at multiples of half a window.
fn window_start(len: usize, max_positions: usize) -> usize {
    let half = max_positions.div_ceil(2);
    len.saturating_sub(max_positions).div_ceil(half) * half
}

/// Draws a token from `softmax(logits / temperature)` over the `top_k` likeliest.
fn sample(logits: &[f32], config: &GenerationConfig, draws: &MaskGenerator) -> Result<u32> {
    if let Some(token) = logits.iter().position(|logit| !logit.is_finite()) {
        let logit = logits[token];
        bail!(
            "generate: logits: expected finite numbers, got {logit} for token {token}: has training \
             diverged?"
        )
    }
    let mut tokens: Vec<usize> = (0..logits.len()).collect();
    tokens.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let likeliest = tokens[0];
    if config.temperature == 0.0 {
        return Ok(likeliest as u32);
    }
    tokens.truncate(config.top_k.unwrap_or(logits.len()));
    let weight = |&token: &usize| {
        ((f64::from(logits[token]) - f64::from(logits[likeliest])) / config.temperature).exp()
    };
    // No generator or sampler of another crate: those may change between releases.
    let uniform = (draws.next_key().bits() >> 11) as f64 / (1u64 << 53) as f64;
    let mut left = uniform * tokens.iter().map(weight).sum::<f64>();
    let drawn = tokens.iter().find(|token| {
        left -= weight(token);
        left < 0.0
    });
    // Rounding may leave a rest after the last token.
    Ok(*drawn.unwrap_or(&likeliest) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_holds_at_least_half_of_what_the_model_can_see() {
        for max_positions in 1..=9 {
            let mut last = 0;
            for len in 1..60 {
                let start = window_start(len, max_positions);
                let seen = len - start;
                assert!((1..=max_positions).contains(&seen), "{len} {max_positions}: {seen}");
                assert!(seen >= len.min(max_positions / 2 + 1), "{len} {max_positions}: {seen}");
                assert!(start >= last);
                last = start;
            }
        }
    }

    #[test]
    fn tokens_of_a_seed_are_pinned() -> Result<()> {
        // A changed token here means that equal seeds no longer give equal text.
        let (logits, draws) = ([0.5, -1.0, 2.0, 0.0, 1.5], MaskGenerator::new(7));
        let config = GenerationConfig { top_k: Some(4), ..Default::default() };
        let tokens: Vec<u32> =
            (0..16).map(|_| sample(&logits, &config, &draws)).collect::<Result<_>>()?;
        assert_eq!(tokens, [4, 2, 3, 0, 4, 2, 2, 4, 4, 2, 0, 2, 3, 4, 2, 4]);
        Ok(())
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() -> Result<()> {
        let draws = MaskGenerator::new(1);
        let logits = [0.0, f32::ln(3.0), -50.0, f32::ln(4.0)];
        let config = GenerationConfig { top_k: Some(3), ..Default::default() };
        let mut counts = [0f64; 4];
        for _ in 0..8000 {
            counts[sample(&logits, &config, &draws)? as usize] += 1.0;
        }
        for (count, p) in counts.into_iter().zip([0.125, 0.375, 0.0, 0.5]) {
            let variance: f64 = 8000.0 * p * (1.0 - p);
            assert!((count - 8000.0 * p).abs() <= 4.0 * variance.sqrt(), "{counts:?}");
        }
        Ok(())
    }

    #[test]
    fn logits_that_are_not_finite_are_an_error_at_every_temperature() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for temperature in [0.0, 1.0] {
                let config = GenerationConfig { temperature, top_k: Some(1), ..Default::default() };
                let draws = MaskGenerator::new(1);
                let error = sample(&[1.0, bad, 2.0], &config, &draws).unwrap_err().to_string();
                assert!(error.contains("logits: expected finite numbers, got"), "{error}");
                assert!(error.contains("for token 1"), "{error}");
            }
        }
    }
}
