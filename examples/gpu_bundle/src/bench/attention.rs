//! Attention in one op against its scores materialised around `softmax_dropout`: time, TFLOP/s, what dropout
//! costs, and the most memory that a step takes beyond its arguments.
//!
//! FLOPs count the two products of the forward pass over the visible scores, `4 B H Sq Sk D`, half of it
//! where causal, and two and a half times as much again for the five products of the backward pass.

use std::fmt::Write;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_dropout::DropMask;
use cases::{Case, drop_scale, mask};

use super::markdown::percent_longer;
use crate::memory::{forget_peak, used_and_peak};
use crate::results::Record;
use crate::timing::Timer;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Fused,
    Materialised,
}

impl Form {
    fn variant(self) -> &'static str {
        match self {
            Self::Fused => "fused",
            Self::Materialised => "materialised",
        }
    }
}

/// `[B, H, S, D]`: heads of 64 and 128 columns, 16k tokens in all on CUDA.
fn shapes(device: &Device, small: bool) -> Vec<[usize; 4]> {
    match (small, device.is_cuda()) {
        (true, _) => vec![[1, 2, 64, 64]],
        (false, true) => [512, 2048, 4096, 16_384]
            .into_iter()
            .flat_map(|s| [[16_384 / s, 32, s, 64], [16_384 / s, 16, s, 128]])
            .collect(),
        (false, false) => vec![
            [2, 8, 512, 64],
            [2, 4, 512, 128],
            [1, 8, 1024, 64],
            [1, 4, 2048, 64],
            [1, 2, 2048, 128],
            [1, 2, 4096, 64],
        ],
    }
}

/// A tensor of scores has fewer bytes than this: candle's element-wise kernels count in 32 bits.
const TOO_MANY_SCORES: usize = 8 << 30;

/// What [`measure_all`] takes.
pub fn cases(dtypes: Option<Vec<DType>>, device: &Device, small: bool) -> Vec<(DType, [usize; 4])> {
    let default =
        || if device.is_cuda() { vec![DType::BF16, DType::F16] } else { vec![DType::F32] };
    let dtypes = dtypes.unwrap_or_else(default).into_iter();
    dtypes
        .flat_map(|dtype| shapes(device, small).into_iter().map(move |dims| (dtype, dims)))
        .collect()
}

/// Hands over a record at a time.
pub fn measure_all(
    timer: &Timer,
    dtype: DType,
    dims: [usize; 4],
    mut add: impl FnMut(Record) -> Result<()>,
) -> Result<()> {
    let device = &timer.device;
    let qkv = (0..3)
        .map(|_| Var::from_tensor(&Tensor::randn(0f32, 1., &dims[..], device)?.to_dtype(dtype)?));
    let qkv = qkv.collect::<candle_core::Result<Vec<_>>>()?;
    for case in cases::attention::CASES {
        let constants = case.constants(&dims, dtype, device)?;
        for &drop_p in case.bench_drop_ps() {
            check(*case, &qkv, &mask(drop_p))?;
            for form in [Form::Fused, Form::Materialised] {
                let scores = dims[0] * dims[1] * dims[2] * dims[2] * dtype.size_in_bytes();
                if form == Form::Fused || scores < TOO_MANY_SCORES {
                    measure(timer, form, (*case, &constants), &qkv, drop_p, &mut add)?;
                }
            }
        }
    }
    Ok(())
}

fn run(
    form: Form,
    (case, constants): (&dyn Case, &[Tensor]),
    qkv: &[Tensor],
    drop: &DropMask,
) -> candle_core::Result<Tensor> {
    let mut results = match form {
        Form::Fused => case.fused(qkv, constants, drop)?,
        Form::Materialised => {
            let o = case.composed(qkv, constants, drop);
            o.unwrap_or_else(|| candle_core::bail!("{case:?} has no other form"))?
        }
    };
    Ok(results.swap_remove(0))
}

