//! One runner over (case, device, dtype, size): a call, forward and each gradient, against its naive formula
//! in f64 with the same mask.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::DropMask;

use crate::tensors::{bits, drop_scale, error, largest, mask, random};
use crate::{Case, Exact, View};

/// Sizes that are awkward for any op. One by one: scalar, single elements, odd and prime sizes, none a multiple
/// of 8; one column, one row; more queries than keys and fewer; more than one parallel chunk; more rows than a
/// CUDA grid's y.
pub const SIZES: [&[usize]; 13] = [
    &[],
    &[1],
    &[7],
    &[1, 1],
    &[131, 1],
    &[1, 1031],
    &[5, 3],
    &[2, 3, 17],
    &[2, 7, 4],
    &[2, 3, 4, 5],
    &[37, 1031],
    &[5, 9973],
    &[65537, 3],
];

/// The CPU, and a GPU if there is one that this build can use.
pub fn devices() -> Vec<Device> {
    [Ok(Device::Cpu), Device::new_cuda(0)].into_iter().flatten().collect()
}

/// What a case is judged by: its result, or the sum of all, so that a gradient comes from each. Candle's sum
/// of empty tensors has no gradient.
pub fn judged(results: Vec<Tensor>) -> Result<Tensor> {
    let mut results = results.into_iter();
    let first = results.next().expect("a call has a result");
    results.filter(|x| x.elem_count() > 0).try_fold(first, |sum, x| sum + x)
}

/// The fused call with its constants made for it.
pub fn fused(case: &dyn Case, size: &[usize], args: &[Tensor], drop: &DropMask) -> Result<Tensor> {
    let constants = case.constants(size, args[0].dtype(), args[0].device())?;
    judged(case.fused(args, &constants, drop)?)
}

/// The naive formula with its constants made for it and its mask.
pub fn naive(case: &dyn Case, size: &[usize], args: &[Tensor], drop: &DropMask) -> Result<Tensor> {
    let constants = case.constants(size, args[0].dtype(), args[0].device())?;
    judged(case.formula(args, &constants, &case.keep(size, drop)?, drop_scale(drop))?)
}

/// What the output of a case in this dtype is multiplied with for a gradient.
pub fn output_gradient(case: &dyn Case, size: &[usize], dtype: DType) -> Result<Tensor> {
    let dtype = if case.is_loss() && dtype != DType::F64 { DType::F32 } else { dtype };
    random(&case.output(&case.arguments(size)), dtype, 9)
}

/// The arguments of a case on the CPU, as variables are to hold them.
pub fn arguments(case: &dyn Case, size: &[usize], dtype: DType) -> Result<Vec<Tensor>> {
    bases(&case.arguments(size), View::Contiguous, dtype)
}

fn bases(dims: &[Vec<usize>], view: View, dtype: DType) -> Result<Vec<Tensor>> {
    let random = |(i, dims): (usize, &Vec<usize>)| random(&view.base(dims), dtype, i as u64);
    dims.iter().enumerate().map(random).collect()
}

/// How arguments are given to a call.
#[derive(Clone, Copy, Debug)]
pub struct Given<'a> {
    /// Their shapes, those of the case unless a test wants others.
    pub dims: &'a [Vec<usize>],
    pub view: View,
    /// They are so many times a variable each: inner nodes of the graph.
    pub times: f64,
}

/// The output of a call and the gradient of each of its arguments, as f64 on the CPU, and the arguments.
pub fn run(
    call: impl Fn(&[Tensor]) -> Result<Tensor>,
    bases: &[Tensor],
    given: Given<'_>,
    dy: &Tensor,
) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let vars = bases.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let args = vars
        .iter()
        .zip(given.dims)
        .map(|(var, dims)| given.view.of(&(var.as_tensor() * given.times)?, dims))
        .collect::<Result<Vec<_>>>()?;
    let y = call(&args)?;
    let grads = (&y * dy)?.backward()?;
    let mut results = vec![y];
    for (i, var) in vars.iter().enumerate() {
        let grad = grads.get(var).unwrap_or_else(|| panic!("argument {i} has no gradient"));
        assert_eq!(grad.dims(), var.dims(), "gradient of argument {i}");
        results.push(grad.clone());
    }
    let results: Result<Vec<_>> =
        results.iter().map(|x| x.to_device(&Device::Cpu)?.to_dtype(DType::F64)).collect();
    Ok((results?, args.iter().map(Tensor::detach).collect()))
}

