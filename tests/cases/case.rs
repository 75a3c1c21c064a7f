//! What tests and benches ask of an op.

use std::fmt::Debug;

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::DropMask;

use crate::tensors::epsilon;

/// An op, which is a module of this crate.
pub struct Op {
    pub name: &'static str,
    pub cases: &'static [&'static dyn Case],
}

/// What a call returns, of which backward begins at the first; nothing if there is no such call.
pub type Results = Option<Result<Vec<Tensor>>>;

/// An op in one of its forms. Its `Debug` is what a failure names.
///
/// A `size` is what all shapes follow from: the shape of x, the first argument, unless the case says otherwise.
pub trait Case: Debug + Sync {
    /// As results call it; no other case has it.
    fn name(&self) -> &'static str;

    /// The shapes of its arguments, those that get a gradient.
    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>>;

    fn takes(&self, _size: &[usize]) -> bool {
        true
    }

    /// This size, or one like it that the case takes.
    fn fitting(&self, size: &[usize]) -> Vec<usize> {
        let mut fitting = size.to_vec();
        if let Some(cols) = fitting.last_mut().filter(|_| !self.takes(size)) {
            *cols += 1;
        }
        fitting
    }

    /// The rates to test it at.
    fn drop_ps(&self) -> &'static [f32] {
        &[0., 0.1, 0.5, 1.]
    }

    /// Sizes that are awkward for this op, beside those that are for any.
    fn awkward(&self) -> &'static [&'static [usize]] {
        &[]
    }

    /// The arguments of tests lie between this and its negative.
    fn largest_argument(&self) -> f64 {
        4.
    }

    /// The shape of its first result.
    fn output(&self, arguments: &[Vec<usize>]) -> Vec<usize> {
        if self.is_loss() { vec![] } else { arguments[0].clone() }
    }

    /// Its result is the mean over the rows of x (their sum where nobody measures it), in f32 even for halves,
    /// and its constants have a row for each.
    fn is_loss(&self) -> bool {
        false
    }

    /// The shape of its mask; nothing for an op that drops nothing.
    fn mask_dims(&self, size: &[usize]) -> Option<Vec<usize>> {
        Some(size.to_vec())
    }

    /// What its formula takes for `keep`: the mask, or numbers that are drawn in its place.
    fn keep(&self, size: &[usize], drop: &DropMask) -> Result<Tensor> {
        match self.mask_dims(size) {
            Some(dims) => drop.to_tensor(dims, &Device::Cpu),
            None => Tensor::ones((), DType::U8, &Device::Cpu),
        }
    }

    /// The mask of the part of x that begins at `start` of a whole of this size.
    fn window(&self, drop: &DropMask, size: &[usize], start: &[usize]) -> DropMask {
        match self.mask_dims(size) {
            Some(full) => drop.window(&full, start),
            None => drop.clone(),
        }
    }

    /// What a program has before it calls the op, such as tables and targets, for x of this dtype.
    fn constants(&self, _size: &[usize], _dtype: DType, _device: &Device) -> Result<Vec<Tensor>> {
        Ok(vec![])
    }

    /// The call of this crate.
    fn fused(&self, args: &[Tensor], constants: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>>;

    /// The same by the naive formula.
    fn formula(
        &self,
        args: &[Tensor],
        constants: &[Tensor],
        keep: &Tensor,
        drop_scale: f64,
    ) -> Result<Vec<Tensor>>;

    /// What a user of candle writes; its draws differ.
    fn chain(&self, _args: &[Tensor], _constants: &[Tensor], _drop_p: f32) -> Results {
        None
    }

    /// The same from smaller ops of this crate, with the same mask.
    fn composed(&self, _args: &[Tensor], _constants: &[Tensor], _drop: &DropMask) -> Results {
        None
    }

    // ---- how exact it is ----

    /// The size of what each result is a sum of, for the output and each gradient: terms may cancel, and it
    /// is they that round.
    fn terms(&self, exact: &Exact<'_>) -> Result<Vec<f64>> {
        Ok(vec![0.; exact.results.len()])
    }

    /// By how much of that, or of the largest element, a result may be off beyond the naive formula.
    fn epsilon(&self, _size: &[usize], dtype: DType) -> f64 {
        epsilon(dtype)
    }

    /// CUDA computes it in this dtype.
    fn is_on_cuda(&self, _size: &[usize], dtype: DType) -> bool {
        dtype != DType::F64
    }

    /// Its results in f32 are the same bits on CUDA as on the CPU, except for these: 0 is the output, `i` the
    /// gradient of the argument before. Nothing if they agree to rounding only.
    fn same_bits_but_for(&self) -> Option<&'static [usize]> {
        None
    }

    // ---- how fast it is ----

    /// The rates to measure it at; none if nobody does.
    fn bench_drop_ps(&self) -> &'static [f32] {
        &[]
    }

    /// The size to measure it at, of about so many elements of x.
    fn bench_size(&self, elements: usize) -> Vec<usize> {
        const COLS: usize = 1024;
        vec![(elements / COLS).max(1), COLS]
    }

    /// What it has to move, forward and backward, in elements of its dtype for each element of x: every
    /// input read once, every output written once, no mask.
    fn moved(&self, _size: &[usize], _drop: &DropMask) -> Result<[f64; 2]> {
        candle_core::bail!("nobody has counted what {self:?} moves")
    }

    /// Floating-point operations forward and backward, of an op that they limit.
    fn flop(&self, _size: &[usize]) -> Option<[f64; 2]> {
        None
    }

    /// A graph with the edges of the op, of which the backward pass is nothing but candle's own bookkeeping:
    /// it passes the gradient on as it is. (A bias or a weight has too few elements to count.) Nothing if
    /// candle has none.
    fn edges(&self, args: &[Tensor]) -> Option<Result<Tensor>> {
        match args {
            _ if self.is_loss() => None,
            [x, y, ..] if x.dims() == y.dims() => Some(x + y),
            [x, ..] => Some(x.reshape(x.shape())),
            [] => None,
        }
    }
}

/// A case in f64: its arguments, what its output is multiplied with for a gradient, its output and the
/// gradients of its arguments (some of the last may be left out).
pub struct Exact<'a> {
    pub args: &'a [Tensor],
    pub dy: &'a Tensor,
    pub results: &'a [Tensor],
    pub drop: &'a DropMask,
}
