//! Stochastic depth that computes only the kept samples equals the one that computes them all.

use std::cell::Cell;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{StochasticDepth, drop_path_add, drop_path_kept};
use candle_dropout::{DropMask, DropPath, MaskGenerator, MaskKey};
use cases::{bits, random};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];
const N: usize = 6;

fn kept(drop: &DropMask, depth: StochasticDepth) -> usize {
    let samples = if depth == StochasticDepth::Row { N } else { 1 };
    let keep = drop.to_tensor((1, samples), &Device::Cpu).unwrap();
    bits(&keep).unwrap().iter().sum::<u64>() as usize * N / samples
}

/// Masks that keep some samples, all of them, none of them, by chance and by rate.
fn masks(depth: StochasticDepth) -> Vec<DropMask> {
    let find = |drop_p: f32, wanted: &dyn Fn(usize) -> bool| {
        let masks = (0..).map(|key| DropMask::new(drop_p, MaskKey::new(key)).unwrap());
        masks.into_iter().find(|drop| wanted(kept(drop, depth))).unwrap()
    };
    let mut masks = vec![
        find(0.4, &|kept| kept == N),
        find(0.4, &|kept| kept == 0),
        find(0., &|_| true),
        find(1., &|_| true),
    ];
    if depth == StochasticDepth::Row {
        masks.extend([find(0.4, &|kept| kept == 1), find(0.1, &|kept| kept == N - 1)]);
    }
    masks
}

/// Treats each sample by itself: `tanh(x * weight)` of twice as many channels.
fn branch(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Tensor::cat(&[x, x], 1)?.broadcast_mul(weight)?.tanh()
}

/// Asserts that two tensors are equal, up to the signs of zeros.
#[track_caller]
fn equal(a: &Tensor, b: &Tensor, what: &str) -> Result<()> {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()), "{what}");
    assert!(bits(&(a - b)?.ne(0.)?)?.iter().all(|differs| *differs == 0), "{what}");
    Ok(())
}

#[test]
fn output_and_gradients_are_those_of_the_masking_form() -> Result<()> {
    for dtype in DTYPES {
        for depth in [StochasticDepth::Row, StochasticDepth::Batch] {
            for drop in masks(depth) {
                let x = Var::from_tensor(&random(&[N, 3, 5], dtype, 1)?)?;
                let residual = Var::from_tensor(&random(&[N, 6, 5], dtype, 2)?)?;
                let weight = Var::from_tensor(&random(&[1, 6, 1], dtype, 3)?)?;
                let dy = random(&[N, 6, 5], dtype, 4)?;
                let what = format!("{dtype:?} {depth:?}, {} kept", kept(&drop, depth));

                // Inner nodes of the graph, and views.
                let views = || Ok::<_, candle_core::Error>(((&*x * 2.)?, (&*residual * 0.5)?));
                let (x_view, residual_view) = views()?;
                let ours = drop_path_kept(&x_view, &residual_view, depth, &drop, |x| {
                    assert_eq!(x.dim(0)?, kept(&drop, depth));
                    branch(x, &weight)
                })?;
                let (x_view, residual_view) = views()?;
                let theirs =
                    drop_path_add(&branch(&x_view, &weight)?, &residual_view, depth, &drop)?;
                equal(&ours, &theirs, &what)?;

                let (grads, expected) = ((ours * &dy)?.backward()?, (theirs * &dy)?.backward()?);
                for var in [&x, &residual] {
                    let grad = grads.get(var).expect("a gradient");
                    equal(grad, expected.get(var).expect("a gradient"), &what)?;
                }
                let dweight = expected.get(&weight).expect("a gradient");
                match grads.get(&weight) {
                    // The sum of other terms, of which some are 0.
                    Some(ours) if dtype == DType::F64 => {
                        let off = (ours - dweight)?.abs()?.max_all()?.to_scalar::<f64>()?;
                        assert!(off < 1e-13, "{what}: {off}");
                    }
                    Some(_) => assert!(kept(&drop, depth) > 0, "{what}"),
                    None => assert_eq!(kept(&drop, depth), 0, "{what}"),
                }
            }
        }
    }
    Ok(())
}

