//! What the kernels take by value, and how a step goes on: the one text for the CPU and for the host side of
//! CUDA. Twins of the structs and of `advance` in `kernels/adamw.cu`.

use candle_nn::ParamsAdamW;

use crate::cuda::sizes::{Launch, THREADS};

/// Elements of a variable that a block takes at a time: `CHUNK` of `kernels/adamw.cu`.
pub(super) const CHUNK: u64 = 16_384;

/// Between these the loss scale moves: above, what it gains is none; below, it would vanish.
pub(super) const LOSS_SCALES: [f64; 2] = [1. / (1 << 24) as f64, (1 << 24) as f64];

/// One variable of a launch: where it lies, and what differs between variables.
#[doc(hidden)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AdamWTensor {
    pub param: u64,
    pub grad: u64,
    pub first_moment: u64,
    pub second_moment: u64,
    /// 0 if there is none.
    pub master: u64,
    pub len: u64,
    /// Chunks of the variables before this one.
    pub first_chunk: u64,
    pub lr: f32,
    /// What a step leaves of the weights: `1 - lr * weight_decay`.
    pub kept: f32,
}

impl AdamWTensor {
    /// Chunks of a variable of `len` elements.
    pub fn chunks(len: u64) -> u64 {
        len.div_ceil(CHUNK)
    }
}

/// What all variables of a step share.
#[doc(hidden)]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWArgs {
    tensors: u64,
    chunks: u64,
    pub(super) beta1: f64,
    pub(super) beta2: f64,
    pub(super) eps: f64,
    pub(super) scale_m: f64,
    pub(super) scale_v: f64,
    /// What gradients are multiplied by.
    pub(super) factor: f64,
}

impl AdamWArgs {
    /// Of the step that `progress` has come to; tensors and chunks are those of a launch.
    pub fn new(
        params: &ParamsAdamW,
        progress: &AdamWProgress,
        (tensors, chunks): (usize, u64),
    ) -> Self {
        Self {
            tensors: tensors as u64,
            chunks,
            beta1: params.beta1,
            beta2: params.beta2,
            eps: params.eps,
            scale_m: progress.scale_m,
            scale_v: progress.scale_v,
            factor: progress.factor,
        }
    }

    /// A block takes a chunk, then another.
    pub fn launch(&self, multiprocessors: usize) -> Launch {
        Launch::teams(
            THREADS,
            1,
            usize::try_from(self.chunks).unwrap_or(usize::MAX),
            multiprocessors,
        )
    }

    /// The kernel that adds up the sums of all chunks: one block.
    pub fn launch_total() -> Launch {
        Launch::new([1; 3], [THREADS, 1, 1])
    }
}

/// How a step follows from the one before.
#[doc(hidden)]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWRule {
    pub beta1: f64,
    pub beta2: f64,
    /// Infinite without clipping.
    pub max_norm: f64,
    /// Steps without an overflow after which the loss scale doubles; 0 if it stays 1.
    pub growth_interval: f64,
}

/// Where the optimiser stands: on the CPU a value of the host, on CUDA, where the host is not to wait for
/// a norm, a tensor of as many f64.
#[doc(hidden)]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWProgress {
    /// Of the last gradients, the loss scale taken out, before clipping; `NO_NORM` before the first.
    pub norm: f64,
    pub loss_scale: f64,
    /// Since the scale last changed.
    pub good_steps: f64,
    /// Steps that were not skipped.
    pub step: f64,
    pub factor: f64,
    pub scale_m: f64,
    pub scale_v: f64,
    /// 1 if the last step was skipped.
    pub skipped: f64,
}

impl AdamWProgress {
    pub const LEN: usize = size_of::<Self>() / size_of::<f64>();
    /// Where the loss scale stands among them.
    pub const LOSS_SCALE: usize = std::mem::offset_of!(Self, loss_scale) / size_of::<f64>();

    pub const NO_NORM: f64 = -1.;

    pub fn new(loss_scale: f64) -> Self {
        Self {
            norm: Self::NO_NORM,
            loss_scale,
            good_steps: 0.,
            step: 0.,
            factor: 1.,
            scale_m: 1.,
            scale_v: 1.,
            skipped: 0.,
        }
    }

    pub fn to_array(self) -> [f64; Self::LEN] {
        let Self { norm, loss_scale, good_steps, step, factor, scale_m, scale_v, skipped } = self;
        [norm, loss_scale, good_steps, step, factor, scale_m, scale_v, skipped]
    }

    pub fn from_array(values: [f64; Self::LEN]) -> Self {
        let [norm, loss_scale, good_steps, step, factor, scale_m, scale_v, skipped] = values;
        Self { norm, loss_scale, good_steps, step, factor, scale_m, scale_v, skipped }
    }

