//! A batch that lies in a tensor several times, each time with a draw of its own: the passes of Monte-Carlo dropout in
//! one.
//!
//! While a [`Repeating`] guard lives, what a layer asks its generator for is such a mask. An op does what it does for
//! each repetition, with an ordinary mask, and concatenates: see [`DropMask::repeats`].

use std::cell::Cell;
use std::marker::PhantomData;

use candle_core::{Result, Tensor, bail};

use super::{DropMask, MaskKey, Rate, Window};

/// `times` times the same `samples`, one repetition after the other along the first dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Repeated {
    pub(crate) times: usize,
    pub(crate) samples: usize,
    /// The place of the first sample in a whole of which the batch is a part: there its mask begins.
    pub(crate) first: usize,
}

/// Of what a tensor is repeated, for an op that drops.
#[derive(Debug)]
pub(crate) struct Repeats {
    op: &'static str,
    repeated: Repeated,
    rate: Rate,
    key: MaskKey,
    window: Option<Window>,
}

/// One of them.
pub(crate) struct Repeat<'a> {
    of: &'a Repeats,
    at: usize,
    /// The mask of this repetition, like any other.
    pub(crate) drop: DropMask,
}

impl DropMask {
    /// The mask of a batch that is repeated: repetition `t` sees that of `key.draw(t)`.
    pub(crate) fn repeated(self, repeated: Repeated) -> Self {
        Self { repeated: Some(repeated), ..self }
    }

    /// True if a batch is repeated under this mask.
    pub(crate) fn is_repeated(&self) -> bool {
        self.repeated.is_some()
    }

    /// Where a batch is repeated, what an op does instead of its own pass: itself, for each repetition.
    ///
    /// ```text
    /// if let Some(repeats) = drop.repeats(NAME, x.dims(), Some(0))? {
    ///     return repeats.each(|part| dropout(&part.of("x", x)?, &part.drop));
    /// }
    /// ```
    ///
    /// `dims` is the shape of a tensor with the batch in its first dimension, and `of` cuts such tensors; weights and
    /// what else knows no samples go in whole. `batch_dim` is the dimension of the mask that has the samples: nothing
    /// if all samples share one mask.
    pub(crate) fn repeats(
        &self,
        op: &'static str,
        dims: &[usize],
        batch_dim: Option<usize>,
    ) -> Result<Option<Repeats>> {
        let Some(repeated) = self.repeated else {
            return Ok(None);
        };
        if self.window.is_some() {
            bail!(
                "{op}: drop.window: expected none in Monte-Carlo passes, whose samples have windows already, got \
                 one; give the passes the index of the first sample instead"
            )
        }
        let units = repeated.units(op, "x", dims)?;
        let end = repeated.first.checked_add(repeated.samples);
        if end.is_none_or(|end| end.checked_mul(units).is_none()) {
            bail!(
                "{op}: first_sample: expected an index of a data set of fewer than 2^64 rows, got {}; count samples \
                 from 0",
                repeated.first
            )
        }
        let window = batch_dim.map(|dim| Window::From { dim, start: repeated.first * units });
        Ok(Some(Repeats { op, repeated, rate: self.rate, key: self.key, window }))
    }
}

impl Repeated {
    /// How many indices of the first dimension a sample has: some, where a model has flattened `[B, S, C]` to
    /// `[B S, C]`.
    fn units(&self, op: &str, arg: &str, dims: &[usize]) -> Result<usize> {
        let Self { times, samples, .. } = *self;
        match dims.first() {
            Some(len) if len.is_multiple_of(times * samples) => Ok(len / (times * samples)),
            _ => bail!(
                "{op}: {arg}: expected a first dimension that is a multiple of {times} passes of {samples} samples, \
                 got {dims:?}; keep the batch in the first dimension, or call this layer with train = false"
            ),
        }
    }
}

impl Repeats {
    /// How often the batch is there.
    pub(crate) fn times(&self) -> usize {
        self.repeated.times
    }

