//! One runner over (op, device, dtype, shape): an op, forward and each gradient, against its naive
//! formula in f64 with the same mask.

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_dropout::{
    Activation, AttentionMask, CrossEntropyConfig, DropMask, MaskKey, Norm, Rate, RopeStyle,
    StochasticDepth, activation_dropout, cross_entropy, drop_path_add, drop_path_kept, dropout,
    dropout_add, dropout_add_norm, rope, softmax_dropout,
};

use crate::common::{random, reference};

pub const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// The scale of the scores; no f32 holds it exactly.
pub const SCALE: f64 = 0.7;

pub fn mask(drop_p: f32) -> DropMask {
    DropMask::new(drop_p, MaskKey::derive(42, 7)).unwrap()
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    Dropout,
    DropoutAdd,
    DropoutAddBias,
    Softmax,
    SoftmaxCausal,
    SoftmaxAdditive,
    DropPathAddRow,
    DropPathAddBatch,
    /// Around a branch that changes nothing.
    DropPathKept,
    LayerNorm,
    RmsNorm,
    /// The stream plus its norm, so that a gradient comes from both.
    DropoutAddNorm,
    DropoutAddNormBias,
    /// The norm alone.
    DropoutNorm,
    DropoutNormBias,
    GeluTanhDropout,
    GeluErfDropoutBias,
    SiluDropout,
    ReluDropoutBias,
    /// At positions from 0 on.
    Rope,
    RopeInterleaved,
    CrossEntropy,
    /// With label smoothing, and some rows ignored.
    CrossEntropySmoothed,
}

pub const OPS: [Op; 23] = [
    Op::Dropout,
    Op::DropoutAdd,
    Op::DropoutAddBias,
    Op::Softmax,
    Op::SoftmaxCausal,
    Op::SoftmaxAdditive,
    Op::DropPathAddRow,
    Op::DropPathAddBatch,
    Op::DropPathKept,
    Op::LayerNorm,
    Op::RmsNorm,
    Op::DropoutAddNorm,
    Op::DropoutAddNormBias,
    Op::DropoutNorm,
    Op::DropoutNormBias,
    Op::GeluTanhDropout,
    Op::GeluErfDropoutBias,
    Op::SiluDropout,
    Op::ReluDropoutBias,
    Op::Rope,
    Op::RopeInterleaved,
    Op::CrossEntropy,
    Op::CrossEntropySmoothed,
];

/// Large enough that no row of random numbers is ill-conditioned.
pub const NORM_EPS: f64 = 0.1;

impl Op {
    pub fn takes(self, dims: &[usize]) -> bool {
        match self {
            Op::SoftmaxCausal => dims.len() >= 2,
            Op::DropPathAddRow | Op::DropPathKept => !dims.is_empty(),
            Op::Rope | Op::RopeInterleaved => {
                matches!(dims.len(), 2..=4) && dims[dims.len() - 1].is_multiple_of(2)
            }
            // A row of no classes has no target.
            Op::CrossEntropy | Op::CrossEntropySmoothed => {
                dims.last().is_some_and(|cols| *cols > 0)
            }
            _ => true,
        }
    }

    /// This shape, or the same with one more column if the op does not take it.
    pub fn fitting(self, dims: &[usize]) -> Vec<usize> {
        let mut fitting = dims.to_vec();
        if let Some(cols) = fitting.last_mut().filter(|_| !self.takes(dims)) {
            *cols += 1;
        }
        fitting
    }

