//! Every op against its naive formula, forward and each gradient, and what is true of all of them.

use candle_core::{DType, Device, Result, Tensor, Var};
use cases::runner::{
    SIZES, arguments, devices, disagreements, disagreements_of, fused, output_gradient, results,
};
use cases::{Case, Composed, DTYPES, View, bits, error, largest, mask};

/// For each op a module `<op>` with one test for each fact, `for_each_case(cases::<op>::CASES, <fact>)`, and in it a
/// module `composed` with those that are true of a composition of candle's ops, too.
macro_rules! facts {
    ($($op:ident),* $(,)?) => {$(
        mod $op {
            crate::facts! { @of $op, for_each_case:
                agrees_with_its_formula
                agrees_with_its_formula_however_its_arguments_lie
                is_empty_where_its_arguments_are
                has_the_gradients_of_finite_differences
                gives_tracked_arguments_alone_a_gradient
                gives_the_same_gradients_in_a_second_backward
                does_not_depend_on_the_number_of_threads
            }
            mod composed {
                crate::facts! { @of $op, for_each_composed_case:
                    agrees_with_its_formula
                    agrees_with_its_formula_however_its_arguments_lie
                    is_empty_where_its_arguments_are
                    has_the_gradients_of_finite_differences
                    gives_the_same_gradients_in_a_second_backward
                }
            }
        }
    )*};
    (@of $op:ident, $for_each:ident: $($fact:ident)*) => {$(
        #[test]
        fn $fact() {
            crate::$for_each(cases::$op::CASES, crate::$fact);
        }
    )*};
}
use facts;
cases::ops!(facts);

