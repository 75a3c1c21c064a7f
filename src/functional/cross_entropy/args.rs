use crate::cuda::sizes::{Launch, THREADS, whole_rows};

/// What becomes of the losses of the rows that count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Their mean.
    #[default]
    Mean,
    /// Their sum. Sums over micro-batches, each divided by the
    /// [`counted_targets`](crate::functional::counted_targets) of all of them, weigh every token alike; a mean of
    /// means weighs those of small micro-batches more.
    Sum,
}

/// How [`cross_entropy`](crate::functional::cross_entropy()) takes its targets, and what it makes of the rows.
#[derive(Clone, Debug, PartialEq)]
pub struct CrossEntropyConfig {
    /// The part `eps` of each target that is spread evenly over all classes, 0 to 1.
    pub label_smoothing: f64,
    /// Rows with this target count nothing, in the mean and in the gradient. Any number: a class, or
    /// one that no class has, like the -100 of i64 targets or `i64::from(u32::MAX)` for u32 ones.
    pub ignore_index: Option<i64>,
    /// Mean or sum over the rows that count.
    pub reduction: Reduction,
    /// The factor `z` of `lse²`, which is added to the loss of each row and keeps logits from drifting away from 0;
    /// 0 for none, 1e-4 in PaLM.
    pub z_loss: f64,
}

impl Default for CrossEntropyConfig {
    /// The mean without smoothing or z-loss, and -100 is ignored: PyTorch's defaults.
    fn default() -> Self {
        Self {
            label_smoothing: 0.,
            ignore_index: Some(-100),
            reduction: Reduction::Mean,
            z_loss: 0.,
        }
    }
}

/// Sizes and settings of the loss: the argument of the kernels. Twin of `struct CrossEntropyArgs` in
/// `kernels/cross_entropy.cu`.
#[doc(hidden)]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropyArgs {
    pub(crate) rows: u64,
    pub(crate) classes: u64,
    /// What every class gets of the target distribution: `label_smoothing / classes`.
    pub(crate) uniform: f64,
    /// What the target gets beyond that: `1 - label_smoothing`.
    pub(crate) peak: f64,
    pub(crate) z_loss: f64,
    ignore_index: i64,
    /// 1 if there is an `ignore_index`.
    ignores: u32,
    /// 1 for the mean of the rows that count, 0 for their sum.
    averages: u32,
}

impl CrossEntropyArgs {
    pub fn new(rows: usize, classes: usize, config: &CrossEntropyConfig) -> Self {
        Self {
            rows: rows as u64,
            classes: classes as u64,
            uniform: config.label_smoothing / classes.max(1) as f64,
            peak: 1. - config.label_smoothing,
            z_loss: config.z_loss,
            ignore_index: config.ignore_index.unwrap_or(0),
            ignores: u32::from(config.ignore_index.is_some()),
            averages: u32::from(config.reduction == Reduction::Mean),
        }
    }

    /// A team takes a row, of any length, and reads it once.
    pub fn launch(&self, multiprocessors: usize) -> Launch {
        whole_rows(self.rows as usize, self.classes as usize, multiprocessors)
    }

    /// The second kernel of forward: one block adds up the losses of all rows.
    pub fn launch_total() -> Launch {
        Launch::new([1; 3], [THREADS, 1, 1])
    }

    /// True if a row with this target counts nothing.
    #[inline(always)]
    pub(crate) fn ignores(&self, target: i64) -> bool {
        self.ignores == 1 && target == self.ignore_index
    }

    /// The target that counts nothing, if there is one.
    pub(super) fn ignored(&self) -> Option<i64> {
        (self.ignores == 1).then_some(self.ignore_index)
    }

    pub(super) fn averages(&self) -> bool {
        self.averages == 1
    }

    /// What the loss of each of `count` rows counts; that of none is 0 either way.
    pub(crate) fn row_weight(&self, count: usize) -> f64 {
        if self.averages == 1 { 1. / count.max(1) as f64 } else { 1. }
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::cuda::sizes::limits::*;

    #[test]
    fn grids_are_whole_warps_and_fit() {
        let launch = |rows, classes| {
            let args = CrossEntropyArgs::new(rows, classes, &CrossEntropyConfig::default());
            args.launch(MULTIPROCESSORS)
        };
        assert_whole_warps(|classes| launch(7, classes));
        assert_grid_fits(launch);
        assert_whole_warps(|_| CrossEntropyArgs::launch_total());
    }

    #[test]
    fn the_layout_is_that_of_the_kernels() {
        assert_eq!(size_of::<CrossEntropyArgs>(), 56);
        let sizes = [offset_of!(CrossEntropyArgs, rows), offset_of!(CrossEntropyArgs, classes)];
        let parts = [offset_of!(CrossEntropyArgs, uniform), offset_of!(CrossEntropyArgs, peak)];
        let ignored =
            [offset_of!(CrossEntropyArgs, ignore_index), offset_of!(CrossEntropyArgs, ignores)];
        let others = [offset_of!(CrossEntropyArgs, z_loss), offset_of!(CrossEntropyArgs, averages)];
        assert_eq!([sizes, parts, ignored, others], [[0, 8], [16, 24], [40, 48], [32, 52]]);
    }
}
