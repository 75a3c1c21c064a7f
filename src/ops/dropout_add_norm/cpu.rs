use std::mem::MaybeUninit;

use candle_core::{CpuStorage, Layout, Result};

use super::NAME;
use super::norm::NormArgs;
use crate::elem::{Element, Real, for_float_dtype, rows_cols, slice, storage};
use crate::lanes::lane_sum;
use crate::mask::MaskArgs;
use crate::parallel::{filled, filled_pair, filled_with};
use crate::simd::vectorized;

type Input<'a> = (&'a CpuStorage, &'a Layout);

/// `z` and `n`.
pub(super) fn fwd(
    mask: &MaskArgs,
    args: &NormArgs,
    (x, layout): Input,
    residual: Option<Input>,
    bias: Option<Input>,
    weight: Input,
    norm_bias: Option<Input>,
) -> Result<(CpuStorage, CpuStorage)> {
    let (_, cols) = rows_cols(layout.dims());
    for_float_dtype!(NAME, x, |E| {
        let x = slice::<E>(NAME, x, layout)?;
        let (residual, bias) = (optional_slice::<E>(residual)?, optional_slice::<E>(bias)?);
        let norm = RowNorm::<E>::new(args, weight, norm_bias)?;
        // SAFETY: chunks are whole rows, and `rows_fwd` writes every row of `z` and `n`.
        let (z, n) = unsafe {
            filled_pair(x.len(), cols, |start, z, n| {
                let x = &x[start..][..z.len()];
                let residual = residual.map(|residual| &residual[start..][..z.len()]);
                rows_fwd(mask, &norm, start, cols, x, residual, bias, z, n)
            })
        };
        Ok((storage(z), storage(n)))
    })
}

/// `n` alone, of a finished `z`.
pub(super) fn norm(
    args: &NormArgs,
    (z, layout): Input,
    weight: Input,
    bias: Option<Input>,
) -> Result<CpuStorage> {
    let (_, cols) = rows_cols(layout.dims());
    for_float_dtype!(NAME, z, |E| {
        let z = slice::<E>(NAME, z, layout)?;
        let norm = RowNorm::<E>::new(args, weight, bias)?;
        // SAFETY: chunks are whole rows, and `norm_rows` writes every row of `n`.
        let n = unsafe {
            filled(z.len(), cols, |start, n| norm_rows(&norm, cols, &z[start..][..n.len()], n))
        };
        Ok(storage(n))
    })
}

/// `dz`, `dweight` and `dbias`.
pub(super) fn bwd(
    args: &NormArgs,
    (z, layout): Input,
    weight: Input,
    (dn, dn_layout): Input,
) -> Result<[CpuStorage; 3]> {
    let (_, cols) = rows_cols(layout.dims());
    for_float_dtype!(NAME, z, |E| {
        let z = slice::<E>(NAME, z, layout)?;
        let dn = slice::<E>(NAME, dn, dn_layout)?;
        let norm = RowNorm::<E>::new(args, weight, None)?;
        // SAFETY: chunks are whole rows, and `rows_bwd` writes every row of `dz`.
        let (dz, partials) = unsafe {
            filled_with(z.len(), cols, |start, dz| {
                let (z, dn) = (&z[start..][..dz.len()], &dn[start..][..dz.len()]);
                let mut sums = zero_sums::<E>(cols);
                rows_bwd(&norm, cols, z, dn, dz, &mut sums);
                sums
            })
        };
        // In the order of the chunks, so that the sums do not depend on the threads.
        let mut totals = zero_sums::<E>(cols);
        for sums in &partials {
            for (total, partial) in totals.iter_mut().flatten().zip(sums.iter().flatten()) {
                *total += *partial;
            }
        }
        let [dweight, dbias] =
            totals.map(|sums| storage(sums.into_iter().map(E::store).collect::<Vec<_>>()));
        Ok([storage(dz), dweight, dbias])
    })
}

/// Of weight and bias.
fn zero_sums<E: Element>(cols: usize) -> [Vec<E::Real>; 2] {
    [vec![E::Real::ZERO; cols], vec![E::Real::ZERO; cols]]
}

fn optional_slice<'a, E: Element>(tensor: Option<Input<'a>>) -> Result<Option<&'a [E]>> {
    tensor.map(|(storage, layout)| slice::<E>(NAME, storage, layout)).transpose()
}

/// What every row is normalised with.
struct RowNorm<'a, E: Element> {
    eps: E::Real,
    removes_mean: bool,
    weight: &'a [E],
    bias: Option<&'a [E]>,
}