fn for_each_case(cases: &[&'static dyn Case], fact: fn(&dyn Case) -> Result<()>) {
    for case in cases {
        fact(*case).unwrap_or_else(|e| panic!("{case:?}: {e}"));
    }
}

fn for_each_composed_case(cases: &[&'static dyn Case], fact: fn(&dyn Case) -> Result<()>) {
    for case in cases {
        fact(&Composed(*case)).unwrap_or_else(|e| panic!("composed {case:?}: {e}"));
    }
}

const VIEWED_SIZES: [&[usize]; 7] =
    [&[5], &[5, 3], &[2, 3, 17], &[2, 3, 4, 5], &[37, 1031], &[2, 6, 5, 32], &[3, 14]];

fn agrees_with_its_formula(case: &dyn Case) -> Result<()> {
    for size in SIZES.iter().chain(case.awkward()).filter(|size| case.takes(size)) {
        for drop_p in case.drop_ps() {
            for dtype in DTYPES {
                let view = View::Contiguous;
                let found = disagreements(case, size, view, *drop_p, dtype, &devices())?;
                assert_eq!(found, [""; 0]);
            }
        }
    }
    Ok(())
}

fn agrees_with_its_formula_however_its_arguments_lie(case: &dyn Case) -> Result<()> {
    for size in VIEWED_SIZES.into_iter().filter(|size| case.takes(size)) {
        for view in [View::Transposed, View::Offset, View::Broadcast] {
            for dtype in DTYPES {
                let found = disagreements(case, size, view, 0.3, dtype, &devices())?;
                assert_eq!(found, [""; 0]);
            }
        }
    }
    Ok(())
}

fn is_empty_where_its_arguments_are(case: &dyn Case) -> Result<()> {
    for size in [&[0][..], &[3, 0], &[0, 4], &[2, 0, 3], &[0, 2, 4], &[2, 3, 0, 4]] {
        for (dtype, drop_p) in [(DType::F32, 0.3), (DType::BF16, 1.), (DType::F64, 0.)] {
            if !case.takes(size) {
                continue;
            }
            let dims = case.arguments(size);
            let vars = dims.iter().map(|dims| Var::zeros(dims.as_slice(), dtype, &Device::Cpu));
            let vars = vars.collect::<Result<Vec<_>>>()?;
            let y = fused(case, size, &tensors(&vars), &mask(drop_p))?;
            assert_eq!(y.dims(), case.output(&dims), "{case:?}");
            let grads = y.backward()?;
            for var in &vars {
                let grad = grads.get(var).unwrap_or_else(|| panic!("{case:?} {size:?} {drop_p}"));
                assert_eq!(grad.dims(), var.dims(), "{case:?}");
                // A bias reaches results that the empty arguments beside it have no part in.
                let is_reached = y.elem_count() > 0 && var.elem_count() > 0;
                assert!(
                    is_reached || largest(&grad.to_dtype(DType::F64)?)? == 0.,
                    "{case:?} {size:?}"
                );
            }
        }
    }
    Ok(())
}

fn tensors(vars: &[Var]) -> Vec<Tensor> {
    vars.iter().map(|var| var.as_tensor().clone()).collect()
}

/// The derivative of `Σ w * op(args)` by each element of argument `i`, from differences of the op
/// itself, equals the gradient that backward gives.
fn has_the_gradients_of_finite_differences(case: &dyn Case) -> Result<()> {
    const STEP: f64 = 1e-5;
    let (size, drop) = (case.fitting(&[3, 7]), mask(0.3));
    let args = arguments(case, &size, DType::F64)?;
    let w = output_gradient(case, &size, DType::F64)?;
    let weighted = |args: &[Tensor]| fused(case, &size, args, &drop)? * &w;
    let vars = args.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let grads = weighted(&tensors(&vars))?.backward()?;
    for (i, arg) in args.iter().enumerate() {
        let grad = grads.get(&vars[i]).unwrap().flatten_all()?.to_vec1::<f64>()?;
        let values = arg.flatten_all()?.to_vec1::<f64>()?;
        for (j, grad) in grad.iter().enumerate() {
            let loss_at = |step: f64| {
                let (mut args, mut values) = (args.clone(), values.clone());
                values[j] += step;
                args[i] = Tensor::from_vec(values, arg.dims(), &Device::Cpu)?;
                weighted(&args)?.sum_all()?.to_scalar::<f64>()
            };
            let difference = (loss_at(STEP)? - loss_at(-STEP)?) / (2. * STEP);
            assert!((difference - grad).abs() < 1e-8, "{case:?} argument {i} element {j}");
        }
    }
    Ok(())
}

fn gives_tracked_arguments_alone_a_gradient(case: &dyn Case) -> Result<()> {
    let (size, drop) = (case.fitting(&[4, 9]), mask(0.3));
    let args = arguments(case, &size, DType::F32)?;
    let vars = args.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let all = tensors(&vars);
    let expected = fused(case, &size, &all, &drop)?.backward()?;
    for tracked in 0..args.len() {
        let mut some = args.clone();
        some[tracked] = all[tracked].clone();
        let grads = fused(case, &size, &some, &drop)?.backward()?;
        let grad = grads.get(&vars[tracked]).unwrap().to_dtype(DType::F64)?;
        let expected = expected.get(&vars[tracked]).unwrap().to_dtype(DType::F64)?;
        let bound = f64::from(f32::EPSILON) * largest(&expected)?;
        assert!(error(&grad, &expected)? <= bound, "{case:?} argument {tracked}");
        for (i, arg) in args.iter().enumerate().filter(|(i, _)| *i != tracked) {
            assert!(grads.get(arg).is_none(), "{case:?}: argument {i} asked for no gradient");
        }
    }
    Ok(())
}

fn gives_the_same_gradients_in_a_second_backward(case: &dyn Case) -> Result<()> {
    let size = case.fitting(&[4, 9]);
    let args = arguments(case, &size, DType::F32)?;
    let vars = args.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let y = fused(case, &size, &tensors(&vars), &mask(0.3))?.sqr()?;
    let (first, second) = (y.backward()?, y.backward()?);
    for var in &vars {
        assert_eq!(bits(first.get(var).unwrap())?, bits(second.get(var).unwrap())?, "{case:?}");
    }
    Ok(())
}

fn does_not_depend_on_the_number_of_threads(case: &dyn Case) -> Result<()> {
    let (size, drop) = (case.fitting(&[700, 257]), mask(0.4));
    for dtype in DTYPES {
        let on = |threads: usize| -> Result<Vec<Vec<u64>>> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let results = pool.install(|| results(case, &size, &drop, dtype, &Device::Cpu))?;
            results.iter().map(bits).collect()
        };
        assert_eq!(on(1)?, on(2)?, "{case:?} {dtype:?}");
    }
    Ok(())
}

#[test]
fn an_additive_mask_and_its_gradient_agree_however_it_is_broadcast() -> Result<()> {
    let case = cases::softmax_dropout::CASES.iter().find(|case| case.name().ends_with("additive"));
    let (case, scores) = (*case.expect("a case"), [2usize, 3, 4, 5]);
    let mut forms: Vec<Vec<usize>> = vec![vec![], vec![1], vec![5], vec![4, 1], vec![4, 5]];
    forms.extend([vec![3, 1, 1], vec![3, 1, 5], vec![1, 4, 5], vec![3, 4, 5]]);
    // Every dimension of its full size or 1.
    for full in 0..16 {
        forms.push((0..4).map(|d| if full >> d & 1 == 1 { scores[d] } else { 1 }).collect());
    }
    for form in forms {
        for dtype in DTYPES {
            let (dims, view) = ([scores.to_vec(), form.clone()], View::Contiguous);
            let found = disagreements_of(case, &scores, &dims, view, 0.3, dtype, &devices())?;
            assert_eq!(found, [""; 0]);
        }
    }
    Ok(())
}

#[test]
fn every_case_has_a_name_of_its_own() {
    let mut names: Vec<_> = cases::cases().map(|case| case.name()).collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all);
}