#[test]
fn x_may_be_the_residual_itself() -> Result<()> {
    for drop in masks(StochasticDepth::Row) {
        let x = Var::from_tensor(&random(&[N, 7], DType::F32, 1)?)?;
        let run = |y: Tensor| -> Result<[Tensor; 2]> {
            let grads = y.sqr()?.backward()?;
            Ok([y, grads.get(&x).expect("a gradient").clone()])
        };
        let row = StochasticDepth::Row;
        let ours = run(drop_path_kept(&x, &x, row, &drop, |x| x.sqr())?)?;
        let theirs = run(drop_path_add(&x.sqr()?, &x, row, &drop)?)?;
        equal(&ours[0], &theirs[0], "output")?;
        equal(&ours[1], &theirs[1], "gradient")?;
    }
    Ok(())
}

#[test]
fn the_branch_of_dropped_samples_is_never_computed() -> Result<()> {
    let x = random(&[N, 4], DType::F32, 1)?;
    for drop in masks(StochasticDepth::Row) {
        let keep = bits(&drop.to_tensor((1, N), &Device::Cpu)?)?;
        let seen = Cell::new(0);
        let y = drop_path_kept(&x, &x, StochasticDepth::Row, &drop, |kept| {
            seen.set(kept.dim(0)?);
            Ok(kept.clone())
        })?;
        assert_eq!(seen.get(), kept(&drop, StochasticDepth::Row));
        for (sample, keep) in keep.iter().enumerate() {
            let same = bits(&y.narrow(0, sample, 1)?)? == bits(&x.narrow(0, sample, 1)?)?;
            assert_eq!(same, *keep == 0, "sample {sample}");
        }
    }
    Ok(())
}

#[test]
fn shards_keep_the_samples_of_the_whole() -> Result<()> {
    let drop = DropMask::new(0.4, MaskKey::new(9))?;
    let (x, residual) = (random(&[23, 5], DType::F32, 1)?, random(&[23, 5], DType::F32, 2)?);
    let run = |x: &Tensor, residual: &Tensor, drop: &DropMask| {
        drop_path_kept(x, residual, StochasticDepth::Row, drop, |x| x.sqr())
    };
    let whole = run(&x, &residual, &drop)?;
    let parts = [(0, 7), (7, 1), (8, 15)].map(|(start, len)| {
        let part = |x: &Tensor| x.narrow(0, start, len);
        run(&part(&x)?, &part(&residual)?, &drop.window(&[1, 23], &[0, start]))
    });
    let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
    assert_eq!(bits(&Tensor::cat(&parts, 0)?)?, bits(&whole)?);
    Ok(())
}

#[test]
fn gradients_equal_finite_differences() -> Result<()> {
    const STEP: f64 = 1e-5;
    let drop = DropMask::new(0.4, MaskKey::new(5))?;
    let dims = [[N, 2], [N, 2]];
    let args = [random(&dims[0], DType::F64, 1)?, random(&dims[1], DType::F64, 2)?];
    let w = random(&[N, 2], DType::F64, 3)?;
    let loss = |[x, residual]: [&Tensor; 2]| {
        let y = drop_path_kept(x, residual, StochasticDepth::Row, &drop, |x| x.sqr())?;
        (y * &w)?.sum_all()
    };
    let vars = [Var::from_tensor(&args[0])?, Var::from_tensor(&args[1])?];
    let grads = loss([&vars[0], &vars[1]])?.backward()?;
    for i in 0..2 {
        let grad = grads.get(&vars[i]).expect("a gradient").flatten_all()?.to_vec1::<f64>()?;
        let values = args[i].flatten_all()?.to_vec1::<f64>()?;
        for (j, grad) in grad.iter().enumerate() {
            let loss_at = |step: f64| {
                let mut values = values.clone();
                values[j] += step;
                let moved = Tensor::from_vec(values, args[i].dims(), &Device::Cpu)?;
                let moved = if i == 0 { [&moved, &args[1]] } else { [&args[0], &moved] };
                loss(moved)?.to_scalar::<f64>()
            };
            let difference = (loss_at(STEP)? - loss_at(-STEP)?) / (2. * STEP);
            assert!((difference - grad).abs() < 1e-8, "argument {i} element {j}");
        }
    }
    Ok(())
}

