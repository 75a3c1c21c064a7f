use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::{Activation, NAME};
use crate::check::rows_cols;
use crate::cpu::{Element, Real, filled, for_float_dtype, optional_slice, storage, vectorized};
use crate::input::Input;
use crate::mask::MaskArgs;

/// A function and its derivative. A type each, so that the loops over them vectorise.
trait Function: Copy {
    fn value<R: Real>(self, u: R) -> R;
    fn slope<R: Real>(self, u: R) -> R;
}

#[derive(Clone, Copy)]
struct GeluTanh;
#[derive(Clone, Copy)]
struct GeluErf;
#[derive(Clone, Copy)]
struct Silu;
#[derive(Clone, Copy)]
struct Relu;

/// `0.5 u (1 + tanh(w)) = u sigmoid(2 w)` with `w = sqrt(2 / pi) (u + 0.044715 u³)`.
impl Function for GeluTanh {
    #[inline(always)]
    fn value<R: Real>(self, u: R) -> R {
        let (linear, cubic) =
            (R::from_f64(1.595_769_121_605_730_8), R::from_f64(0.071_354_816_272_600_25));
        u * (u * (linear + cubic * (u * u))).sigmoid().0
    }
    #[inline(always)]
    fn slope<R: Real>(self, u: R) -> R {
        let (linear, cubic) =
            (R::from_f64(1.595_769_121_605_730_8), R::from_f64(0.071_354_816_272_600_25));
        let (s, slope) = (u * (linear + cubic * (u * u))).sigmoid();
        // Where the sigmoid is flat, the square may be infinite.
        let square = if slope != R::ZERO { u * u } else { R::ZERO };
        s + u * slope * (linear + R::from_f64(3.) * cubic * square)
    }
}

impl Function for GeluErf {
    #[inline(always)]
    fn value<R: Real>(self, u: R) -> R {
        u * u.normal_cdf()
    }
    #[inline(always)]
    fn slope<R: Real>(self, u: R) -> R {
        let density = (R::from_f64(-0.5) * (u * u)).exp_of_nonpositive();
        u.normal_cdf() + u * density * R::from_f64(0.398_942_280_401_432_7)
    }
}

impl Function for Silu {
    #[inline(always)]
    fn value<R: Real>(self, u: R) -> R {
        u * u.sigmoid().0
    }
    #[inline(always)]
    fn slope<R: Real>(self, u: R) -> R {
        let (s, slope) = u.sigmoid();
        s + u * slope
    }
}

/// A NaN stays one.
impl Function for Relu {
    #[inline(always)]
    fn value<R: Real>(self, u: R) -> R {
        if u < R::ZERO { R::ZERO } else { u }
    }
    #[inline(always)]
    fn slope<R: Real>(self, u: R) -> R {
        if u > R::ZERO { R::ONE } else { R::ZERO }
    }
}

/// Runs `$body` with `$f` bound to the function of an activation.
macro_rules! for_function {
    ($activation:expr, |$f:ident| $body:expr) => {
        match $activation {
            Activation::GeluTanh | Activation::GeGlu => {
                let $f = GeluTanh;
                $body
            }
            Activation::GeluErf => {
                let $f = GeluErf;
                $body
            }
            Activation::Silu | Activation::SwiGlu => {
                let $f = Silu;
                $body
            }
            Activation::Relu => {
                let $f = Relu;
                $body
            }
        }
    };
}