impl<'a, E: Element> RowNorm<'a, E> {
    fn new(args: &NormArgs, (weight, layout): Input<'a>, bias: Option<Input<'a>>) -> Result<Self> {
        Ok(Self {
            eps: E::Real::from_f64(args.eps),
            removes_mean: args.removes_mean,
            weight: slice::<E>(NAME, weight, layout)?,
            bias: optional_slice::<E>(bias)?,
        })
    }

    /// Removes the mean from a row, if this norm does, and returns the reciprocal of its standard
    /// deviation.
    #[inline(always)]
    fn center(&self, v: &mut [E::Real]) -> E::Real {
        let per_col = E::Real::from_f64(1. / v.len() as f64);
        if self.removes_mean {
            let mean = lane_sum(v.len(), |j| v[j]) * per_col;
            for v in v.iter_mut() {
                *v = *v - mean;
            }
        }
        let variance = lane_sum(v.len(), |j| v[j] * v[j]) * per_col;
        (variance + self.eps).sqrt().recip()
    }

    /// Step 3: statistics and norm of the row `v`.
    #[inline(always)]
    fn norm_row(&self, v: &mut [E::Real], n: &mut [MaybeUninit<E>]) {
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
    /// The rows from element `start` on.
    fn rows_fwd<E: Element>(
        mask: &MaskArgs,
        norm: &RowNorm<'_, E>,
        start: usize,
        cols: usize,
        x: &[E],
        residual: Option<&[E]>,
        bias: Option<&[E]>,
        z: &mut [MaybeUninit<E>],
        n: &mut [MaybeUninit<E>],
    ) {
        let scale = E::Real::from_f32(mask.scale());
        let mut v = vec![E::Real::ZERO; cols];
        for (i, (z, n)) in z.chunks_exact_mut(cols).zip(n.chunks_exact_mut(cols)).enumerate() {
            // Step 1: the biased branch.
            let x = &x[i * cols..][..cols];
            match bias {
                Some(bias) => {
                    for ((v, x), bias) in v.iter_mut().zip(x).zip(bias) {
                        *v = x.load() + bias.load();
                    }
                }
                None => v.iter_mut().zip(x).for_each(|(v, x)| *v = x.load()),
            }
            // Step 2: its dropout, added to the stream and rounded as it is stored.
            let residual = residual.map(|residual| &residual[i * cols..][..cols]);
            let mut runs = mask.runs(start + i * cols, cols, cols);
            while let Some((at, _, draws)) = runs.next() {
                let run = v[at..].iter_mut().zip(draws).zip(&mut z[at..]);
                match residual {
                    Some(residual) => {
                        for (((v, draw), z), residual) in run.zip(&residual[at..]) {
                            let kept = E::store(residual.load() + *v * scale);
                            let stream = if mask.keeps(*draw) { kept } else { *residual };
                            z.write(stream);
                            *v = stream.load();
                        }
                    }
                    None => {
                        for ((v, draw), z) in run {
                            let kept = E::store(*v * scale);
                            let stream = if mask.keeps(*draw) { kept } else { E::ZERO };
                            z.write(stream);
                            *v = stream.load();
                        }
                    }
                }
            }
            norm.norm_row(&mut v, n);
        }
    }
}

vectorized! {
    fn norm_rows<E: Element>(
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
        sums: &mut [Vec<E::Real>; 2],
    ) {
        let per_col = E::Real::from_f64(1. / cols as f64);
        let [dweight, dbias] = sums;
        let (dweight, dbias) = (&mut dweight[..cols], &mut dbias[..cols]);
        let weight = &norm.weight[..cols];
        let (mut h, mut g) = (vec![E::Real::ZERO; cols], vec![E::Real::ZERO; cols]);
        let rows = z.chunks_exact(cols).zip(dn.chunks_exact(cols));
        for ((z, dn), dz) in rows.zip(dz.chunks_exact_mut(cols)) {
            // Step 1: the statistics, as forward took them, and h = (z - mean) * rstd.
            h.iter_mut().zip(z).for_each(|(h, z)| *h = z.load());
            let rstd = norm.center(&mut h);
            // Step 2: the sums over rows, and g = dn * weight.
            for j in 0..cols {
                let d = dn[j].load();
                h[j] = h[j] * rstd;
                g[j] = d * weight[j].load();
                dweight[j] += d * h[j];
                dbias[j] += d;
            }
            // Step 3: the sums over columns.
            let mean_g = match norm.removes_mean {
                true => lane_sum(cols, |j| g[j]) * per_col,
                false => E::Real::ZERO,
            };
            let mean_gh = lane_sum(cols, |j| g[j] * h[j]) * per_col;
            // Step 4: the gradient.
            for ((g, h), dz) in g.iter().zip(&h).zip(dz) {
                dz.write(E::store((*g - mean_g - *h * mean_gh) * rstd));
            }
        }
    }
}