    /// The shapes of its arguments, if `x` or the scores have this one.
    pub fn arguments(self, dims: &[usize]) -> Vec<Vec<usize>> {
        let last = dims.last().copied().unwrap_or(1);
        match self {
            Op::Dropout | Op::Softmax | Op::SoftmaxCausal => vec![dims.to_vec()],
            Op::GeluTanhDropout | Op::SiluDropout => vec![dims.to_vec()],
            Op::Rope | Op::RopeInterleaved => vec![dims.to_vec()],
            Op::CrossEntropy | Op::CrossEntropySmoothed => vec![dims.to_vec()],
            Op::GeluErfDropoutBias | Op::ReluDropoutBias => vec![dims.to_vec(), vec![last]],
            Op::DropoutAdd => vec![dims.to_vec(); 2],
            Op::DropPathAddRow | Op::DropPathAddBatch | Op::DropPathKept => vec![dims.to_vec(); 2],
            Op::DropoutAddBias => vec![dims.to_vec(), dims.to_vec(), vec![last]],
            Op::RmsNorm | Op::DropoutNorm => vec![dims.to_vec(), vec![last]],
            Op::LayerNorm => vec![dims.to_vec(), vec![last], vec![last]],
            Op::DropoutAddNorm => vec![dims.to_vec(), dims.to_vec(), vec![last]],
            Op::DropoutNormBias => vec![dims.to_vec(), vec![last], vec![last], vec![last]],
            Op::DropoutAddNormBias => {
                vec![dims.to_vec(), dims.to_vec(), vec![last], vec![last], vec![last]]
            }
            Op::SoftmaxAdditive => {
                vec![dims.to_vec(), dims.last().map_or(vec![], |last| vec![*last])]
            }
        }
    }

    /// The shape of the output.
    pub fn output(self, dims: &[usize]) -> Vec<usize> {
        match self {
            Op::CrossEntropy | Op::CrossEntropySmoothed => vec![],
            _ => dims.to_vec(),
        }
    }

    /// What the output of an op in this dtype is multiplied with for a gradient.
    pub fn output_gradient(self, dims: &[usize], dtype: DType) -> Result<Tensor> {
        let is_loss = matches!(self, Op::CrossEntropy | Op::CrossEntropySmoothed);
        // A loss is an f32 even for halves.
        let dtype = if is_loss && dtype != DType::F64 { DType::F32 } else { dtype };
        random(&self.output(dims), dtype, 9)
    }

    pub fn mask_dims(self, dims: &[usize]) -> Vec<usize> {
        match self {
            Op::DropPathAddRow | Op::DropPathKept => vec![1, dims[0]],
            Op::DropPathAddBatch => vec![1, 1],
            _ => dims.to_vec(),
        }
    }

    pub fn fused(self, args: &[Tensor], drop: &DropMask) -> Result<Tensor> {
        let x = &args[0];
        match self {
            Op::Dropout => dropout(x, drop),
            Op::DropoutAdd => dropout_add(x, &args[1], None, drop),
            Op::DropoutAddBias => dropout_add(x, &args[1], Some(&args[2]), drop),
            Op::DropPathAddRow => drop_path_add(x, &args[1], StochasticDepth::Row, drop),
            Op::DropPathAddBatch => drop_path_add(x, &args[1], StochasticDepth::Batch, drop),
            Op::DropPathKept => {
                let identity = |kept: &Tensor| Ok(kept.clone());
                drop_path_kept(x, &args[1], StochasticDepth::Row, drop, identity)
            }
            Op::LayerNorm | Op::RmsNorm => self.norm(args).forward(x),
            Op::Rope | Op::RopeInterleaved => {
                let (cos, sin) = self.tables(x)?;
                rope(x, &cos, &sin, self.style())
            }
            Op::CrossEntropy | Op::CrossEntropySmoothed => {
                cross_entropy(x, &self.targets(x)?, &self.loss_config())
            }
            _ if self.activation().is_some() => {
                activation_dropout(x, args.get(1), self.activation().unwrap(), drop)
            }
            _ if self.is_dropout_norm() => {
                let (residual, bias) = self.residual_and_bias(args);
                let (z, n) = dropout_add_norm(x, residual, bias, &self.norm(args), drop)?;
                self.both(z, n)
            }
            _ => softmax_dropout(x, SCALE, &self.attention_mask(args), drop),
        }
    }

