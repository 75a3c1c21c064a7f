use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::{MAX_LOGIT, NAME};
use crate::check::rows_cols;
use crate::cpu::{
    Element, Real, filled, filled_with, for_float_dtype, slice_sum, storage, vectorized,
};
use crate::input::Input;
use crate::mask::{MaskArgs, RUN};

pub(super) fn fwd(
    mask: &MaskArgs,
    inverse_temperature: f64,
    x: &Tensor,
    logit_p: &Tensor,
) -> Result<Storage> {
    let (_, cols) = rows_cols(x.dims());
    let [x, logit_p] = [x, logit_p].map(|x| Input::new(NAME, x));
    for_float_dtype!(x, |E| {
        let (x, concrete) =
            (x.slice::<E>()?, Concrete::new(logit_p.reals()?[0], inverse_temperature));
        let part = |start: usize, y: &mut [_]| {
            elements_fwd(mask, &concrete, start, cols, &x[start..][..y.len()], y)
        };
        // SAFETY: `elements_fwd` writes all of `y`.
        let y = unsafe { filled::<E>(x.len(), 1, part) };
        Ok(storage(y))
    })
}

/// The gradients of `x` and of `logit_p`.
pub(super) fn bwd(
    mask: &MaskArgs,
    inverse_temperature: f64,
    x: &Tensor,
    logit_p: &Tensor,
    dy: &Tensor,
) -> Result<(Storage, Storage)> {
    let (_, cols) = rows_cols(x.dims());
    let [x, logit_p, dy] = [x, logit_p, dy].map(|x| Input::new(NAME, x));
    for_float_dtype!(x, |E| {
        type R = <E as Element>::Real;
        let (x, dy) = (x.slice::<E>()?, dy.slice::<E>()?);
        let concrete = Concrete::<R>::new(logit_p.reals()?[0], inverse_temperature);
        let part = |start: usize, dx: &mut [_]| {
            let [x, dy] = [x, dy].map(|x| &x[start..][..dx.len()]);
            elements_bwd(mask, &concrete, start, cols, x, dy, dx)
        };
        // SAFETY: `elements_bwd` writes all of `dx`.
        let (dx, sums) = unsafe { filled_with::<E, f64>(x.len(), 1, part) };
        // In the order of the chunks, whatever threads computed them.
        let dlogit_p = R::from_f64(sums.iter().sum());
        Ok((storage(dx), Storage::Cpu(R::storage(vec![dlogit_p]))))
    })
}

/// What all elements have in common.
struct Concrete<R> {
    logit_p: R,
    p: R,
    inverse_keep_p: R,
    inverse_temperature: R,
}

impl<R: Real> Concrete<R> {
    fn new(logit_p: R, inverse_temperature: f64) -> Self {
        let most = R::from_f64(MAX_LOGIT);
        let logit_p = if logit_p > most { most } else { logit_p };
        let least = R::ZERO - most;
        let logit_p = if logit_p < least { least } else { logit_p };
        let e = (R::ZERO - logit_p.abs()).exp_of_nonpositive();
        let is_positive = logit_p >= R::ZERO;
        Self {
            logit_p,
            p: (if is_positive { R::ONE } else { e }) / (R::ONE + e),
            inverse_keep_p: if is_positive { (R::ONE + e) / e } else { R::ONE + e },
            inverse_temperature: R::from_f64(inverse_temperature),
        }
    }

    /// `(1 - z) / (1 - p)` and `z` at a draw.
    #[inline(always)]
    fn at(&self, draw: u32) -> (R, R) {
        // Neither u nor 1 - u rounds to 0 or 1.
        let half = R::from_f64(0.5);
        let odds = (R::from_u32(draw) + half) / (R::from_u32(!draw) + half);
        let logit_z = (self.logit_p + odds.ln_of_normal()) * self.inverse_temperature;
        let e = (R::ZERO - logit_z.abs()).exp_of_nonpositive();
        let of_abs = (R::ONE + e).recip();
        let is_positive = logit_z >= R::ZERO;
        let keep = if is_positive { e * of_abs } else { of_abs };
        let z = if is_positive { of_abs } else { e * of_abs };
        (keep * self.inverse_keep_p, z)
    }
}

vectorized! {
    /// The elements from `start` on of a tensor with `cols` columns.
    fn elements_fwd<E: Element>(
        mask: &MaskArgs,
        concrete: &Concrete<E::Real>,
        start: usize,
        cols: usize,
        x: &[E],
        y: &mut [MaybeUninit<E>],
    ) {
        let mut runs = mask.wide_runs(start, x.len(), cols);
        while let Some((at, draws)) = runs.next() {
            for ((x, draw), y) in x[at..].iter().zip(draws).zip(&mut y[at..]) {
                let (gain, _) = concrete.at(*draw);
                y.write(E::store(x.load() * gain));
            }
        }
    }
}

vectorized! {
    /// The same of `dx`, and the sum of what these elements give `dlogit_p`.
    fn elements_bwd<E: Element>(
        mask: &MaskArgs,
        concrete: &Concrete<E::Real>,
        start: usize,
        cols: usize,
        x: &[E],
        dy: &[E],
        dx: &mut [MaybeUninit<E>],
    ) -> f64 {
        let (mut terms, mut sum) = ([E::Real::ZERO; RUN], 0.);
        let mut runs = mask.wide_runs(start, x.len(), cols);
        while let Some((at, draws)) = runs.next() {
            let elements = x[at..].iter().zip(&dy[at..]).zip(draws).zip(&mut dx[at..]);
            for ((((x, dy), draw), dx), term) in elements.zip(&mut terms) {
                let (gain, z) = concrete.at(*draw);
                let back = dy.load() * gain;
                dx.write(E::store(back));
                *term = back * x.load() * (concrete.p - z * concrete.inverse_temperature);
            }
            sum += slice_sum(&terms[..draws.len()], |term| term).to_f64();
        }
        sum
    }
}
