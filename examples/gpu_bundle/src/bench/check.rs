//! Nothing is timed before it agrees with its formula.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_dropout::DropMask;
use cases::runner::{beyond_the_naive_error, judged, output_gradient};
use cases::{Case, Exact, drop_scale};

/// Tensors of at most so many elements are checked as a whole, of others some rows.
pub const WHOLE: usize = 1 << 20;

/// The output and each gradient of `call(args)` times `dy`, as they lie on the device.
fn with_gradients(
    call: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    args: &[Tensor],
    dy: &Tensor,
) -> Result<Vec<Tensor>> {
    let vars = args.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>()?;
    let tracked: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = call(&tracked)?;
    let grads = (&y * dy)?.backward()?;
    let mut results = vec![y];
    for (i, var) in vars.iter().enumerate() {
        results.push(grads.get(var).with_context(|| format!("no gradient {i}"))?.clone());
    }
    Ok(results)
}

/// Demands that the output and each gradient of a fused call are as near the formula in f64, with the same
/// mask, as the formula in the call's dtype is: on the whole tensor, or on some rows of it.
pub fn check(
    case: &dyn Case,
    size: &[usize],
    args: &[Tensor],
    drop: &DropMask,
    dtype: DType,
) -> Result<()> {
    let device = args[0].device();
    // A loss, or sums over rows.
    let has_no_rows = case.output(&case.arguments(size)).len() < args[0].rank();
    let dy = match has_no_rows {
        true => output_gradient(case, size, dtype)?.to_device(device)?,
        false => (args[0].flip(&[1])? * 0.5)?,
    };
    let constants = case.constants(size, dtype, device)?;
    let fused = |args: &[Tensor], constants: &[Tensor], drop: &DropMask| {
        judged(case.fused(args, constants, drop)?)
    };
    let ours = with_gradients(|args| fused(args, &constants, drop), args, &dy)?;
    let (rows, elements) = (size[0], size.iter().product::<usize>());
    let (count, starts) = match elements <= WHOLE {
        true => (rows, vec![0]),
        false => {
            let count = (WHOLE * rows / elements).clamp(1, rows.min(8));
            (count, vec![0, rows / 2, rows - count])
        }
    };
    for start in starts {
        let part = |x: &Tensor| -> candle_core::Result<Tensor> {
            // A bias and its gradient have no rows. Of a view all of x would travel.
            let rows = x.rank() >= 2;
            let x = if rows { x.narrow(0, start, count)?.force_contiguous()? } else { x.clone() };
            x.to_device(&Device::Cpu)
        };
        let parts = |all: &[Tensor]| all.iter().map(part).collect::<candle_core::Result<Vec<_>>>();
        let mut part_size = size.to_vec();
        part_size[0] = count;
        let constants = |dtype: DType, device: &Device| -> candle_core::Result<Vec<Tensor>> {
            if !case.is_loss() {
                return case.constants(&part_size, dtype, device);
            }
            let whole = case.constants(size, dtype, device)?;
            whole.iter().map(|x| x.narrow(0, start, count)).collect()
        };
        let mut at = vec![0; size.len()];
        at[0] = start;
        let (part_drop, cpu) = (case.window(drop, size, &at), &Device::Cpu);
        let keep = case.keep(&part_size, &part_drop)?;
        let formula = |dtype: DType, args: &[Tensor], dy: &Tensor| {
            let constants = constants(dtype, cpu)?;
            let scale = drop_scale(drop);
            let y = |args: &[Tensor]| judged(case.formula(args, &constants, &keep, scale)?);
            with_gradients(y, args, dy)
        };
        // A loss is the mean over all rows, to which these contribute so much.
        let share = if case.is_loss() { count as f64 / rows as f64 } else { 1. };
        let (part_args, dy) = (parts(args)?, (part(&dy)? * share)?);
        let wide = |x: &Tensor| x.to_dtype(DType::F64);
        let all_wide = |x: &[Tensor]| x.iter().map(wide).collect::<candle_core::Result<Vec<_>>>();
        let (wide_args, wide_dy) = (all_wide(&part_args)?, wide(&dy)?);
        let mut ours = parts(&ours)?;
        if has_no_rows {
            // The result of these rows alone; the gradient is that of the whole.
            let rows = part_args.iter().map(|x| x.to_device(device));
            let rows = rows.collect::<candle_core::Result<Vec<_>>>()?;
            ours[0] = fused(&rows, &constants(dtype, device)?, &part_drop)?.to_device(cpu)?;
        }
        let mut exact = formula(DType::F64, &wide_args, &wide_dy)?;
        let naive = formula(dtype, &part_args, &dy)?;
        if count < rows {
            // The gradient of a bias or a weight sums over all rows.
            let with_rows = args.iter().take_while(|x| x.rank() >= 2).count();
            exact.truncate(1 + with_rows);
        }
        let exact = Exact { args: &wide_args, dy: &wide_dy, results: &exact, drop: &part_drop };
        let (ours, naive) = (all_wide(&ours)?, all_wide(&naive)?);
        let beyond = beyond_the_naive_error(case, &part_size, [&ours, &naive], &exact, dtype)?;
        ensure!(beyond.is_empty(), "rows from {start} on: {}", beyond.join(", "));
    }
    Ok(())
}
