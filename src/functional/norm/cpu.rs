use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};

use super::NAME;
use super::args::NormArgs;
use crate::check::rows_cols;
use crate::cpu::{
    ColumnSums, Element, Real, filled, filled_with, for_float_dtype, lane_mean, lane_sum,
    optional_slice, storage, vectorized,
};
use crate::input::Input;

pub(super) fn fwd(
    args: &NormArgs,
    z: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Storage> {
    let (_, cols) = rows_cols(z.dims());
    let (z, weight) = (Input::new(NAME, z), Input::new(NAME, weight));
    let bias = Input::optional(NAME, bias);
    for_float_dtype!(z, |E| {
        let z = z.slice::<E>()?;
        let norm = RowNorm::<E>::new(args, &weight, &bias)?;
        let part = |start: usize, n: &mut [_]| rows_fwd(&norm, cols, &z[start..][..n.len()], n);
        // SAFETY: chunks are whole rows, and `rows_fwd` writes every row of `n`.
        let n = unsafe { filled::<E>(z.len(), cols, part) };
        Ok(storage(n))
    })
}

/// `dz`, `dweight` and `dbias`.
pub(super) fn bwd(
    args: &NormArgs,
    z: &Tensor,
    weight: &Tensor,
    dn: &Tensor,
) -> Result<[Storage; 3]> {
    let (_, cols) = rows_cols(z.dims());
    let [z, weight, dn] = [z, weight, dn].map(|x| Input::new(NAME, x));
    for_float_dtype!(z, |E| {
        let (z, dn) = (z.slice::<E>()?, dn.slice::<E>()?);
        let norm = RowNorm::<E>::new(args, &weight, &None)?;
        let part = |start: usize, dz: &mut [_]| {
            let mut sums = [ColumnSums::new(cols), ColumnSums::new(cols)];
            let (z, dn) = (&z[start..][..dz.len()], &dn[start..][..dz.len()]);
            rows_bwd(&norm, cols, z, dn, dz, &mut sums);
            sums
        };
        // SAFETY: chunks are whole rows, and `rows_bwd` writes every row of `dz`.
        let (dz, partials) = unsafe { filled_with::<E, _>(z.len(), cols, part) };
        // In the order of the chunks, so that the sums do not depend on the threads.
        let (dweight, dbias): (Vec<_>, Vec<_>) =
            partials.into_iter().map(|[dweight, dbias]| (dweight, dbias)).unzip();
        let [dweight, dbias] =
            [dweight, dbias].map(|parts| storage(ColumnSums::of_parts::<E>(cols, parts)));
        Ok([storage(dz), dweight, dbias])
    })
}

/// What every row is normalised with.
pub(in crate::functional) struct RowNorm<'a, E: Element> {
    eps: E::Real,
    removes_mean: bool,
    weight: &'a [E],
    bias: Option<&'a [E]>,
}

impl<'a, E: Element> RowNorm<'a, E> {
    pub(in crate::functional) fn new(
        args: &NormArgs,
        weight: &'a Input<'_>,
        bias: &'a Option<Input<'_>>,
    ) -> Result<Self> {
        Ok(Self {
            eps: E::Real::from_f64(args.eps),
            removes_mean: args.removes_mean,
            weight: weight.slice()?,
            bias: optional_slice(bias)?,
        })
    }

    /// Removes the mean from a row, if this norm does, and returns the reciprocal of its standard
    /// deviation.
    #[inline(always)]
    fn center(&self, v: &mut [E::Real]) -> E::Real {
        let per_col = E::Real::from_f64(1. / v.len() as f64);
        if self.removes_mean {
            // What the mean was rounded by is left in every column, and is the mean of what is left.
            let mean = lane_mean(v);
            v.iter_mut().for_each(|v| *v = *v - mean);
            let rest = lane_sum(v.len(), |j| v[j]) * per_col;
            v.iter_mut().for_each(|v| *v = *v - rest);
        }
        let variance = lane_sum(v.len(), |j| v[j] * v[j]) * per_col;
        (variance + self.eps).sqrt().recip()
    }

    /// Statistics and norm of the row `v`.
    #[inline(always)]
    pub(in crate::functional) fn norm_row(&self, v: &mut [E::Real], n: &mut [MaybeUninit<E>]) {
        let rstd = self.center(v);
        match self.bias {
            Some(bias) => {
                for (((v, weight), bias), n) in v.iter().zip(self.weight).zip(bias).zip(n) {
                    n.write(E::store(*v * rstd * weight.load() + bias.load()));
                }
            }
            None => {
                for ((v, weight), n) in v.iter().zip(self.weight).zip(n) {
                    n.write(E::store(*v * rstd * weight.load()));
                }
            }
        }
    }
}

vectorized! {
    fn rows_fwd<E: Element>(
        norm: &RowNorm<'_, E>,
        cols: usize,
        z: &[E],
        n: &mut [MaybeUninit<E>],
    ) {
        let mut v = vec![E::Real::ZERO; cols];
        for (z, n) in z.chunks_exact(cols).zip(n.chunks_exact_mut(cols)) {
            v.iter_mut().zip(z).for_each(|(v, z)| *v = z.load());
            norm.norm_row(&mut v, n);
        }
    }
}

vectorized! {
    /// Adds the gradients of weight and bias to `sums`.
    fn rows_bwd<E: Element>(
        norm: &RowNorm<'_, E>,
        cols: usize,
        z: &[E],
        dn: &[E],
        dz: &mut [MaybeUninit<E>],
        sums: &mut [ColumnSums<E::Real>; 2],
    ) {
        let per_col = E::Real::from_f64(1. / cols as f64);
        let weight = &norm.weight[..cols];
        let (mut h, mut g) = (vec![E::Real::ZERO; cols], vec![E::Real::ZERO; cols]);
        let rows = z.chunks_exact(cols).zip(dn.chunks_exact(cols));
        for ((z, dn), dz) in rows.zip(dz.chunks_exact_mut(cols)) {
            // Step 1: the statistics, as forward took them, and h = (z - mean) * rstd.
            h.iter_mut().zip(z).for_each(|(h, z)| *h = z.load());
            let rstd = norm.center(&mut h);
            // Step 2: the sums over rows, and g = dn * weight.
            let [dweight, dbias] = sums.each_mut().map(|sums| &mut sums.row()[..cols]);
            for j in 0..cols {
                let d = dn[j].load();
                h[j] = h[j] * rstd;
                g[j] = d * weight[j].load();
                dweight[j] += d * h[j];
                dbias[j] += d;
            }
            sums.iter_mut().for_each(ColumnSums::end_row);
            // Step 3: the mean of g goes, and is no part of that of g h.
            let mut rest = E::Real::ZERO;
            if norm.removes_mean {
                let mean_g = lane_mean(&g);
                g.iter_mut().for_each(|g| *g = *g - mean_g);
                rest = lane_sum(cols, |j| g[j]) * per_col;
            }
            let mean_gh = lane_sum(cols, |j| g[j] * h[j]) * per_col;
            // Step 4: the gradient.
            for ((g, h), dz) in g.iter().zip(&h).zip(dz) {
                dz.write(E::store((*g - rest - *h * mean_gh) * rstd));
            }
        }
    }
}
