//! The tables of a bench.

use std::fmt::Write;

use anyhow::Result;

use super::attention;
use crate::pretrain_vs_finetune::report::format::signed;
use crate::results::Record;

fn human(bytes: f64) -> String {
    match bytes {
        b if b < 1e6 => format!("{:.0} kB", b / 1024.),
        b if b < 1e9 => format!("{:.0} MB", b / 1048576.),
        b => format!("{:.0} GB", b / 1073741824.),
    }
}

/// How much longer `ms` is than `base_ms`.
pub fn percent_longer(ms: f64, base_ms: f64) -> String {
    format!("{} %", signed((ms / base_ms - 1.) * 100., 0))
}

pub fn markdown(records: &[Record], small: bool) -> Result<String> {
    let mut md = String::new();
    if small {
        md.push_str("A run of seconds that shows the program works; its times mean nothing.\n\n");
    }
    md.push_str(
        "GB/s counts each input read and each output written once. \"of copy\" is that against a plain \
         copy of x in this run. \"again\" is the same version timed once more. \"candle\" is the time of \
         candle's own chain of ops over ours.\n\n\
         | op | pass | dtype | drop p | x | ms | quartiles | again | GB/s | of copy | candle |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let same = |a: &Record, b: &Record| {
        (&a.op, &a.pass, &a.dtype, &a.shape) == (&b.op, &b.pass, &b.dtype, &b.shape)
            && a.drop_p == b.drop_p
    };
    let is_elementwise = |r: &Record| r.op != "gpt_step" && !attention::is_one(r);
    let is_listed = |r: &&Record| r.op == "copy" || r.library != "candle" && is_elementwise(r);
    for record in records.iter().filter(is_listed) {
        let theirs =
            records.iter().find(|r| r.library == "candle" && r.op != "copy" && same(r, record));
        let elements: usize = record.shape.iter().product();
        let size = if record.dtype == "f32" { 4 } else { 2 };
        let or_dash = |x: Option<String>| x.unwrap_or_else(|| "-".into());
        writeln!(
            md,
            "| `{}` | {} | {} | {} | {} | {:.4} | {:.4} to {:.4} | {} | {} | {} | {} |",
            record.op,
            record.pass,
            record.dtype,
            record.drop_p,
            human((elements * size) as f64),
            record.ms,
            record.ms_low,
            record.ms_high,
            or_dash(record.again_ms.map(|ms| percent_longer(ms, record.ms))),
            or_dash(record.gb_s.map(|x| format!("{x:.1}"))),
            or_dash(record.of_copy.map(|x| format!("{:.0} %", x * 100.))),
            or_dash(theirs.map(|theirs| format!("{:.1}x", theirs.ms / record.ms))),
        )?;
    }
    md.push_str(&attention::markdown(records)?);
    let steps: Vec<_> = records.iter().filter(|r| r.op == "gpt_step").collect();
    if let Some(shape) = steps.first().map(|step| &step.shape) {
        writeln!(
            md,
            "\nA training step of a GPT, [batch, tokens, width, layers] = {shape:?}: forward, loss, \
             backward, clip, AdamW.\n\n| step | dtype | drop p | ms | quartiles | again | GFLOP/s |\n\
             |---|---|---|---|---|---|---|"
        )?;
    }
    for step in steps {
        let again = step.again_ms.map(|ms| percent_longer(ms, step.ms));
        let rate = step.flop.map(|flop| format!("{:.0}", flop / step.ms / 1e6));
        writeln!(
            md,
            "| {}, {} | {} | {} | {:.3} | {:.3} to {:.3} | {} | {} |",
            step.library,
            step.variant,
            step.dtype,
            step.drop_p,
            step.ms,
            step.ms_low,
            step.ms_high,
            again.unwrap_or_else(|| "-".into()),
            rate.unwrap_or_else(|| "-".into()),
        )?;
    }
    Ok(md)
}
