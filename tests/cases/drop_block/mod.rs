//! `drop_block`, with channels that share their blocks and with others.

mod formula;
#[cfg(test)]
mod kernel;

use candle_core::{Result, Tensor};
use candle_dropout::DropMask;
use candle_dropout::functional::{DropBlockConfig, drop_block};

pub use formula::{dropped, formula};

use crate::{Case, Results};

#[derive(Debug)]
struct DropBlock {
    name: &'static str,
    config: DropBlockConfig,
}

const fn config(block_size: usize, couple_channels: bool, fast: bool) -> DropBlockConfig {
    DropBlockConfig { block_size, gamma_scale: 1., couple_channels, scale_by_keep: true, fast }
}

pub const CASES: &[&dyn Case] = &[
    &DropBlock { name: "drop_block", config: config(7, true, true) },
    &DropBlock { name: "drop_block_by_channel", config: config(3, false, true) },
    &DropBlock { name: "drop_block_even", config: config(4, false, true) },
    &DropBlock { name: "drop_block_inside", config: config(3, false, false) },
    &DropBlock { name: "drop_block_inside_even", config: config(2, true, false) },
    &DropBlock {
        name: "drop_block_unscaled",
        config: DropBlockConfig { scale_by_keep: false, ..config(2, true, true) },
    },
];

impl Case for DropBlock {
    fn name(&self) -> &'static str {
        self.name
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        vec![size.to_vec()]
    }

    fn takes(&self, size: &[usize]) -> bool {
        size.len() == 4
    }

    fn fitting(&self, size: &[usize]) -> Vec<usize> {
        let mut fitting = vec![1; 4usize.saturating_sub(size.len())];
        fitting.extend(size);
        fitting
    }

    /// Those of seeds.
    fn drop_ps(&self) -> &'static [f32] {
        &[0., 0.004, 0.1, 0.6, 1.]
    }

    /// Planes of one element, narrower and lower than a block, of whole vectors, several in a chunk, longer than one.
    fn awkward(&self) -> &'static [&'static [usize]] {
        &[
            &[3, 5, 1, 1],
            &[2, 8, 5, 7],
            &[2, 3, 1, 9],
            &[2, 3, 9, 1],
            &[1, 2, 16, 24],
            &[3, 7, 31, 33],
            &[2, 1, 3, 1030],
            &[1, 2, 140, 131],
        ]
    }

    fn mask_dims(&self, size: &[usize]) -> Option<Vec<usize>> {
        let &[n, _, h, w] = size else { return None };
        Some(if self.config.couple_channels { vec![n, h, w] } else { size.to_vec() })
    }

    fn window(&self, drop: &DropMask, size: &[usize], start: &[usize]) -> DropMask {
        if self.config.couple_channels {
            drop.window(&[size[0], size[2], size[3]], &[start[0], 0, 0])
        } else {
            drop.window(size, start)
        }
    }

    fn fused(&self, args: &[Tensor], _: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        Ok(vec![drop_block(&args[0], &self.config, drop)?])
    }

    fn formula(&self, args: &[Tensor], _: &[Tensor], keep: &Tensor, _: f64) -> Result<Vec<Tensor>> {
        Ok(vec![formula(&args[0], &self.config, &keep.to_device(args[0].device())?)?])
    }

    /// With seeds from candle's own dropout; about as a program has it that is written after timm.
    fn chain(&self, args: &[Tensor], _: &[Tensor], drop_p: f32) -> Results {
        let x = &args[0];
        let chain = || {
            let dims = self.mask_dims(x.dims()).unwrap_or_default();
            let keep = Tensor::rand(0f32, 1., dims, x.device())?.ge(f64::from(drop_p))?;
            Ok(vec![formula(x, &self.config, &keep)?])
        };
        (self.name == "drop_block").then(chain)
    }

    fn same_bits_but_for(&self) -> Option<&'static [usize]> {
        Some(&[])
    }

    /// Of seeds: about a tenth of all elements is dropped.
    fn bench_drop_ps(&self) -> &'static [f32] {
        if self.name == "drop_block" { &[0.0026] } else { &[] }
    }

    fn bench_size(&self, elements: usize) -> Vec<usize> {
        vec![(elements / (64 * 56 * 56)).max(1), 64, 56, 56]
    }

    fn moved(&self, _: &[usize], _: &DropMask) -> Result<[f64; 2]> {
        // x, y; dy, dx. Seeds of a plane that 64 channels share count nothing.
        Ok([2., 2.])
    }
}
