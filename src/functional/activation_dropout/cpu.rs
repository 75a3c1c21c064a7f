use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::rows::Rows;
use super::{Activation, NAME};
use crate::cpu::{
    Element, Real, filled, filled_pair, for_float_dtype, optional_slice, storage, vectorized,
};
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
#[derive(Clone, Copy)]
struct QuickGelu;
#[derive(Clone, Copy)]
struct Relu2;
#[derive(Clone, Copy)]
struct Tanh;
#[derive(Clone, Copy)]
struct Sigmoid;

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

impl Function for QuickGelu {
    #[inline(always)]
    fn value<R: Real>(self, u: R) -> R {
        u * (R::from_f64(1.702) * u).sigmoid().0
    }
    #[inline(always)]
    fn slope<R: Real>(self, u: R) -> R {
        let (s, slope) = (R::from_f64(1.702) * u).sigmoid();
        s + u * (R::from_f64(1.702) * slope)
    }
}

impl Function for Relu2 {
    #[inline(always)]
    fn value<R: Real>(self, u: R) -> R {
        Relu.value(u) * Relu.value(u)
    }
    #[inline(always)]
    fn slope<R: Real>(self, u: R) -> R {
        R::from_f64(2.) * Relu.value(u)
    }
}

impl Function for Tanh {
    #[inline(always)]
    fn value<R: Real>(self, u: R) -> R {
        u.tanh()
    }
    /// Without the cancellation of `1 - tanh²`.
    #[inline(always)]
    fn slope<R: Real>(self, u: R) -> R {
        R::from_f64(4.) * (R::from_f64(2.) * u).sigmoid().1
    }
}

impl Function for Sigmoid {
    #[inline(always)]
    fn value<R: Real>(self, u: R) -> R {
        u.sigmoid().0
    }
    #[inline(always)]
    fn slope<R: Real>(self, u: R) -> R {
        u.sigmoid().1
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
            Activation::GeluErf | Activation::GeGluErf => {
                let $f = GeluErf;
                $body
            }
            Activation::Silu | Activation::SwiGlu => {
                let $f = Silu;
                $body
            }
            Activation::Relu | Activation::ReGlu => {
                let $f = Relu;
                $body
            }
            Activation::QuickGelu | Activation::QuickGeGlu => {
                let $f = QuickGelu;
                $body
            }
            Activation::Relu2 | Activation::Relu2Glu => {
                let $f = Relu2;
                $body
            }
            Activation::Tanh | Activation::TanhGlu => {
                let $f = Tanh;
                $body
            }
            Activation::Sigmoid | Activation::Glu => {
                let $f = Sigmoid;
                $body
            }
        }
    };
}

pub(super) fn fwd(mask: &MaskArgs, activation: Activation, of: &Rows) -> Result<Storage> {
    let [rows, cols, x_cols] = of.sizes(activation);
    let [up, bias] = [&of.up, &of.bias].map(|x| Input::optional(NAME, x.as_ref()));
    let x = Input::new(NAME, &of.x);
    for_float_dtype!(x, |E| {
        let slices = Slices::<E>::new(&x, &up, &bias, of.stride, [cols, x_cols])?;
        let part = |start: usize, y: &mut [_]| {
            for_function!(activation, |f| rows_fwd(f, mask, start / cols, &slices, y))
        };
        // SAFETY: chunks are whole rows, and `rows_fwd` writes every row of `y`.
        let y = unsafe { filled::<E>(rows * cols, cols, part) };
        Ok(storage(y))
    })
}

/// The gradient of `x` and that of `up`.
pub(super) fn bwd(
    mask: &MaskArgs,
    activation: Activation,
    of: &Rows,
    dy: &Tensor,
) -> Result<(Storage, Option<Storage>)> {
    let [rows, cols, x_cols] = of.sizes(activation);
    let [up, bias] = [&of.up, &of.bias].map(|x| Input::optional(NAME, x.as_ref()));
    let [x, dy] = [&of.x, dy].map(|x| Input::new(NAME, x));
    for_float_dtype!(x, |E| {
        let slices = Slices::<E>::new(&x, &up, &bias, of.stride, [cols, x_cols])?;
        let dy = dy.slice::<E>()?;
        let part = |start: usize, dx: &mut [_], dup: &mut [_]| {
            let first = start / x_cols;
            for_function!(activation, |f| rows_bwd(f, mask, first, &slices, dy, dx, dup))
        };
        if up.is_some() {
            // SAFETY: chunks are whole rows, and `rows_bwd` writes every row of `dx` and `dup`.
            let (dx, dup) = unsafe { filled_pair::<E>(rows * x_cols, x_cols, part) };
            return Ok((storage(dx), Some(storage(dup))));
        }
        let part = |start: usize, dx: &mut [_]| part(start, dx, &mut []);
        // SAFETY: chunks are whole rows, and `rows_bwd` writes every row of `dx`.
        let dx = unsafe { filled::<E>(rows * x_cols, x_cols, part) };
        Ok((storage(dx), None))
    })
}

