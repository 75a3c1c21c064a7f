use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::{NAME, RopeArgs};
use crate::cpu::{Element, Real, filled, for_float_dtype, storage, vectorized};
use crate::input::Input;

pub(super) fn fwd(args: &RopeArgs, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Storage> {
    let (size, len) = (2 * args.half as usize, x.elem_count());
    let [x, cos, sin] = [x, cos, sin].map(|x| Input::new(NAME, x));
    for_float_dtype!(x, |E| {
        let (x, cos, sin) = (x.strided_slice::<E>()?, cos.reals()?, sin.reals()?);
        let part = |start: usize, y: &mut [_]| rotate_rows(args, start, x, cos, sin, y);
        // SAFETY: chunks are whole rows, and `rotate_rows` writes every row of `y`.
        let y = unsafe { filled::<E>(len, size, part) };
        Ok(storage(y))
    })
}

vectorized! {
    /// The rows from element `start` of y on.
    fn rotate_rows<E: Element>(
        args: &RopeArgs,
        start: usize,
        x: &[E],
        cos: &[E::Real],
        sin: &[E::Real],
        y: &mut [MaybeUninit<E>],
    ) {
        let half = args.half as usize;
        let sign = E::Real::from_f32(args.sin_sign);
        let mut coordinates = args.coordinates(start / (2 * half));
        for y in y.chunks_exact_mut(2 * half) {
            let (x_at, table_at) = args.offsets(coordinates);
            coordinates = args.following(coordinates);
            let x = &x[x_at..][..2 * half];
            let angles = cos[table_at..][..half].iter().zip(&sin[table_at..][..half]);
            if args.interleaved == 1 {
                let pairs = x.chunks_exact(2).zip(y.chunks_exact_mut(2));
                for ((x, y), (cos, sin)) in pairs.zip(angles) {
                    let (x1, x2, sin) = (x[0].load(), x[1].load(), *sin * sign);
                    y[0].write(E::store(x1 * *cos - x2 * sin));
                    y[1].write(E::store(x1 * sin + x2 * *cos));
                }
            } else {
                let (x, y) = (x.split_at(half), y.split_at_mut(half));
                let pairs = x.0.iter().zip(x.1).zip(y.0.iter_mut().zip(y.1));
                for (((x1, x2), (y1, y2)), (cos, sin)) in pairs.zip(angles) {
                    let (x1, x2, sin) = (x1.load(), x2.load(), *sin * sign);
                    y1.write(E::store(x1 * *cos - x2 * sin));
                    y2.write(E::store(x1 * sin + x2 * *cos));
                }
            }
        }
    }
}
