#[path = "gpu_bundle/candle_gpt.rs"]
mod candle_gpt;
#[path = "gpu_bundle/step.rs"]
#[allow(dead_code)]
mod step;
use step::*;

fn main() -> anyhow::Result<()> {
    let p: f32 = std::env::args().nth(1).map_or(0.1, |x| x.parse().unwrap());
    let n: usize = std::env::args().nth(2).map_or(10, |x| x.parse().unwrap());
    let form = match std::env::args().nth(3).as_deref() {
        Some("candle") => Form::Candle,
        Some("unfused") => Form::Unfused,
        _ => Form::Fused,
    };
    let mut s =
        Step::new(form, &size(false), p, candle_core::DType::F32, &candle_core::Device::Cpu)?;
    s.run()?;
    s.run()?;
    let mut t = vec![];
    for _ in 0..n {
        let b = std::time::Instant::now();
        let loss = s.loss()?;
        let f = b.elapsed();
        let mut g = loss.backward()?;
        let bw = b.elapsed();
        s.clip_only(&mut g)?;
        let c = b.elapsed();
        s.adam_only(&g)?;
        let a = b.elapsed();
        drop(g);
        drop(loss);
        let e = b.elapsed();
        t.push((e, f, bw - f, c - bw, a - c, e - a));
    }
    t.sort();
    let m = t[n / 2];
    println!(
        "median {:?} min {:?}: forward {:?} backward {:?} clip {:?} adamw {:?} free {:?}",
        m.0, t[0].0, m.1, m.2, m.3, m.4, m.5
    );
    Ok(())
}