    /// Goes on by a step whose gradients, loss scale included, have this sum of squares.
    pub fn advance(&mut self, sum_of_squares: f64, rule: &AdamWRule) {
        let unscaled = 1. / self.loss_scale;
        self.norm = sum_of_squares.sqrt() * unscaled;
        self.skipped = 0.;
        if rule.growth_interval > 0. {
            let finite = sum_of_squares < f64::INFINITY; // and no NaN
            self.good_steps = if finite { self.good_steps + 1. } else { 0. };
            if !finite {
                self.loss_scale = (self.loss_scale * 0.5).max(LOSS_SCALES[0]);
                self.skipped = 1.;
                return;
            }
            if self.good_steps >= rule.growth_interval {
                self.loss_scale = (self.loss_scale * 2.).min(LOSS_SCALES[1]);
                self.good_steps = 0.;
            }
        }
        self.next_step(rule);
        // A norm that is NaN clips nothing: the gradients that are no numbers show where they are.
        let clipped = if self.norm > rule.max_norm { rule.max_norm / self.norm } else { 1. };
        self.factor = unscaled * clipped;
    }

    /// Goes on by a step whose gradients are taken as they are.
    pub fn next_step(&mut self, rule: &AdamWRule) {
        self.step += 1.;
        self.scale_m = 1. / (1. - power(rule.beta1, self.step));
        self.scale_v = 1. / (1. - power(rule.beta2, self.step));
    }
}

/// `base^exponent` by repeated squaring, as `f64::powi` takes it and as the kernels do: their results are
/// equal bit for bit.
fn power(base: f64, exponent: f64) -> f64 {
    let (mut base, mut exponent, mut result) = (base, exponent as u64, 1.);
    loop {
        if exponent % 2 == 1 {
            result *= base;
        }
        exponent /= 2;
        if exponent == 0 {
            return result;
        }
        base *= base;
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::cuda::sizes::limits::*;

    fn args(chunks: u64) -> AdamWArgs {
        AdamWArgs::new(&ParamsAdamW::default(), &AdamWProgress::new(1.), (1, chunks))
    }

    #[test]
    fn grids_are_whole_warps_and_fit() {
        assert_whole_warps(|chunks| args(chunks as u64).launch(MULTIPROCESSORS));
        assert_grid_fits(|rows, cols| {
            args((rows as u64).saturating_mul(cols as u64)).launch(MULTIPROCESSORS)
        });
        assert_whole_warps(|_| AdamWArgs::launch_total());
    }

    #[test]
    fn the_layout_is_that_of_the_kernels() {
        let sizes = [size_of::<AdamWTensor>(), size_of::<AdamWArgs>()];
        assert_eq!(
            [sizes, [size_of::<AdamWRule>(), size_of::<AdamWProgress>()]],
            [[64; 2], [32, 64]]
        );
        let tensor = [
            offset_of!(AdamWTensor, grad),
            offset_of!(AdamWTensor, first_moment),
            offset_of!(AdamWTensor, second_moment),
            offset_of!(AdamWTensor, master),
            offset_of!(AdamWTensor, len),
            offset_of!(AdamWTensor, first_chunk),
            offset_of!(AdamWTensor, lr),
            offset_of!(AdamWTensor, kept),
        ];
        assert_eq!(tensor, [8, 16, 24, 32, 40, 48, 56, 60]);
        let args = [
            offset_of!(AdamWArgs, tensors),
            offset_of!(AdamWArgs, chunks),
            offset_of!(AdamWArgs, beta1),
            offset_of!(AdamWArgs, beta2),
            offset_of!(AdamWArgs, eps),
            offset_of!(AdamWArgs, scale_m),
            offset_of!(AdamWArgs, scale_v),
            offset_of!(AdamWArgs, factor),
        ];
        assert_eq!(args, std::array::from_fn(|i| 8 * i));
        let rule = [
            offset_of!(AdamWRule, beta1),
            offset_of!(AdamWRule, beta2),
            offset_of!(AdamWRule, max_norm),
            offset_of!(AdamWRule, growth_interval),
        ];
        assert_eq!(rule, std::array::from_fn(|i| 8 * i));
        let values: [f64; 8] = std::array::from_fn(|i| i as f64);
        assert_eq!(AdamWProgress::from_array(values).to_array(), values);
    }

    #[test]
    fn powers_are_those_of_powi() {
        for base in [0., 0.5, 0.9, 0.999, 0.9999, 1.] {
            for exponent in (1..5000).chain([65_536, 1_000_003]) {
                let expected = f64::powi(base, exponent);
                assert_eq!(power(base, f64::from(exponent)).to_bits(), expected.to_bits());
            }
        }
    }
}