    /// The results of `f` for each repetition, one after the other along the first dimension.
    pub(crate) fn each<Y: Joined>(&self, f: impl Fn(&Repeat<'_>) -> Result<Y>) -> Result<Y> {
        let of_repetition = |at: usize| {
            let window = self.window.clone();
            let drop =
                DropMask { window, ..DropMask::with_rate(self.rate, self.key.draw(at as u64)) };
            f(&Repeat { of: self, at, drop })
        };
        Y::joined((0..self.repeated.times).map(of_repetition).collect::<Result<_>>()?)
    }
}

impl Repeat<'_> {
    /// The part of this repetition, of a tensor with the batch in its first dimension.
    pub(crate) fn of(&self, arg: &str, x: &Tensor) -> Result<Tensor> {
        let Repeats { op, repeated, .. } = self.of;
        repeated.units(op, arg, x.dims())?;
        let len = x.dim(0)? / repeated.times;
        x.narrow(0, self.at * len, len)
    }

    /// For an op whose result for a sample depends on those beside it: each sample of `x`, a part of this
    /// repetition, alone.
    pub(crate) fn each_sample(
        &self,
        x: &Tensor,
        f: impl Fn(&Tensor, &DropMask) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let of_sample = |at: usize| {
            let window = match &self.drop.window {
                Some(Window::From { dim, start }) => {
                    Some(Window::From { dim: *dim, start: start + at })
                }
                window => window.clone(),
            };
            f(&x.narrow(0, at, 1)?, &DropMask { window, ..self.drop.clone() })
        };
        Tensor::cat(&(0..x.dim(0)?).map(of_sample).collect::<Result<Vec<_>>>()?, 0)
    }

    /// The part of this repetition, of what may be absent.
    pub(crate) fn of_optional(&self, arg: &str, x: Option<&Tensor>) -> Result<Option<Tensor>> {
        x.map(|x| self.of(arg, x)).transpose()
    }

    /// The same of what is broadcast over a tensor of `rank` dimensions, and so may or may not know samples.
    pub(crate) fn of_broadcast(&self, arg: &str, x: &Tensor, rank: usize) -> Result<Tensor> {
        match x.dims() {
            [1, ..] => Ok(x.clone()),
            dims if dims.len() == rank => self.of(arg, x),
            _ => Ok(x.clone()),
        }
    }
}

/// What an op returns.
pub(crate) trait Joined: Sized {
    /// One after the other along the first dimension.
    fn joined(parts: Vec<Self>) -> Result<Self>;
}

impl Joined for Tensor {
    fn joined(parts: Vec<Self>) -> Result<Self> {
        Tensor::cat(&parts, 0)
    }
}

impl Joined for (Tensor, Tensor) {
    fn joined(parts: Vec<Self>) -> Result<Self> {
        let (first, second): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        Ok((Tensor::cat(&first, 0)?, Tensor::cat(&second, 0)?))
    }
}

/// Where the keys of a thread come from while a batch is repeated.
#[derive(Clone, Copy)]
struct Scope {
    seed: u64,
    counter: u64,
    repeated: Repeated,
}

thread_local! {
    static SCOPE: Cell<Option<Scope>> = const { Cell::new(None) };
}

/// Has each site of this thread draw masks for a repeated batch, while the guard lives: the keys of `seed`, from the
/// first on, whatever generator it has. Guards are dropped in the reverse of their order.
pub(crate) fn repeat(seed: u64, repeated: Repeated) -> Repeating {
    let outer = SCOPE.replace(Some(Scope { seed, counter: 0, repeated }));
    Repeating { outer, in_its_thread: PhantomData }
}

/// See [`repeat`].
#[must_use = "masks are those of a repeated batch while this lives"]
pub(crate) struct Repeating {
    outer: Option<Scope>,
    in_its_thread: PhantomData<*const ()>,
}

impl Drop for Repeating {
    fn drop(&mut self) {
        SCOPE.set(self.outer);
    }
}

