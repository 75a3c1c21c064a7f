//! A step of AdamW beside candle's, over variables of GPT-2's shapes: on the CPU, and on the first CUDA device
//! there is.
//!
//! ```text
//! cargo bench --bench adamw                  # GPT-2 124M, 12 layers
//! BENCH_LAYERS=1 cargo bench --bench adamw   # does it still run?
//! ```
//!
//! In f32 the weights after two steps are compared, bit for bit but for the sign of a zero, before any step is
//! timed. Forms are timed in turn, so that a machine that slows down slows all of them. GB/s are of the bytes
//! that have to move: weights and moments read and written, gradients read.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Var};
use candle_dropout::training::{AdamW, Optimizer};
use cases::{bits, device, random};

const ROUNDS: usize = 7;

const WIDTH: usize = 768;

fn shapes() -> Vec<Vec<usize>> {
    let layers = std::env::var("BENCH_LAYERS").map_or(12, |layers| layers.parse().unwrap());
    let mut shapes = match layers {
        12 => vec![vec![50_257, WIDTH], vec![1024, WIDTH]],
        _ => vec![vec![1024, WIDTH]],
    };
    for _ in 0..layers {
        for (inputs, outputs) in [(1, 3), (1, 1), (1, 4), (4, 1)] {
            shapes.push(vec![outputs * WIDTH, inputs * WIDTH]);
            shapes.push(vec![outputs * WIDTH]);
        }
        shapes.extend(vec![vec![WIDTH]; 4]);
    }
    shapes.extend(vec![vec![WIDTH]; 2]);
    shapes
}

/// Variables, and the gradients of one step, which serve for all.
fn variables(dtype: DType, device: &Device) -> Result<(Vec<Var>, GradStore)> {
    let (mut vars, mut grads) = (Vec::new(), GradStore::default());
    for (at, shape) in shapes().iter().enumerate() {
        let x =
            |seed| (random(shape, DType::F32, seed)? * 0.01)?.to_dtype(dtype)?.to_device(device);
        let var = Var::from_tensor(&x(at as u64)?)?;
        grads.insert(&var, x(1000 + at as u64)?);
        vars.push(var);
    }
    Ok((vars, grads))
}

/// The bits of a variable, where a zero has no sign.
fn unsigned_zeros(var: &Var) -> Result<Vec<u64>> {
    bits(&(var.as_tensor().to_device(&Device::Cpu)? + 0.)?)
}

fn check(device: &Device) -> Result<()> {
    let (ours, grads) = variables(DType::F32, device)?;
    let theirs = ours.iter().map(|var| Var::from_tensor(&var.as_detached_tensor()));
    let theirs = theirs.collect::<Result<Vec<_>>>()?;
    let mut of_theirs = GradStore::default();
    for (ours, theirs) in ours.iter().zip(&theirs) {
        of_theirs.insert(theirs, grads.get(ours).expect("a gradient").clone());
    }
    let mut adamw = AdamW::new_lr(ours.clone(), 1e-3)?;
    let mut candle = candle_nn::AdamW::new_lr(theirs.clone(), 1e-3)?;
    for _ in 0..2 {
        adamw.step(&grads)?;
        candle.step(&of_theirs)?;
    }
    for (ours, theirs) in ours.iter().zip(&theirs) {
        // On CUDA candle's kernels fuse products and sums, so the last bits differ.
        if device.is_cuda() {
            let off = (ours.as_tensor() - theirs.as_tensor())?.abs()?.flatten_all()?.max(0)?;
            assert!(off.to_scalar::<f32>()? < 1e-6);
        } else {
            assert!(unsigned_zeros(ours)? == unsigned_zeros(theirs)?, "{:?}", ours.shape());
        }
    }
    Ok(())
}

/// A step in one of its forms, and the bytes that it has to move for an element.
struct Form<'a> {
    name: &'a str,
    bytes: usize,
    step: Box<dyn FnMut() -> Result<()> + 'a>,
    elapsed_ms: Vec<f64>,
}

fn form<'a>(
    name: &'a str,
    bytes: usize,
    mut optimizer: impl Optimizer + 'a,
    grads: &'a GradStore,
) -> Form<'a> {
    Form { name, bytes, step: Box::new(move || optimizer.step(grads)), elapsed_ms: Vec::new() }
}

fn compare(dtype: DType, device: &Device) -> Result<()> {
    let (vars, grads) = variables(dtype, device)?;
    let elements: usize = vars.iter().map(|var| var.elem_count()).sum();
    let new = || AdamW::new_lr(vars.clone(), 1e-6);
    let (size, half) = (dtype.size_in_bytes(), dtype != DType::F32);
    let bytes = 16 + 3 * size;
    let mut forms = vec![
        form("candle", 7 * size, candle_nn::AdamW::new_lr(vars.clone(), 1e-6)?, &grads),
        form("ours", bytes, new()?, &grads),
        form("ours, clipped", bytes + size, new()?.with_clip_norm(1.)?, &grads),
    ];
    if half {
        let masters = new()?.with_master_weights()?;
        forms.push(form("ours, master weights", bytes + 8 - size, masters, &grads));
    }
    for round in 0..=ROUNDS {
        for form in &mut forms {
            let elapsed_ms = device::elapsed_ms(device, &mut form.step)?;
            // The first touches the memory of the moments.
            if round > 0 {
                form.elapsed_ms.push(elapsed_ms);
            }
        }
    }
    println!("\n{dtype:?} on {:?}, {:.1} M elements", device.location(), elements as f64 / 1e6);
    let of_candle = median(&mut forms[0].elapsed_ms);
    for form in &mut forms {
        let elapsed_ms = median(&mut form.elapsed_ms);
        let gb_a_second = (form.bytes * elements) as f64 / 1e6 / elapsed_ms;
        let factor = of_candle / elapsed_ms;
        println!("{:24} {elapsed_ms:9.2} ms {gb_a_second:7.1} GB/s {factor:6.1} x", form.name);
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<()> {
    let mut devices = vec![Device::Cpu];
    match device::open() {
        Ok(cuda) => devices.push(cuda),
        // The first line: candle may add a backtrace.
        Err(error) => {
            eprintln!("on the CPU alone: {}", error.to_string().lines().next().unwrap_or_default())
        }
    }
    for device in devices {
        check(&device)?;
        compare(DType::F32, &device)?;
        compare(DType::BF16, &device)?;
    }
    Ok(())
}
