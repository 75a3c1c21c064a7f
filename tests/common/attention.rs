//! One attention on a device against its naive formula in f64 with the same mask: sizes, views, bounds.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::{AttentionConfig, DropMask, Rate, attention};

use crate::common::{random, reference};

/// Sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub b: usize,
    pub h: usize,
    pub kv: usize,
    pub sq: usize,
    pub sk: usize,
    pub d: usize,
}

/// `[B, H, Hkv, Sq, Sk, D]`
pub fn sizes([b, h, kv, sq, sk, d]: [usize; 6]) -> Sizes {
    Sizes { b, h, kv, sq, sk, d }
}

impl Sizes {
    pub fn q(self) -> [usize; 4] {
        [self.b, self.h, self.sq, self.d]
    }

    pub fn k(self) -> [usize; 4] {
        [self.b, self.kv, self.sk, self.d]
    }

    /// Of the scores, and of the mask.
    pub fn scores(self) -> [usize; 4] {
        [self.b, self.h, self.sq, self.sk]
    }
}

/// How an argument lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum View {
    Contiguous,
    /// As a projection leaves it, `[B, S, H, D]`.
    RowsBeforeHeads,
    /// Elements along D are not neighbours.
    ColumnsFirst,
    /// The middle of something larger.
    Offset,
    /// One sample, repeated.
    Broadcast,
}

pub const VIEWS: [View; 5] =
    [View::Contiguous, View::RowsBeforeHeads, View::ColumnsFirst, View::Offset, View::Broadcast];

impl View {
    fn base(self, [b, h, s, d]: [usize; 4]) -> [usize; 4] {
        match self {
            View::Contiguous => [b, h, s, d],
            View::RowsBeforeHeads => [b, s, h, d],
            View::ColumnsFirst => [b, h, d, s],
            View::Offset => [b, h, s + 3, d + 5],
            View::Broadcast => [1, h, s, d],
        }
    }

    fn of(self, base: &Tensor, dims: [usize; 4]) -> Result<Tensor> {
        match self {
            View::Contiguous => Ok(base.clone()),
            View::RowsBeforeHeads => base.transpose(1, 2),
            View::ColumnsFirst => base.transpose(2, 3),
            View::Offset => base.narrow(2, 2, dims[2])?.narrow(3, 1, dims[3]),
            View::Broadcast => base.broadcast_as(&dims),
        }
    }
}

/// The output and the gradients of q, k and v, as f64 on the CPU.
fn run(
    op: impl Fn(&[Tensor]) -> Result<Tensor>,
    bases: &[Tensor],
    dims: &[[usize; 4]],
    view: View,
    dout: &Tensor,
) -> Result<Vec<Tensor>> {
    let vars = bases.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let views = vars.iter().zip(dims).map(|(var, dims)| view.of(&(var.as_tensor() * 1.)?, *dims));
    let o = op(&views.collect::<Result<Vec<_>>>()?)?;
    let grads = (&o * dout)?.backward()?;
    let mut results = vec![o];
    results.extend(vars.iter().map(|var| grads.get(var).unwrap().clone()));
    results.iter().map(|x| x.to_device(&Device::Cpu)?.to_dtype(DType::F64)).collect()
}

/// The largest difference; infinite where one is no number and the other is.
pub fn error(a: &Tensor, b: &Tensor) -> Result<f64> {
    assert_eq!(a.dims(), b.dims());
    let differences = (a - b)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(differences.iter().fold(0., |worst, d| match d.is_nan() {
        true => f64::INFINITY,
        false => d.abs().max(worst),
    }))
}

pub fn largest(x: &Tensor) -> Result<f64> {
    error(x, &x.zeros_like()?)
}

fn epsilon(dtype: DType) -> f64 {
    match dtype {
        // Whose naive formula is the reference itself: sums in another order.
        DType::F64 => 64. * f64::EPSILON,
        DType::F32 => f64::from(f32::EPSILON),
        DType::F16 => f64::from(half::f16::EPSILON),
        _ => f64::from(half::bf16::EPSILON),
    }
}

fn to(x: &AttentionConfig, device: &Device) -> Result<AttentionConfig> {
    let moved = |x: &Option<Tensor>| x.as_ref().map(|x| x.to_device(device)).transpose();
    Ok(AttentionConfig {
        key_lengths: moved(&x.key_lengths)?,
        alibi_slopes: moved(&x.alibi_slopes)?,
        ..x.clone()
    })
}