    pub fn naive(self, args: &[Tensor], drop: &DropMask) -> Result<Tensor> {
        let x = &args[0];
        let keep = drop.to_tensor(self.mask_dims(x.dims()), x.device())?;
        // Nothing is kept at a scale of 0, and candle ends the graph at a multiplication by 0.
        let drop_scale = match drop.rate() {
            Rate::DROP_ALL => 1.,
            rate => f64::from(rate.scale()),
        };
        match self {
            Op::Dropout => reference::dropout(x, &keep, drop_scale),
            Op::DropoutAdd | Op::DropoutAddBias => {
                reference::dropout_add(x, &args[1], args.get(2), &keep, drop_scale)
            }
            Op::DropPathAddRow | Op::DropPathAddBatch | Op::DropPathKept => {
                reference::drop_path_add(x, &args[1], &keep, drop_scale)
            }
            Op::LayerNorm | Op::RmsNorm => reference::norm(x, &self.norm(args)),
            Op::Rope | Op::RopeInterleaved => {
                let (cos, sin) = self.tables(x)?;
                let (cos, sin) = (cos.to_dtype(x.dtype())?, sin.to_dtype(x.dtype())?);
                reference::rope(x, &cos, &sin, self.style())
            }
            Op::CrossEntropy | Op::CrossEntropySmoothed => {
                reference::cross_entropy(x, &self.targets(x)?, &self.loss_config())
            }
            _ if self.activation().is_some() => {
                let activation = self.activation().unwrap();
                reference::activation_dropout(x, args.get(1), activation, &keep, drop_scale)
            }
            _ if self.is_dropout_norm() => {
                let (residual, bias) = self.residual_and_bias(args);
                let norm = self.norm(args);
                let (z, n) =
                    reference::dropout_add_norm(x, residual, bias, &norm, &keep, drop_scale)?;
                self.both(z, n)
            }
            _ => {
                let mask = self.attention_mask(args);
                reference::softmax_dropout(x, SCALE, &mask, &keep, drop_scale)
            }
        }
    }

    fn style(self) -> RopeStyle {
        match self {
            Op::RopeInterleaved => RopeStyle::Interleaved,
            _ => RopeStyle::HalfSplit,
        }
    }

    /// Cosines and sines, f32 numbers whatever the dtype of x.
    pub fn tables(self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let &[.., t, d] = x.dims() else { candle_core::bail!("no positions") };
        let positions = Tensor::arange(0u32, t as u32, &Device::Cpu)?.to_dtype(DType::F64)?;
        let frequencies: Vec<f64> = (0..d / 2).map(|j| 0.9f64.powi(j as i32 % 100)).collect();
        let frequencies = Tensor::from_vec(frequencies, (1, d / 2), &Device::Cpu)?;
        let angles = positions.reshape((t, 1))?.broadcast_mul(&frequencies)?;
        let table = |table: Tensor| table.to_dtype(DType::F32)?.to_device(x.device());
        Ok((table(angles.cos()?)?, table(angles.sin()?)?))
    }

    pub fn loss_config(self) -> CrossEntropyConfig {
        let smoothed = self == Op::CrossEntropySmoothed;
        CrossEntropyConfig {
            label_smoothing: if smoothed { 0.1 } else { 0. },
            ignore_index: smoothed.then_some(-100),
        }
    }

    /// A class for each row; u32, or i64 where some are ignored.
    pub fn targets(self, logits: &Tensor) -> Result<Tensor> {
        let Some((&classes, rows)) = logits.dims().split_last() else {
            candle_core::bail!("no classes")
        };
        let class = |row: usize| (row * 7919 + 3) % classes.max(1);
        let count = rows.iter().product::<usize>();
        let targets = match self {
            Op::CrossEntropySmoothed => {
                let target = |row: usize| if row % 5 == 1 { -100 } else { class(row) as i64 };
                Tensor::from_vec((0..count).map(target).collect(), rows, &Device::Cpu)?
            }
            _ => {
                let target = |row: usize| class(row) as u32;
                Tensor::from_vec((0..count).map(target).collect(), rows, &Device::Cpu)?
            }
        };
        targets.to_device(logits.device())
    }

    fn activation(self) -> Option<Activation> {
        match self {
            Op::GeluTanhDropout => Some(Activation::GeluTanh),
            Op::GeluErfDropoutBias => Some(Activation::GeluErf),
            Op::SiluDropout => Some(Activation::Silu),
            Op::ReluDropoutBias => Some(Activation::Relu),
            _ => None,
        }
    }

    fn is_norm(self) -> bool {
        matches!(self, Op::LayerNorm | Op::RmsNorm) || self.is_dropout_norm()
    }

    fn is_dropout_norm(self) -> bool {
        use Op::*;
        matches!(self, DropoutAddNorm | DropoutAddNormBias | DropoutNorm | DropoutNormBias)
    }

