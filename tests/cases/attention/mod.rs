//! `attention` with each field of its config. A size is `[B, H, Hkv, Sq, Sk, D]`, or `[B, H, S, D]` if
//! queries are as many as keys and each head has its own.

mod formula;
#[cfg(test)]
mod kernel;
mod sizes;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::{AttentionConfig, AttentionMask, attention, softmax_dropout};

pub use formula::formula;
pub use sizes::{Sizes, sizes};

use crate::tensors::epsilon;
use crate::{Case, Exact, Results, drop_scale, dropout, largest};

/// A config whose tensors are yet to be made.
#[derive(Clone, Copy, Debug)]
struct Attention {
    name: &'static str,
    scale: Option<f64>,
    causal: bool,
    window: Option<(usize, usize)>,
    softcap: Option<f64>,
    key_lengths: bool,
    alibi_slopes: bool,
    drop_key: bool,
}

const PLAIN: Attention = Attention {
    name: "attention",
    scale: None,
    causal: false,
    window: None,
    softcap: None,
    key_lengths: false,
    alibi_slopes: false,
    drop_key: false,
};

/// One of each limit and each change of the scores, and some together.
pub const CASES: &[&dyn Case] = &[
    &PLAIN,
    &Attention { name: "attention_causal", causal: true, ..PLAIN },
    &Attention { name: "attention_scale", scale: Some(0.3), ..PLAIN },
    &Attention { name: "attention_softcap", softcap: Some(1.5), ..PLAIN },
    &Attention { name: "attention_window", window: Some((5, 2)), ..PLAIN },
    &Attention { name: "attention_window_diagonal", window: Some((0, 0)), ..PLAIN },
    &Attention { name: "attention_window_left", window: Some((70, usize::MAX)), ..PLAIN },
    &Attention { name: "attention_window_causal", window: Some((40, 3)), causal: true, ..PLAIN },
    &Attention { name: "attention_lengths", key_lengths: true, ..PLAIN },
    &Attention { name: "attention_lengths_causal", key_lengths: true, causal: true, ..PLAIN },
    &Attention { name: "attention_alibi_causal", alibi_slopes: true, causal: true, ..PLAIN },
    &Attention { name: "attention_alibi", alibi_slopes: true, ..PLAIN },
    &Attention {
        name: "attention_all",
        scale: Some(0.2),
        causal: true,
        window: Some((90, 9)),
        softcap: Some(3.),
        key_lengths: true,
        alibi_slopes: true,
        ..PLAIN
    },
    &Attention { name: "attention_drop_key", drop_key: true, ..PLAIN },
    &Attention {
        name: "attention_drop_key_all",
        scale: Some(0.2),
        causal: true,
        window: Some((90, 9)),
        softcap: Some(3.),
        key_lengths: true,
        alibi_slopes: true,
        drop_key: true,
    },
];

impl Attention {
    fn config(&self, constants: &[Tensor]) -> AttentionConfig {
        let mut constants = constants.iter().cloned();
        AttentionConfig {
            scale: self.scale,
            causal: self.causal,
            window: self.window,
            softcap: self.softcap,
            key_lengths: self.key_lengths.then(|| constants.next()).flatten(),
            alibi_slopes: self.alibi_slopes.then(|| constants.next()).flatten(),
            drop_key: self.drop_key,
        }
    }

    /// Every score is visible, or every one up to the query's own key.
    fn is_common(&self) -> bool {
        matches!(self.name, "attention" | "attention_causal")
    }
}