pub(super) fn fwd(
    mask: &MaskArgs,
    activation: Activation,
    x: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Storage> {
    let (rows, x_cols) = rows_cols(x.dims());
    let cols = activation.cols(x_cols);
    let (x, bias) = (Input::new(NAME, x), Input::optional(NAME, bias));
    for_float_dtype!(x, |E| {
        let (x, bias) = (x.slice::<E>()?, optional_slice::<E>(&bias)?);
        let part = |start: usize, y: &mut [_]| {
            for_function!(activation, |f| rows_fwd(f, mask, start, cols, x_cols, x, bias, y))
        };
        // SAFETY: chunks are whole rows, and `rows_fwd` writes every row of `y`.
        let y = unsafe { filled::<E>(rows * cols, cols, part) };
        Ok(storage(y))
    })
}

pub(super) fn bwd(
    mask: &MaskArgs,
    activation: Activation,
    x: &Tensor,
    bias: Option<&Tensor>,
    dy: &Tensor,
) -> Result<Storage> {
    let (_, x_cols) = rows_cols(x.dims());
    let cols = activation.cols(x_cols);
    let (x, bias, dy) = (Input::new(NAME, x), Input::optional(NAME, bias), Input::new(NAME, dy));
    for_float_dtype!(x, |E| {
        let (x, dy, bias) = (x.slice::<E>()?, dy.slice::<E>()?, optional_slice::<E>(&bias)?);
        let part = |start: usize, dx: &mut [_]| {
            for_function!(activation, |f| rows_bwd(f, mask, start, cols, x_cols, x, bias, dy, dx))
        };
        // SAFETY: chunks are whole rows, and `rows_bwd` writes every row of `dx`.
        let dx = unsafe { filled::<E>(x.len(), x_cols, part) };
        Ok(storage(dx))
    })
}

/// `u = x + bias`, widened.
#[inline(always)]
fn biased<E: Element>(x: &[E], bias: Option<&[E]>, u: &mut [E::Real]) {
    match bias {
        Some(bias) => {
            for ((u, x), bias) in u.iter_mut().zip(x).zip(bias) {
                *u = x.load() + bias.load();
            }
        }
        None => {
            for (u, x) in u.iter_mut().zip(x) {
                *u = x.load();
            }
        }
    }
}

vectorized! {
    /// The rows of `y` from its element `start` on.
    fn rows_fwd<E: Element, F: Function>(
        f: F,
        mask: &MaskArgs,
        start: usize,
        cols: usize,
        x_cols: usize,
        x: &[E],
        bias: Option<&[E]>,
        y: &mut [MaybeUninit<E>],
    ) {
        let scale = E::Real::from_f32(mask.scale());
        let mut u = vec![E::Real::ZERO; x_cols];
        for (i, y) in y.chunks_exact_mut(cols).enumerate() {
            let row = start / cols + i;
            biased(&x[row * x_cols..][..x_cols], bias, &mut u);
            let (u, gated) = u.split_at_mut(cols);
            for u in u.iter_mut() {
                *u = f.value(*u);
            }
            // Gated forms multiply by the second half.
            for (u, v) in u.iter_mut().zip(gated) {
                *u = *u * *v;
            }
            let mut runs = mask.runs(row * cols, cols, cols);
            while let Some((at, _, draws)) = runs.next() {
                for ((u, draw), y) in u[at..].iter().zip(draws).zip(&mut y[at..]) {
                    let kept = E::store(*u * scale);
                    y.write(if mask.keeps(*draw) { kept } else { E::ZERO });
                }
            }
        }
    }
}

vectorized! {
    /// The rows of `dx` from its element `start` on.
    fn rows_bwd<E: Element, F: Function>(
        f: F,
        mask: &MaskArgs,
        start: usize,
        cols: usize,
        x_cols: usize,
        x: &[E],
        bias: Option<&[E]>,
        dy: &[E],
        dx: &mut [MaybeUninit<E>],
    ) {
        let scale = E::Real::from_f32(mask.scale());
        let (mut u, mut da) = (vec![E::Real::ZERO; x_cols], vec![E::Real::ZERO; cols]);
        for (i, dx) in dx.chunks_exact_mut(x_cols).enumerate() {
            let row = start / x_cols + i;
            biased(&x[row * x_cols..][..x_cols], bias, &mut u);
            let dy = &dy[row * cols..][..cols];
            let mut runs = mask.runs(row * cols, cols, cols);
            while let Some((at, _, draws)) = runs.next() {
                for ((da, draw), dy) in da[at..].iter_mut().zip(draws).zip(&dy[at..]) {
                    let kept = dy.load() * scale;
                    *da = if mask.keeps(*draw) { kept } else { E::Real::ZERO };
                }
            }
            let (u, gated) = u.split_at(cols);
            let (du, dv) = dx.split_at_mut(cols);
            if gated.is_empty() {
                for ((du, u), da) in du.iter_mut().zip(u).zip(&da) {
                    du.write(E::store(selected(*da, f.slope(*u))));
                }
            } else {
                for (((du, u), v), da) in du.iter_mut().zip(u).zip(gated).zip(&da) {
                    du.write(E::store(selected(*da, f.slope(*u) * *v)));
                }
                for ((dv, u), da) in dv.iter_mut().zip(u).zip(&da) {
                    dv.write(E::store(selected(*da, f.value(*u))));
                }
            }
        }
    }
}

/// `da * slope`, and 0 where nothing comes back, whatever the slope: what is dropped vanishes.
#[inline(always)]
fn selected<R: Real>(da: R, slope: R) -> R {
    if da == R::ZERO { R::ZERO } else { da * slope }
}