/// The elements of [`Rows`].
struct Slices<'a, E> {
    x: &'a [E],
    up: Option<&'a [E]>,
    bias: Option<&'a [E]>,
    stride: usize,
    cols: usize,
    x_cols: usize,
}

impl<'a, E: Element> Slices<'a, E> {
    fn new(
        x: &'a Input<'_>,
        up: &'a Option<Input<'_>>,
        bias: &'a Option<Input<'_>>,
        stride: usize,
        [cols, x_cols]: [usize; 2],
    ) -> Result<Self> {
        let up = up.as_ref().map(Input::strided_slice).transpose()?;
        let (x, bias) = (x.strided_slice()?, optional_slice(bias)?);
        Ok(Self { x, up, bias, stride, cols, x_cols })
    }

    /// The input of the function in a row and, of a gated form, the values that it scales, biased and widened.
    #[inline(always)]
    fn load(&self, row: usize, u: &mut [E::Real], v: &mut [E::Real]) {
        let (x, cols) = (&self.x[row * self.stride..][..self.x_cols], self.cols);
        biased(&x[..cols], self.bias.map(|bias| &bias[..cols]), u);
        match self.up {
            Some(up) => biased(&up[row * self.stride..][..cols], None, v),
            None => biased(&x[cols..], self.bias.map(|bias| &bias[cols..]), v),
        }
    }

    /// Room for `u` and `v` of a row.
    fn room(&self) -> (Vec<E::Real>, Vec<E::Real>) {
        let gated = if self.up.is_some() { self.cols } else { self.x_cols - self.cols };
        (vec![E::Real::ZERO; self.cols], vec![E::Real::ZERO; gated])
    }
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
    /// The rows of `y` from row `first` on.
    fn rows_fwd<E: Element, F: Function>(
        f: F,
        mask: &MaskArgs,
        first: usize,
        of: &Slices<'_, E>,
        y: &mut [MaybeUninit<E>],
    ) {
        let (scale, cols) = (E::Real::from_f32(mask.scale()), of.cols);
        let (mut u, mut v) = of.room();
        for (i, y) in y.chunks_exact_mut(cols).enumerate() {
            let row = first + i;
            of.load(row, &mut u, &mut v);
            for u in u.iter_mut() {
                *u = f.value(*u);
            }
            // Gated forms multiply by the values, of which others have none.
            for (u, v) in u.iter_mut().zip(&v) {
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
    /// The rows of `dx` from row `first` on, and those of `dup` where it is apart.
    fn rows_bwd<E: Element, F: Function>(
        f: F,
        mask: &MaskArgs,
        first: usize,
        of: &Slices<'_, E>,
        dy: &[E],
        dx: &mut [MaybeUninit<E>],
        dup: &mut [MaybeUninit<E>],
    ) {
        let (scale, cols) = (E::Real::from_f32(mask.scale()), of.cols);
        let (mut u, mut v) = of.room();
        let mut da = vec![E::Real::ZERO; cols];
        let mut dup = dup.chunks_exact_mut(cols);
        for (i, dx) in dx.chunks_exact_mut(of.x_cols).enumerate() {
            let row = first + i;
            of.load(row, &mut u, &mut v);
            let dy = &dy[row * cols..][..cols];
            let mut runs = mask.runs(row * cols, cols, cols);
            while let Some((at, _, draws)) = runs.next() {
                for ((da, draw), dy) in da[at..].iter_mut().zip(draws).zip(&dy[at..]) {
                    let kept = dy.load() * scale;
                    *da = if mask.keeps(*draw) { kept } else { E::Real::ZERO };
                }
            }
            let (du, dv) = match dup.next() {
                Some(dup) => (dx, dup),
                None => dx.split_at_mut(cols),
            };
            if v.is_empty() {
                for ((du, u), da) in du.iter_mut().zip(&u).zip(&da) {
                    du.write(E::store(selected(*da, f.slope(*u))));
                }
            } else {
                for (((du, u), v), da) in du.iter_mut().zip(&u).zip(&v).zip(&da) {
                    du.write(E::store(selected(*da, f.slope(*u) * *v)));
                }
                for ((dv, u), da) in dv.iter_mut().zip(&u).zip(&da) {
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