/// Which results (output, then each gradient) are further from the formula in f64 than twice the error
/// that the formula makes in this dtype, which may be small by chance, and a rounding; nothing if they agree.
pub fn disagreements(
    sizes: Sizes,
    config: &AttentionConfig,
    view: View,
    drop: &DropMask,
    dtype: DType,
    devices: &[Device],
) -> Result<Vec<String>> {
    let dims = [sizes.q(), sizes.k(), sizes.k()];
    let bases = (0..3).map(|i| random(&view.base(dims[i]), dtype, i as u64));
    let bases = bases.collect::<Result<Vec<_>>>()?;
    let dout = random(&sizes.q(), dtype, 9)?;
    let keep = drop.to_tensor(&sizes.scores(), &Device::Cpu)?;
    // Nothing is kept at a scale of 0, and candle ends the graph at a multiplication by 0.
    let scale = match drop.rate() {
        Rate::DROP_ALL => 1.,
        rate => f64::from(rate.scale()),
    };
    let naive = |x: &[Tensor]| reference::attention(&x[0], &x[1], &x[2], config, &keep, scale);
    let wide = bases.iter().map(|x| x.to_dtype(DType::F64)).collect::<Result<Vec<_>>>()?;
    let exact = run(naive, &wide, &dims, view, &dout.to_dtype(DType::F64)?)?;
    let naive = run(naive, &bases, &dims, view, &dout)?;
    // The gradient of a score is P times a difference, of do · v and of do · o with the rounded o. Both may
    // be far larger than it, and what rounds are their terms; the sum over queries adds up the errors.
    let largest_of = |x: &Tensor| largest(&x.to_dtype(DType::F64)?);
    let mean_of = |x: &Tensor| x.to_dtype(DType::F64)?.abs()?.mean_all()?.to_scalar::<f64>();
    let dot = sizes.d as f64 * mean_of(&dout)? * mean_of(&bases[2])?
        + largest_of(&dout)? * largest_of(&bases[2])?;
    let unit = config.scale.unwrap_or(1. / (sizes.d as f64).sqrt());
    let terms = 2. * unit * scale * dot * largest_of(&bases[0])?.max(largest_of(&bases[1])?);
    let added = ((sizes.sq * sizes.h) as f64 / (sizes.sk * sizes.kv) as f64).max(1.).sqrt();
    // Exponents of up to ln Sk and more are rounded in f32, and with them all probabilities of a row.
    let exponent = if dtype == DType::F32 { 1. + (sizes.sk.max(1) as f64).ln() } else { 1. };
    let mut found = Vec::new();
    for device in devices {
        if device.is_cuda() && (dtype == DType::F64 || sizes.d > 256) {
            continue;
        }
        let on_device = to(config, device)?;
        let ours = |x: &[Tensor]| attention(&x[0], &x[1], &x[2], &on_device, drop);
        let bases = bases.iter().map(|x| x.to_device(device)).collect::<Result<Vec<_>>>()?;
        let ours = run(ours, &bases, &dims, view, &dout.to_device(device)?)?;
        for (i, ((ours, naive), exact)) in ours.iter().zip(&naive).zip(&exact).enumerate() {
            let (ours, naive) = (error(ours, exact)?, error(naive, exact)?);
            let magnitude = match i {
                1 => largest(exact)?.max(terms),
                2 => largest(exact)?.max(terms * added),
                _ => largest(exact)?,
            };
            let what = ["o", "dq", "dk", "dv"][i];
            if ours > 2. * naive + epsilon(dtype) * exponent * magnitude {
                found.push(format!(
                    "{what} is off by {ours:e}, the naive formula by {naive:e}: {sizes:?} {view:?} {dtype:?} \
                     {:?} {config:?} {drop:?}",
                    device.location()
                ));
            }
        }
    }
    Ok(found)
}

/// One of each limit and each change of the scores, and some together.
pub fn configs(sizes: Sizes) -> Result<Vec<AttentionConfig>> {
    let none = AttentionConfig::default();
    let lengths: Vec<_> = (0..sizes.b).map(|b| ((b * 37 + 3) % (sizes.sk + 2)) as u32).collect();
    let key_lengths = Some(Tensor::new(lengths, &Device::Cpu)?);
    // Gentle: a logit of 100 is known to 1e-5 in f32, and so is its exponential, whoever computes it.
    let slopes: Vec<_> = (0..sizes.h).map(|h| 0.5f32.powi(h as i32 + 5)).collect();
    let alibi_slopes = Some(Tensor::new(slopes, &Device::Cpu)?);
    Ok(vec![
        AttentionConfig { scale: Some(0.3), ..none.clone() },
        AttentionConfig { softcap: Some(1.5), ..none.clone() },
        AttentionConfig { window: Some((5, 2)), ..none.clone() },
        AttentionConfig { window: Some((0, 0)), ..none.clone() },
        AttentionConfig { window: Some((70, usize::MAX)), ..none.clone() },
        AttentionConfig { window: Some((40, 3)), causal: true, ..none.clone() },
        AttentionConfig { key_lengths: key_lengths.clone(), ..none.clone() },
        AttentionConfig { key_lengths: key_lengths.clone(), causal: true, ..none.clone() },
        AttentionConfig { alibi_slopes: alibi_slopes.clone(), causal: true, ..none.clone() },
        AttentionConfig { alibi_slopes: alibi_slopes.clone(), ..none },
        AttentionConfig {
            scale: Some(0.2),
            causal: true,
            window: Some((90, 9)),
            softcap: Some(3.),
            key_lengths,
            alibi_slopes,
        },
    ])
}