/// The last queries of the first head, and the gradients of a loss that reads them alone, of those queries and of
/// all keys and values of the head, against the formula in f64 with that part of the mask.
fn check(case: &dyn Case, qkv: &[Var], drop: &DropMask) -> Result<()> {
    let (b, h, s, d) = qkv[0].dims4()?;
    let (rows, device, dtype) = (s.min(32), qkv[0].device(), qkv[0].dtype());
    let dout = Tensor::randn(0f32, 1., (1, 1, rows, d), device)?.to_dtype(dtype)?;
    let dout_of_all = dout.pad_with_zeros(2, s - rows, 0)?;
    let dout_of_all = dout_of_all.pad_with_zeros(1, 0, h - 1)?.pad_with_zeros(0, 0, b - 1)?;
    let args: Vec<_> = qkv.iter().map(|var| var.as_tensor().clone()).collect();
    let constants = case.constants(&[b, h, s, d], dtype, device)?;
    let o = run(Form::Fused, (case, &constants), &args, drop)?;
    let grads = (&o * &dout_of_all)?.backward()?;
    let part = |x: &Tensor, from: usize| -> candle_core::Result<Tensor> {
        let rows = x.narrow(0, 0, 1)?.narrow(1, 0, 1)?.narrow(2, from, x.dim(2)? - from)?;
        // Else all of x would travel.
        rows.force_contiguous()?.to_device(&Device::Cpu)?.to_dtype(DType::F64)
    };
    let window = drop.window(&[b, h, s, s], &[0, 0, s - rows, 0]);
    let keep = window.to_tensor((1, 1, rows, s), &Device::Cpu)?;
    let firsts = [s - rows, 0, 0];
    let exact_qkv = (qkv.iter().zip(firsts))
        .map(|(x, from)| Var::from_tensor(&part(x, from)?))
        .collect::<candle_core::Result<Vec<_>>>()?;
    let exact_args: Vec<_> = exact_qkv.iter().map(|var| var.as_tensor().clone()).collect();
    let constants = case.constants(&[1, 1, 1, rows, s, d], DType::F64, &Device::Cpu)?;
    let exact = case.formula(&exact_args, &constants, &keep, drop_scale(drop))?.swap_remove(0);
    let exact_grads = (&exact * part(&dout, 0)?)?.backward()?;
    let tolerance = match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 4e-3,
        _ => 3e-2,
    };
    let mut results = vec![("o", part(&o, s - rows)?, exact)];
    for (i, what) in ["dq", "dk", "dv"].into_iter().enumerate() {
        let ours = grads.get(&qkv[i]).with_context(|| format!("{what} is missing"))?;
        let exact = exact_grads.get(&exact_qkv[i]).with_context(|| format!("{what} is missing"))?;
        results.push((what, part(ours, firsts[i])?, exact.clone()));
    }
    for (what, ours, exact) in results {
        let norm = |x: Tensor| x.sqr()?.sum_all()?.to_scalar::<f64>().map(f64::sqrt);
        let off = norm((ours - &exact)?)? / norm(exact)?;
        ensure!(
            off <= tolerance,
            "{} on {:?}, {drop:?}: {what} is off by {off:e} and not timed",
            case.name(),
            [b, h, s, d]
        );
    }
    Ok(())
}

type Work<'a> = &'a dyn Fn() -> candle_core::Result<()>;

fn measure(
    timer: &Timer,
    form: Form,
    (case, constants): (&dyn Case, &[Tensor]),
    qkv: &[Var],
    drop_p: f32,
    add: &mut impl FnMut(Record) -> Result<()>,
) -> Result<()> {
    let dims = qkv[0].dims();
    let [flop_forward, flop_backward] = case.flop(dims).context("nobody has counted it")?;
    let tracked: Vec<_> = qkv.iter().map(|var| var.as_tensor().clone()).collect();
    let detached: Vec<_> = tracked.iter().map(Tensor::detach).collect();
    let drop = mask(drop_p);
    let forward = || run(form, (case, constants), &detached, &drop).map(|_| ());
    let both = || run(form, (case, constants), &tracked, &drop)?.backward().map(|_| ());
    let passes: [(&str, f64, Work<'_>); 2] = [
        ("forward", flop_forward, &forward),
        ("forward_backward", flop_forward + flop_backward, &both),
    ];
    for (pass, flop, work) in passes {
        work()?;
        forget_peak(&timer.device)?;
        let (before, _) = used_and_peak(&timer.device)?;
        work()?;
        let (_, peak) = used_and_peak(&timer.device)?;
        let timing = timer.time(1, |_| work())?;
        let what = ["candle-dropout", form.variant(), case.name(), pass, qkv[0].dtype().as_str()];
        let mut record = Record::new(what, drop_p, dims, timing);
        record.again_ms = Some(timer.time(1, |_| work())?.ms);
        record.flop = Some(flop);
        record.peak_bytes = Some(peak.saturating_sub(before) as f64);
        add(record)?;
    }
    Ok(())
}

/// Nothing else has its memory measured.
pub fn is_one(record: &Record) -> bool {
    record.peak_bytes.is_some()
}

/// A table of the records of attention; nothing if there are none.
pub fn markdown(records: &[Record]) -> Result<String> {
    let mut md = String::new();
    let records: Vec<_> = records.iter().filter(|r| is_one(r)).collect();
    if records.is_empty() {
        return Ok(md);
    }
    md.push_str(
        "\nAttention, [batch, heads, tokens, columns of a head]. \"dropout\" is the time over that without; \
         \"peak\" is memory beyond the arguments.\n\n\
         | form | op | pass | dtype | shape | drop p | ms | quartiles | again | TFLOP/s | dropout | peak |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for r in &records {
        let undropped = records.iter().find(|o| {
            (&o.variant, &o.op, &o.pass, &o.dtype, &o.shape)
                == (&r.variant, &r.op, &r.pass, &r.dtype, &r.shape)
                && o.drop_p == 0.
                && r.drop_p > 0.
        });
        let or_dash = |x: Option<String>| x.unwrap_or_else(|| "-".into());
        writeln!(
            md,
            "| {} | `{}` | {} | {} | {:?} | {} | {:.3} | {:.3} to {:.3} | {} | {} | {} | {} |",
            r.variant,
            r.op,
            r.pass,
            r.dtype,
            r.shape,
            r.drop_p,
            r.ms,
            r.ms_low,
            r.ms_high,
            or_dash(r.again_ms.map(|ms| percent_longer(ms, r.ms))),
            or_dash(r.flop.map(|flop| format!("{:.3}", flop / r.ms / 1e9))),
            or_dash(undropped.map(|o| percent_longer(r.ms, o.ms))),
            or_dash(r.peak_bytes.map(|bytes| format!("{:.1} MB", bytes / 1e6))),
        )?;
    }
    Ok(md)
}