/// Output and gradients of the fused call on random arguments, as f64 on the CPU.
pub fn results(
    case: &dyn Case,
    size: &[usize],
    drop: &DropMask,
    dtype: DType,
    device: &Device,
) -> Result<Vec<Tensor>> {
    let dims = case.arguments(size);
    let bases = bases(&dims, View::Contiguous, dtype)?;
    let bases = bases.iter().map(|x| x.to_device(device)).collect::<Result<Vec<_>>>()?;
    let dy = output_gradient(case, size, dtype)?.to_device(device)?;
    let times = case.largest_argument() / 2.;
    let given = Given { dims: &dims, view: View::Contiguous, times };
    Ok(run(|args| fused(case, size, args, drop), &bases, given, &dy)?.0)
}

/// What a case and each gradient give beyond the error that the naive formula in its dtype makes against the
/// formula in f64; nothing if they agree.
pub fn disagreements(
    case: &dyn Case,
    size: &[usize],
    view: View,
    drop_p: f32,
    dtype: DType,
    devices: &[Device],
) -> Result<Vec<String>> {
    disagreements_of(case, size, &case.arguments(size), view, drop_p, dtype, devices)
}

/// The same with arguments of these shapes.
pub fn disagreements_of(
    case: &dyn Case,
    size: &[usize],
    dims: &[Vec<usize>],
    view: View,
    drop_p: f32,
    dtype: DType,
    devices: &[Device],
) -> Result<Vec<String>> {
    let drop = mask(drop_p);
    let bases = bases(dims, view, dtype)?;
    let dy = output_gradient(case, size, dtype)?;
    let given = Given { dims, view, times: case.largest_argument() / 2. };
    let naive = |args: &[Tensor]| naive(case, size, args, &drop);
    let wide = bases.iter().map(|x| x.to_dtype(DType::F64)).collect::<Result<Vec<_>>>()?;
    let wide_dy = dy.to_dtype(DType::F64)?;
    let (results, args) = run(naive, &wide, given, &wide_dy)?;
    let exact = Exact { args: &args, dy: &wide_dy, results: &results, drop: &drop };
    let (naive, _) = run(naive, &bases, given, &dy)?;
    let mut found = Vec::new();
    for device in devices {
        if device.is_cuda() && !case.is_on_cuda(size, dtype) {
            continue;
        }
        let bases = bases.iter().map(|x| x.to_device(device)).collect::<Result<Vec<_>>>()?;
        let fused = |args: &[Tensor]| fused(case, size, args, &drop);
        let (ours, _) = run(fused, &bases, given, &dy.to_device(device)?)?;
        let beyond = beyond_the_naive_error(case, size, [&ours, &naive], &exact, dtype)?;
        let place = device.location();
        let what = format!("{case:?} {size:?} {view:?} drop_p {drop_p} {dtype:?} {place:?}");
        found.extend(beyond.into_iter().map(|beyond| format!("{what}: {beyond}")));
    }
    Ok(found)
}

/// Which results (output, then each gradient), ours and the naive ones, are further from the exact ones than
/// twice the naive formula is, which may be right by chance, and a rounding; and by how much.
pub fn beyond_the_naive_error(
    case: &dyn Case,
    size: &[usize],
    [ours, naive]: [&[Tensor]; 2],
    exact: &Exact<'_>,
    dtype: DType,
) -> Result<Vec<String>> {
    let (terms, epsilon) = (case.terms(exact)?, case.epsilon(size, dtype));
    let mut found = Vec::new();
    for (i, ((ours, naive), exact)) in ours.iter().zip(naive).zip(exact.results).enumerate() {
        let (ours, naive) = (error(ours, exact)?, error(naive, exact)?);
        let magnitude = largest(exact)?.max(terms.get(i).copied().unwrap_or(0.));
        if ours > 2. * naive + epsilon * magnitude {
            let what = if i == 0 { "output".into() } else { format!("gradient {i}") };
            found.push(format!("{what} is off by {ours:e}, the naive formula by {naive:e}"));
        }
    }
    Ok(found)
}

/// The gradient of `Σ y * dy`.
pub fn gradient(y: &Tensor, dy: &Tensor, var: &Var) -> Result<Tensor> {
    Ok((y * dy)?.backward()?.get(var).expect("a gradient").clone())
}

/// Asserts that two tensors have the same bits.
#[track_caller]
pub fn same_bits(ours: &Tensor, expected: &Tensor, what: &str) -> Result<()> {
    assert_eq!(bits(ours)?, bits(expected)?, "{what} in {:?}", expected.dtype());
    Ok(())
}