    /// What an op with two results is judged by. Candle's sum of empty tensors has no gradient.
    fn both(self, z: Tensor, n: Tensor) -> Result<Tensor> {
        match self {
            Op::DropoutAddNorm | Op::DropoutAddNormBias if n.elem_count() > 0 => z + n,
            _ => Ok(n),
        }
    }

    fn residual_and_bias(self, args: &[Tensor]) -> (Option<&Tensor>, Option<&Tensor>) {
        match self {
            Op::DropoutAddNorm => (Some(&args[1]), None),
            Op::DropoutAddNormBias => (Some(&args[1]), Some(&args[2])),
            Op::DropoutNormBias => (None, Some(&args[1])),
            _ => (None, None),
        }
    }

    /// Its parameters are the last arguments.
    pub fn norm(self, args: &[Tensor]) -> Norm {
        match (self, args) {
            (Op::RmsNorm | Op::DropoutAddNorm, [.., weight]) => {
                Norm::rms_norm(weight.clone(), NORM_EPS)
            }
            (Op::DropoutNorm, [.., weight]) => Norm::layer_norm(weight.clone(), None, NORM_EPS),
            (_, [.., weight, bias]) => {
                Norm::layer_norm(weight.clone(), Some(bias.clone()), NORM_EPS)
            }
            _ => panic!("{self:?} has no norm"),
        }
    }

    fn attention_mask(self, args: &[Tensor]) -> AttentionMask {
        match self {
            Op::SoftmaxCausal => AttentionMask::Causal,
            Op::SoftmaxAdditive => AttentionMask::Additive(args[1].clone()),
            _ => AttentionMask::None,
        }
    }
}

/// How the arguments of an op lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum View {
    Contiguous,
    /// The last two dimensions swapped.
    Transposed,
    /// The middle of something larger.
    Offset,
    /// One entry of the first dimension, repeated; a bias stays as it is, since candle would sum its
    /// gradient in the dtype.
    Broadcast,
}

impl View {
    /// The shape of what is viewed as `dims`.
    pub fn base(self, dims: &[usize]) -> Vec<usize> {
        let (mut base, rank) = (dims.to_vec(), dims.len());
        match self {
            View::Transposed if rank >= 2 => base.swap(rank - 2, rank - 1),
            View::Offset if rank >= 1 => base[0] += 3,
            View::Broadcast if rank >= 2 => base[0] = 1,
            _ => {}
        }
        base
    }

    pub fn of(self, base: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let rank = dims.len();
        match self {
            View::Transposed if rank >= 2 => base.transpose(rank - 2, rank - 1),
            View::Offset if rank >= 1 => base.narrow(0, 2, dims[0]),
            View::Broadcast => base.broadcast_as(dims),
            _ => Ok(base.clone()),
        }
    }
}

/// The output of an op and the gradient of each of its arguments, as f64 on the CPU.
///
/// The arguments are inner nodes of the graph, twice a variable each, and views of it.
pub fn run(
    op: impl Fn(&[Tensor]) -> Result<Tensor>,
    bases: &[Tensor],
    dims: &[Vec<usize>],
    view: View,
    dy: &Tensor,
) -> Result<Vec<Tensor>> {
    let vars = bases.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let args = vars
        .iter()
        .zip(dims)
        .map(|(var, dims)| view.of(&(var.as_tensor() * 2.)?, dims))
        .collect::<Result<Vec<_>>>()?;
    let y = op(&args)?;
    let grads = (&y * dy)?.backward()?;
    let mut results = vec![y];
    for (i, var) in vars.iter().enumerate() {
        let grad = grads.get(var).unwrap_or_else(|| panic!("argument {i} has no gradient"));
        assert_eq!(grad.dims(), var.dims(), "gradient of argument {i}");
        results.push(grad.clone());
    }
    results.iter().map(|x| x.to_device(&Device::Cpu)?.to_dtype(DType::F64)).collect()
}

/// The largest difference of two tensors; infinite if one is no number where the other is.
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

/// The distance from 1 to the next number; for f64, whose naive formula is the reference itself, that
/// of a sum of 65,537 terms in another order.
pub fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 256. * f64::EPSILON,
        DType::F32 => f64::from(f32::EPSILON),
        DType::F16 => f64::from(half::f16::EPSILON),
        _ => f64::from(half::bf16::EPSILON),
    }
}