#[test]
fn a_second_backward_gives_the_same_gradients() -> Result<()> {
    for drop in masks(StochasticDepth::Row) {
        let x = Var::from_tensor(&random(&[N, 4], DType::F32, 1)?)?;
        let y = drop_path_kept(&x, &x, StochasticDepth::Row, &drop, |x| x.sqr())?.sqr()?;
        let (first, second) = (y.backward()?, y.backward()?);
        let grad =
            |grads: &candle_core::backprop::GradStore| bits(grads.get(&x).expect("a gradient"));
        assert_eq!(grad(&first)?, grad(&second)?);
    }
    Ok(())
}

#[test]
fn the_layer_draws_one_key_a_call_and_the_masks_of_forward_add() -> Result<()> {
    let x = random(&[N, 4], DType::F32, 1)?;
    for mode in [StochasticDepth::Row, StochasticDepth::Batch] {
        for drop_p in [0., 0.4, 1.] {
            let layer = || -> (Arc<MaskGenerator>, DropPath) {
                let generator = Arc::new(MaskGenerator::new(3));
                (generator.clone(), DropPath::new(drop_p, generator).unwrap().with_mode(mode))
            };
            let ((ours, kept), (theirs, masked)) = (layer(), layer());
            for train in [true, true, false, true] {
                let y = kept.forward_kept(&x, &x, train, |x| x.sqr())?;
                equal(&y, &masked.forward_add(&x.sqr()?, &x, train)?, "output")?;
            }
            assert_eq!((ours.state(), ours.state().counter), (theirs.state(), 3));
        }
    }
    Ok(())
}

/// Asserts that a call fails and that its message holds every fragment.
#[track_caller]
fn fails(result: Result<Tensor>, fragments: &[&str]) {
    let error = result.expect_err("an error").to_string();
    for fragment in fragments {
        assert!(error.contains(fragment), "{fragment:?} is missing from: {error}");
    }
}

#[test]
fn errors_name_op_argument_expected_got_and_remedy() -> Result<()> {
    let x = random(&[N, 4], DType::F32, 1)?;
    let row = StochasticDepth::Row;
    let never = |_: &Tensor| -> Result<Tensor> { panic!("checked before the branch runs") };
    let [whole, some] = [DropMask::none(), masks(row).remove(4)];
    let scalar = Tensor::new(1f32, &Device::Cpu)?;
    let integers = x.to_dtype(DType::I64)?;
    for drop in [&whole, &some] {
        let kept = kept(drop, row);
        fails(
            drop_path_kept(&scalar, &scalar, row, drop, never),
            &["drop_path_kept: x, residual: expected a batch dimension, got [] and []"],
        );
        fails(
            drop_path_kept(&x, &x.narrow(0, 0, 5)?, row, drop, never),
            &["drop_path_kept: residual: expected 6 samples like x [6, 4], got [5, 4]"],
        );
        fails(
            drop_path_kept(&integers, &x, row, drop, never),
            &["drop_path_kept: x: expected dtype", "got I64"],
        );
        fails(
            drop_path_kept(&x, &integers, row, drop, never),
            &["drop_path_kept: residual: expected dtype", "got I64"],
        );
        fails(
            drop_path_kept(&x, &x, row, &drop.window(&[5], &[0]), never),
            &["drop_path_kept: drop.window: expected", "of rank 2 like the mask [1, 6]"],
        );
        fails(
            drop_path_kept(&x, &x, row, drop, |kept| kept.narrow(1, 0, 3)),
            &[&format!("branch: expected shape [{kept}, 4], the kept samples"), "reshape"],
        );
        fails(
            drop_path_kept(&x, &x, row, drop, |kept| kept.to_dtype(DType::BF16)),
            &["drop_path_kept: branch: expected dtype F32", "got BF16"],
        );
        fails(
            drop_path_kept(&x, &x, row, drop, |_| candle_core::bail!("of the branch")),
            &["of the branch"],
        );
    }
    Ok(())
}