impl Case for Attention {
    fn name(&self) -> &'static str {
        self.name
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        match Sizes::of(size) {
            Some(sizes) => [sizes.q(), sizes.k(), sizes.k()].map(|dims| dims.to_vec()).to_vec(),
            None => vec![size.to_vec(); 3],
        }
    }

    fn takes(&self, size: &[usize]) -> bool {
        Sizes::of(size).is_some_and(|Sizes { h, kv, .. }| kv > 0 && h.is_multiple_of(kv))
    }

    fn fitting(&self, size: &[usize]) -> Vec<usize> {
        match *size {
            _ if self.takes(size) => size.to_vec(),
            [.., s, d] => vec![1, 2, s.min(130), d.min(64)],
            _ => vec![1, 2, 3, 4],
        }
    }

    fn drop_ps(&self) -> &'static [f32] {
        if self.is_common() { &[0., 0.1, 1.] } else { &[0., 0.3] }
    }

    /// Every head size that the kernels have, odd ones and 1; single queries and keys, a few against many,
    /// tails of tiles of queries and keys, and several of both; more queries than keys and fewer.
    fn awkward(&self) -> &'static [&'static [usize]] {
        if self.is_common() {
            &[
                &[1, 1, 1, 1, 1, 1],
                &[2, 3, 3, 5, 7, 3],
                &[1, 2, 2, 64, 256, 32],
                &[1, 2, 2, 65, 257, 64],
                &[1, 2, 1, 63, 255, 96],
                &[1, 1, 1, 130, 70, 128],
                &[1, 1, 1, 37, 300, 256],
                &[2, 4, 2, 33, 41, 16],
                &[2, 6, 1, 17, 19, 40],
                &[1, 1, 1, 1, 515, 64],
                &[2, 6, 2, 1, 2300, 64],
                &[1, 3, 1, 7, 3100, 17],
                &[1, 1, 1, 515, 1, 64],
                &[1, 1, 1, 7, 9, 300],
                &[1, 1, 1, 600, 530, 33],
            ]
        } else {
            &[
                &[3, 4, 2, 70, 70, 32],
                &[3, 2, 2, 5, 300, 64],
                &[3, 4, 2, 1, 2100, 32],
                &[3, 2, 1, 300, 65, 8],
                &[1, 3, 3, 270, 290, 33],
            ]
        }
    }

    fn largest_argument(&self) -> f64 {
        2.
    }

    fn mask_dims(&self, size: &[usize]) -> Option<Vec<usize>> {
        Sizes::of(size).map(|sizes| sizes.scores().to_vec())
    }

    fn constants(&self, size: &[usize], _: DType, device: &Device) -> Result<Vec<Tensor>> {
        let Some(Sizes { b, h, sk, .. }) = Sizes::of(size) else { return Ok(vec![]) };
        let lengths = || (0..b).map(|b| ((b * 37 + 3) % (sk + 1)) as u32).collect::<Vec<_>>();
        // Gentle: a logit of 100 is known to 1e-5 in f32, and so is its exponential, whoever computes it.
        let slopes = || (0..h).map(|h| 0.5f32.powi(h as i32 + 5)).collect::<Vec<_>>();
        let lengths = self.key_lengths.then(|| Tensor::new(lengths(), device));
        let slopes = self.alibi_slopes.then(|| Tensor::new(slopes(), device));
        lengths.into_iter().chain(slopes).collect()
    }

    fn fused(&self, args: &[Tensor], constants: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![attention(&args[0], &args[1], &args[2], &self.config(constants), drop)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        constants: &[Tensor],
        keep: &Tensor,
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        let config = self.config(constants);
        Ok(vec![formula(&args[0], &args[1], &args[2], &config, keep, scale)?])
    }

    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        let [q, k, v] = args else { return None };
        let o = || {
            let scores = (q.matmul(&k.t()?)? / (q.dim(D::Minus1)? as f64).sqrt())?;
            let y = candle_nn::ops::softmax(&scores, D::Minus1)?;
            Ok(vec![dropout::chain(&y, drop_p)?.matmul(v)?])
        };
        (self.name == "attention").then(o)
    }

    /// Its scores materialised around `softmax_dropout`.
    fn composed(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Results {
        let [q, k, v] = args else { return None };
        let o = || {
            let mask = if self.causal { AttentionMask::Causal } else { AttentionMask::None };
            let scale = 1. / (q.dim(D::Minus1)? as f64).sqrt();
            Ok(vec![softmax_dropout(&q.matmul(&k.t()?)?, scale, &mask, drop)?.matmul(v)?])
        };
        self.is_common().then(o)
    }

    /// The gradient of a score is P times a difference, of do · v and of do · o with the rounded o. Both may
    /// be far larger than it, and what rounds are their terms; the sum over queries adds up the errors.
    fn terms(&self, exact: &Exact<'_>) -> Result<Vec<f64>> {
        let [q, k, v] = exact.args else { candle_core::bail!("three arguments") };
        let (&[_, h, sq, d], &[_, kv, sk, _]) = (q.dims(), k.dims()) else {
            candle_core::bail!("four dimensions")
        };
        let mean = |x: &Tensor| x.abs()?.mean_all()?.to_scalar::<f64>();
        let dot = d as f64 * mean(exact.dy)? * mean(v)? + largest(exact.dy)? * largest(v)?;
        let unit = self.scale.unwrap_or(1. / (d as f64).sqrt()) * drop_scale(exact.drop);
        let term = 2. * unit * dot * largest(q)?.max(largest(k)?);
        let added = ((sq * h) as f64 / (sk * kv) as f64).max(1.).sqrt();
        Ok(vec![0., term, term * added, 0.])
    }

    fn epsilon(&self, size: &[usize], dtype: DType) -> f64 {
        match (dtype, Sizes::of(size)) {
            (DType::F64, _) => 64. * f64::EPSILON,
            // Exponents of up to ln Sk and more are rounded in f32, and with them all probabilities of a row.
            (DType::F32, Some(Sizes { sk, .. })) => epsilon(dtype) * (1. + (sk.max(1) as f64).ln()),
            _ => epsilon(dtype),
        }
    }

    fn is_on_cuda(&self, size: &[usize], dtype: DType) -> bool {
        dtype != DType::F64 && size.last().is_some_and(|d| *d <= 256)
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        if self.is_common() { &[0., 0.1] } else { &[] }
    }

    /// 8 heads of 64 columns, at most 1024 tokens.
    fn bench_size(&self, elements: usize) -> Vec<usize> {
        let s = (elements / 512).clamp(1, 1024);
        vec![(elements / (512 * s)).max(1), 8, s, 64]
    }

    /// The two products of the forward pass over the visible scores, and the five of the backward pass.
    fn flop(&self, size: &[usize]) -> Option<[f64; 2]> {
        let Sizes { b, h, sq, sk, d, .. } = Sizes::of(size)?;
        let forward = 4. * (b * h * sq * sk * d) as f64 * if self.causal { 0.5 } else { 1. };
        self.is_common().then_some([forward, 2.5 * forward])
    }
}
