use candle_core::{DType, Result, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::args::AdamWArgs;
use super::progress::Progress;
use super::{NAME, Step, Update};
use crate::cpu::{Element, Real, vectorized};
use crate::input::Input;
use crate::training::in_place::write;
use crate::training::sums::{Term, sums};

/// Elements that a thread takes at a time: with gradient and moments they stay in its cache.
const CHUNK: usize = 1 << 14;

/// Goes on by a step; nothing if it is to be skipped.
pub(super) fn advance(step: &Step<'_>, progress: &mut Progress) -> Result<Option<AdamWArgs>> {
    let Progress::Host(progress) = progress else {
        bail!(
            "{NAME}: expected the state of variables on the CPU, got that of a GPU; build it of these variables"
        )
    };
    if step.needs_norm {
        let grads: Vec<_> = step.updates.iter().map(|update| &update.grad).collect();
        progress.advance(sums(NAME, &grads, Term::Square)?.into_iter().sum(), &step.rule);
        if progress.skipped == 1. {
            return Ok(None);
        }
    } else {
        progress.next_step(&step.rule);
    }
    Ok(Some(AdamWArgs::new(step.params, progress, (0, 0))))
}

pub(super) fn step(step: &Step<'_>, progress: &mut Progress) -> Result<()> {
    let Some(args) = advance(step, progress)? else { return Ok(()) };
    for update in &step.updates {
        match (update.param.dtype(), update.grad.dtype()) {
            (DType::F32, DType::F32) => of_variable::<f32, f32, f32>(&args, update)?,
            (DType::F64, DType::F64) => of_variable::<f64, f64, f64>(&args, update)?,
            (DType::F16, DType::F16) => of_variable::<f16, f16, f32>(&args, update)?,
            (DType::F16, DType::F32) => of_variable::<f16, f32, f32>(&args, update)?,
            (DType::BF16, DType::BF16) => of_variable::<bf16, bf16, f32>(&args, update)?,
            (DType::BF16, DType::F32) => of_variable::<bf16, f32, f32>(&args, update)?,
            dtypes => bail!(
                "{NAME}: expected a float variable and its gradient, got {dtypes:?}; convert them with to_dtype"
            ),
        }
    }
    Ok(())
}

/// One pass over a variable, its gradient and its moments.
fn of_variable<P, G, R>(args: &AdamWArgs, update: &Update<'_>) -> Result<()>
where
    P: Element<Real = R>,
    G: Element<Real = R>,
    R: Real + Element<Real = R>,
{
    let rule = Rule::<R>::new(args, update);
    let grad = Input::new(NAME, &update.grad);
    let grad = grad.slice::<G>()?;
    write(NAME, update.param, |param| {
        let param = param.elements::<P>()?;
        write(NAME, update.first_moment, |m| {
            let m = m.elements::<R>()?;
            write(NAME, update.second_moment, |v| {
                let v = v.elements::<R>()?;
                match update.master {
                    None => of_chunks(&rule, param, None, m, v, grad),
                    Some(master) => write(NAME, master, |master| {
                        of_chunks(&rule, param, Some(master.elements::<R>()?), m, v, grad)
                    }),
                }
            })
        })
    })
}

fn of_chunks<P, G, R>(
    rule: &Rule<R>,
    param: &mut [P],
    master: Option<&mut [R]>,
    m: &mut [R],
    v: &mut [R],
    grad: &[G],
) -> Result<()>
where
    P: Element<Real = R>,
    G: Element<Real = R>,
    R: Real,
{
    let lens = [param.len(), master.as_ref().map_or(grad.len(), |master| master.len()), m.len()];
    if lens != [grad.len(); 3] || v.len() != grad.len() {
        bail!(
            "{NAME}: expected a gradient, moments and master weights of {} elements, got {lens:?} and {}; \
             build the optimiser of these variables",
            param.len(),
            v.len()
        )
    }
    let mut masters = master.map(|master| master.chunks_mut(CHUNK));
    let moments = m.chunks_mut(CHUNK).zip(v.chunks_mut(CHUNK));
    let chunks = param.chunks_mut(CHUNK).zip(grad.chunks(CHUNK)).zip(moments);
    let chunks: Vec<_> = chunks
        .map(|((param, grad), (m, v))| {
            (param, masters.as_mut().and_then(Iterator::next), grad, m, v)
        })
        .collect();
    let of_chunk = |(param, master, grad, m, v)| match master {
        None => of_weights(rule, param, grad, m, v),
        Some(master) => of_master_weights(rule, param, master, grad, m, v),
    };
    match chunks.len() {
        0 | 1 => chunks.into_iter().for_each(of_chunk),
        _ => chunks.into_par_iter().for_each(of_chunk),
    }
    Ok(())
}

/// The numbers of a step in the type that it is computed in, each rounded once, as candle rounds them.
struct Rule<R> {
    beta1: R,
    beta1_left: R,
    beta2: R,
    beta2_left: R,
    scale_m: R,
    scale_v: R,
    eps: R,
    factor: R,
    lr: R,
    kept: R,
}

impl<R: Real> Rule<R> {
    fn new(args: &AdamWArgs, update: &Update<'_>) -> Self {
        Self {
            beta1: R::from_f64(args.beta1),
            beta1_left: R::from_f64(1. - args.beta1),
            beta2: R::from_f64(args.beta2),
            beta2_left: R::from_f64(1. - args.beta2),
            scale_m: R::from_f64(args.scale_m),
            scale_v: R::from_f64(args.scale_v),
            eps: R::from_f64(args.eps),
            factor: R::from_f64(args.factor),
            lr: R::from_f64(update.lr),
            kept: R::from_f64(update.kept()),
        }
    }

    /// The next weight; in the order of candle's operations, each rounded by itself.
    #[inline(always)]
    fn next(&self, weight: R, grad: R, m: &mut R, v: &mut R) -> R {
        let grad = grad * self.factor;
        *m = *m * self.beta1 + grad * self.beta1_left;
        *v = *v * self.beta2 + grad * grad * self.beta2_left;
        let (m_hat, v_hat) = (*m * self.scale_m, *v * self.scale_v);
        weight * self.kept - m_hat / (v_hat.sqrt() + self.eps) * self.lr
    }
}

vectorized! {
    fn of_weights<P: Element, G: Element<Real = P::Real>>(
        rule: &Rule<P::Real>,
        param: &mut [P],
        grad: &[G],
        m: &mut [P::Real],
        v: &mut [P::Real],
    ) {
        for ((param, grad), (m, v)) in param.iter_mut().zip(grad).zip(m.iter_mut().zip(v)) {
            *param = P::store(rule.next(param.load(), grad.load(), m, v));
        }
    }
}

vectorized! {
    /// The same where the weights that count are `master`, and `param` their rounded copy.
    fn of_master_weights<P: Element, G: Element<Real = P::Real>>(
        rule: &Rule<P::Real>,
        param: &mut [P],
        master: &mut [P::Real],
        grad: &[G],
        m: &mut [P::Real],
        v: &mut [P::Real],
    ) {
        let weights = param.iter_mut().zip(master);
        for (((param, master), grad), (m, v)) in weights.zip(grad).zip(m.iter_mut().zip(v)) {
            *master = rule.next(*master, grad.load(), m, v);
            *param = P::store(*master);
        }
    }
}