/// The next mask of a site while a [`Repeating`] lives in this thread.
pub(crate) fn next_repeated(rate: Rate) -> Option<DropMask> {
    let scope = SCOPE.get()?;
    SCOPE.set(Some(Scope { counter: scope.counter + 1, ..scope }));
    let key = MaskKey::derive(scope.seed, scope.counter);
    Some(DropMask::with_rate(rate, key).repeated(scope.repeated))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    const TWICE: Repeated = Repeated { times: 2, samples: 3, first: 5 };

    fn next() -> Option<(MaskKey, Option<Repeated>)> {
        next_repeated(Rate::KEEP_ALL).map(|drop| (drop.key, drop.repeated))
    }

    #[test]
    fn guards_nest_and_stay_in_their_thread() {
        let thrice = Repeated { times: 3, ..TWICE };
        assert_eq!(next(), None);
        {
            let _outer = repeat(7, TWICE);
            assert_eq!(next(), Some((MaskKey::derive(7, 0), Some(TWICE))));
            {
                let _inner = repeat(9, thrice);
                assert_eq!(next(), Some((MaskKey::derive(9, 0), Some(thrice))));
                std::thread::scope(|scope| {
                    scope.spawn(|| assert_eq!(next(), None));
                });
                assert_eq!(next(), Some((MaskKey::derive(9, 1), Some(thrice))));
            }
            assert_eq!(next(), Some((MaskKey::derive(7, 1), Some(TWICE))), "the outer one goes on");
            let panic = std::panic::catch_unwind(|| {
                let _inner = repeat(9, thrice);
                panic!("of a model");
            });
            assert!(panic.is_err());
            assert_eq!(next(), Some((MaskKey::derive(7, 2), Some(TWICE))));
        }
        assert_eq!(next(), None);
    }

    #[test]
    fn the_mask_of_a_repetition_is_that_of_its_draw_from_the_first_sample_on() -> Result<()> {
        let drop = DropMask::new(0.5, MaskKey::new(3))?;
        let keep = |drop: &DropMask, dims: [usize; 2]| {
            drop.to_tensor(&dims, &Device::Cpu)?.to_vec2::<u8>()
        };
        // Two rows a sample.
        let repeated = keep(&drop.clone().repeated(TWICE), [12, 9])?;
        for t in 0..2 {
            let whole = keep(&DropMask::new(0.5, drop.key.draw(t))?, [16, 9])?;
            let t = t as usize;
            assert_eq!(repeated[6 * t..6 * (t + 1)], whole[10..16], "repetition {t}");
        }
        Ok(())
    }

    #[test]
    fn batches_that_lie_otherwise_windows_and_ops_that_do_not_repeat_are_refused() -> Result<()> {
        let drop = DropMask::none().repeated(TWICE);
        let message = |drop: &DropMask, dims: &[usize]| {
            drop.repeats("op", dims, None).err().map(|error| error.to_string()).unwrap_or_default()
        };
        for dims in [&[7, 2][..], &[]] {
            let error = message(&drop, dims);
            let expected = "op: x: expected a first dimension that is a multiple of 2 passes of 3 samples, got";
            assert!(error.starts_with(expected), "{error}");
        }
        let far = DropMask::none().repeated(Repeated { first: usize::MAX / 2, ..TWICE });
        let error = message(&far, &[18, 2]);
        assert!(error.starts_with("op: first_sample: expected an index of a data set"), "{error}");
        let windowed = drop.window(&[6, 2], &[0, 0]);
        assert!(message(&windowed, &[6, 2]).starts_with("op: drop.window: expected none"));
        let error = drop.args("op", &[6, 2]).map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("op: drop: expected the mask of one pass, got"), "{error}");
        let repeats = drop.repeats("op", &[6, 2], None)?.expect("a batch that is repeated");
        let bias = Tensor::zeros(2, DType::F32, &Device::Cpu)?;
        let error = repeats.each(|part| part.of("bias", &bias)).unwrap_err().to_string();
        assert!(error.starts_with("op: bias: expected a first dimension"), "{error}");
        Ok(())
    }
}
