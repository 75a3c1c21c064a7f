//! `cross_entropy`, and the same with label smoothing, some rows ignored, the sum of the rows, z-loss.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::{CrossEntropyConfig, Reduction, cross_entropy};

pub use formula::formula;

use crate::{Case, Exact, Results, largest};

#[derive(Debug)]
struct CrossEntropy {
    name: &'static str,
    config: CrossEntropyConfig,
    /// Some targets are ignored; they are i64 then.
    ignores: bool,
}

const PLAIN: CrossEntropyConfig = CrossEntropyConfig {
    label_smoothing: 0.,
    ignore_index: None,
    reduction: Reduction::Mean,
    z_loss: 0.,
};

/// The factor is larger than anybody's, so that the other terms do not hide it.
pub const CASES: &[&dyn Case] = &[
    &CrossEntropy { name: "cross_entropy", config: PLAIN, ignores: false },
    &CrossEntropy {
        name: "cross_entropy_smoothed",
        config: CrossEntropyConfig { label_smoothing: 0.1, ignore_index: Some(-100), ..PLAIN },
        ignores: true,
    },
    &CrossEntropy {
        name: "cross_entropy_sum",
        config: CrossEntropyConfig {
            ignore_index: Some(-100),
            reduction: Reduction::Sum,
            z_loss: 0.02,
            ..PLAIN
        },
        ignores: true,
    },
    &CrossEntropy {
        name: "cross_entropy_z",
        config: CrossEntropyConfig { label_smoothing: 0.3, z_loss: 0.02, ..PLAIN },
        ignores: false,
    },
];

impl Case for CrossEntropy {
    fn name(&self) -> &'static str {
        self.name
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        vec![size.to_vec()]
    }

    fn takes(&self, size: &[usize]) -> bool {
        // A row of no classes has no target.
        size.last().is_some_and(|cols| *cols > 0)
    }

    fn is_loss(&self) -> bool {
        true
    }

    fn mask_dims(&self, _: &[usize]) -> Option<Vec<usize>> {
        None
    }

    fn drop_ps(&self) -> &'static [f32] {
        &[0.]
    }

    /// A class for each row; u32, or i64 where some are ignored.
    fn constants(&self, size: &[usize], _: DType, device: &Device) -> Result<Vec<Tensor>> {
        let Some((&classes, rows)) = size.split_last() else { candle_core::bail!("no classes") };
        let class = |row: usize| (row * 7919 + 3) % classes.max(1);
        let count = rows.iter().product::<usize>();
        let targets = if self.ignores {
            let target = |row: usize| if row % 5 == 1 { -100 } else { class(row) as i64 };
            Tensor::from_vec((0..count).map(target).collect(), rows, device)?
        } else {
            Tensor::from_vec((0..count).map(|row| class(row) as u32).collect(), rows, device)?
        };
        Ok(vec![targets])
    }

    fn fused(&self, args: &[Tensor], targets: &[Tensor], _: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![cross_entropy(&args[0], &targets[0], &self.config)?])
    }

    fn formula(
        &self,
        args: &[Tensor],
        targets: &[Tensor],
        _: &Tensor,
        _: f64,
    ) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], &targets[0], &self.config)?])
    }

    fn chain(&self, args: &[Tensor], targets: &[Tensor], _: f32) -> Results {
        let loss = || {
            let logits = args[0].to_dtype(DType::F32)?;
            Ok(vec![candle_nn::loss::cross_entropy(&logits, &targets[0])?])
        };
        (self.config == PLAIN && args[0].rank() == 2).then(loss)
    }

    fn terms(&self, exact: &Exact<'_>) -> Result<Vec<f64>> {
        // Differences of probabilities, each with the error of an exponential whose exponent is rounded.
        // Rows that are one row, broadcast, add up their gradients.
        let dlogits = &exact.results[1];
        let cols = dlogits.dims().last().map_or(1, |cols| (*cols).max(1));
        let rows = (dlogits.elem_count() / cols).max(1);
        let row_weight = match self.config.reduction {
            Reduction::Mean => 1. / rows as f64,
            Reduction::Sum => 1.,
        };
        Ok(vec![0., 4. * largest(exact.dy)? * row_weight])
    }

    fn bench_drop_ps(&self) -> &'static [f32] {
        if self.config == PLAIN { &[0.] } else { &[] }
    }

    /// Large ones over the tokens of GPT-2.
    fn bench_size(&self, elements: usize) -> Vec<usize> {
        let classes = if elements > 1 << 20 { 50_257 } else { 1024 };
        vec![(elements / classes).max(1), classes]
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // logits; logits, dlogits.
        Ok([1., 2.])
    }
}