/// What an op and each gradient give beyond the error that the naive formula in the dtype of the op
/// makes against the formula in f64, with arguments of the given shapes; nothing if they agree.
pub fn disagreements(
    op: Op,
    dims: &[Vec<usize>],
    view: View,
    drop_p: f32,
    dtype: DType,
    devices: &[Device],
) -> Result<Vec<String>> {
    let drop = mask(drop_p);
    let bases = dims
        .iter()
        .enumerate()
        .map(|(i, dims)| random(&view.base(dims), dtype, i as u64))
        .collect::<Result<Vec<_>>>()?;
    let dy = op.output_gradient(&dims[0], dtype)?;
    let naive = |args: &[Tensor]| op.naive(args, &drop);
    let wide = bases.iter().map(|x| x.to_dtype(DType::F64)).collect::<Result<Vec<_>>>()?;
    let exact = run(naive, &wide, dims, view, &dy.to_dtype(DType::F64)?)?;
    let naive = run(naive, &bases, dims, view, &dy)?;
    let mut found = Vec::new();
    for device in devices {
        if device.is_cuda() && dtype == DType::F64 {
            continue;
        }
        let bases = bases.iter().map(|x| x.to_device(device)).collect::<Result<Vec<_>>>()?;
        let fused = |args: &[Tensor]| op.fused(args, &drop);
        let ours = run(fused, &bases, dims, view, &dy.to_device(device)?)?;
        let case =
            format!("{op:?} {dims:?} {view:?} drop_p {drop_p} {dtype:?} {:?}", device.location());
        let beyond = beyond_the_naive_error(op, [&ours, &naive, &exact], &dy, &drop, dtype)?;
        found.extend(beyond.into_iter().map(|what| format!("{case}: {what}")));
    }
    Ok(found)
}

/// Which results (output, then each gradient) are further from the exact ones than twice the naive
/// formula is, and by how much; `results` are ours, the naive and the exact ones.
pub fn beyond_the_naive_error(
    op: Op,
    results: [&[Tensor]; 3],
    dy: &Tensor,
    drop: &DropMask,
    dtype: DType,
) -> Result<Vec<String>> {
    let [ours, naive, exact] = results;
    // The terms of a gradient of softmax cancel, in part or wholly, and their size is what rounds.
    let terms = match op {
        Op::Softmax | Op::SoftmaxCausal | Op::SoftmaxAdditive => {
            2. * largest(&exact[0])? * largest(&dy.to_dtype(DType::F64)?)?
        }
        // Differences of probabilities, each with the error of an exponential whose exponent is rounded.
        // Rows that are one row, broadcast, add up their gradients.
        Op::CrossEntropy | Op::CrossEntropySmoothed => {
            let dlogits = &exact[1];
            let rows =
                dlogits.elem_count() / dlogits.dims().last().map_or(1, |cols| (*cols).max(1));
            4. * largest(&dy.to_dtype(DType::F64)?)? / rows.max(1) as f64
        }
        // A slope is a sum of terms of this size, each with the error of an exponential.
        _ if op.activation().is_some() => {
            4. * f64::from(drop.rate().scale()) * largest(&dy.to_dtype(DType::F64)?)?
        }
        _ if op.is_norm() => largest(&exact[0])? * largest(&dy.to_dtype(DType::F64)?)?,
        _ => 0.,
    };
    let elements_of_x = exact.get(1).map_or(1, Tensor::elem_count) as f64;
    let mut found = Vec::new();
    for (i, ((ours, naive), exact)) in ours.iter().zip(naive).zip(exact).enumerate() {
        let (ours, naive) = (error(ours, exact)?, error(naive, exact)?);
        let terms = match i {
            0 => 0.,
            // Rows that share their mask sum up its gradient, and the errors.
            2 if op == Op::SoftmaxAdditive => {
                terms * (elements_of_x / exact.elem_count().max(1) as f64).max(1.).sqrt()
            }
            _ => terms,
        };
        let magnitude = largest(exact)?.max(terms);
        let bound = 2. * naive + epsilon(dtype) * magnitude;
        if ours > bound {
            let what = if i == 0 { "output".into() } else { format!("gradient {i}") };
            found.push(format!("{what} is off by {ours:e}, the naive formula by {naive:e}"));
        }
    }
    Ok(found)
}
