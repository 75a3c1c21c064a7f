//! The cross entropy: what halves are computed in, large logits, ignored rows, PyTorch's figures, and
//! what is refused.

mod far;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_dropout::functional::{CrossEntropyConfig, Reduction, counted_targets, cross_entropy};
use cases::{bits, random};

fn targets(rows: usize, classes: usize) -> Result<Tensor> {
    let target = |row: usize| if row % 7 == 2 { -100 } else { ((row * 31 + 5) % classes) as i64 };
    Tensor::from_vec((0..rows).map(target).collect::<Vec<_>>(), rows, &Device::Cpu)
}

fn smoothed(label_smoothing: f64) -> CrossEntropyConfig {
    CrossEntropyConfig { label_smoothing, ..Default::default() }
}

/// The loss and the gradient of `7 loss`.
fn run(logits: &Tensor, targets: &Tensor, config: &CrossEntropyConfig) -> Result<[Tensor; 2]> {
    let var = Var::from_tensor(logits)?;
    let loss = cross_entropy(&var, targets, config)?;
    let grads = (&loss * 7.)?.backward()?;
    Ok([loss, grads.get(&var).expect("a gradient").clone()])
}

#[test]
fn halves_give_the_loss_and_the_rounded_gradient_of_the_same_numbers_in_f32() -> Result<()> {
    for (rows, classes) in [(1, 1), (5, 3), (33, 257), (7, 5003)] {
        for config in [smoothed(0.), smoothed(0.2)] {
            for dtype in [DType::F16, DType::BF16] {
                let logits = random(&[rows, classes], dtype, 1)?;
                let targets = targets(rows, classes)?;
                let [loss, grad] = run(&logits, &targets, &config)?;
                let [exact, exact_grad] = run(&logits.to_dtype(DType::F32)?, &targets, &config)?;
                assert_eq!([loss.dtype(), grad.dtype()], [DType::F32, dtype]);
                assert_eq!(bits(&loss)?, bits(&exact)?);
                // Equal up to the sign of a gradient that rounds to 0.
                let off = (&grad - exact_grad.to_dtype(dtype)?)?.ne(0.)?;
                assert_eq!(bits(&off)?, vec![0; rows * classes]);
            }
        }
    }
    Ok(())
}

/// `torch.nn.functional.cross_entropy` of PyTorch 2.11 in f64, its loss and gradient.
#[test]
fn figures_are_those_of_pytorch() -> Result<()> {
    let logits = Tensor::new(&[[1f64, 2., -0.5], [0.25, -3., 1.5], [4., 4., 4.]], &Device::Cpu)?;
    let targets = Tensor::new(&[2i64, -100, 0], &Device::Cpu)?;
    for (eps, loss, gradient) in PYTORCH {
        let [ours, grad] = run(&logits, &targets, &smoothed(eps))?;
        assert!((ours.to_scalar::<f64>()? - loss).abs() < 1e-14);
        for (ours, theirs) in grad.flatten_all()?.to_vec1::<f64>()?.iter().zip(gradient) {
            assert!((ours - 7. * theirs).abs() < 1e-14);
        }
    }
    Ok(())
}

const PYTORCH: [(f64, f64, [f64; 9]); 2] = [
    (
        0.0,
        1.9850756602603963,
        [
            0.12685809081751262,
            0.3448360430622518,
            -0.47169413387976433,
            0.0,
            0.0,
            0.0,
            -0.33333333333333337,
            0.16666666666666666,
            0.16666666666666666,
        ],
    ),
    (
        0.1,
        1.9184089935937296,
        [
            0.11019142415084596,
            0.32816937639558513,
            -0.438360800546431,
            0.0,
            0.0,
            0.0,
            -0.30000000000000004,
            0.15,
            0.15,
        ],
    ),
];

#[test]
fn what_logits_have_in_common_changes_neither_loss_nor_gradient() -> Result<()> {
    for (offset, config) in [-3e4, 0., 3e4]
        .into_iter()
        .flat_map(|offset| [0., 0.1, 1.].map(|label_smoothing| (offset, smoothed(label_smoothing))))
    {
        let logits = Tensor::new(&[[0f32, 1., 2., 3.], [3., 3., -9., 0.]], &Device::Cpu)?;
        let targets = Tensor::new(&[3u32, 2], &Device::Cpu)?;
        let [loss, grad] = run(&(&logits + offset)?, &targets, &config)?;
        let [exact, exact_grad] = run(&logits.to_dtype(DType::F64)?, &targets, &config)?;
        let off = loss.to_dtype(DType::F64)?.to_scalar::<f64>()? - exact.to_scalar::<f64>()?;
        assert!(off.abs() < 1e-6, "{off}");
        let off = (grad.to_dtype(DType::F64)? - exact_grad)?.abs()?.max_all()?;
        assert!(off.to_scalar::<f64>()? < 7. * 1e-6 / 2., "{off}");
    }
    Ok(())
}

#[test]
fn sums_over_micro_batches_weigh_every_token_alike() -> Result<()> {
    let (logits, rows) = (random(&[110, 37], DType::F64, 1)?, [10, 100]);
    let targets = targets(110, 37)?;
    for (label_smoothing, z_loss) in [(0., 0.), (0.1, 1e-2)] {
        let of = |reduction| CrossEntropyConfig { z_loss, reduction, ..smoothed(label_smoothing) };
        let var = Var::from_tensor(&logits)?;
        let whole = cross_entropy(&var, &targets, &of(Reduction::Mean))?;
        let expected = whole.backward()?.get(&var).expect("a gradient").clone();
        let count = counted_targets(&targets, &of(Reduction::Sum))?;
        assert_eq!(count, (0..110).filter(|row| row % 7 != 2).count());
        let (mut loss, mut grad) = (0., logits.zeros_like()?);
        let mut start = 0;
        for rows in rows {
            let (logits, targets) = (var.narrow(0, start, rows)?, targets.narrow(0, start, rows)?);
            let sum = cross_entropy(&logits, &targets, &of(Reduction::Sum))?;
            let part = (sum / count as f64)?;
            loss += part.to_scalar::<f64>()?;
            grad = (grad + part.backward()?.get(&var).expect("a gradient"))?;
            start += rows;
        }
        assert!((loss - whole.to_scalar::<f64>()?).abs() < 1e-13);
        assert!((grad - expected)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-15);
    }
    Ok(())
}

#[test]
fn targets_are_counted_in_either_dtype_with_and_without_an_ignored_one() -> Result<()> {
    let targets = Tensor::new(&[[1i64, -100, 3], [3, 3, -100]], &Device::Cpu)?;
    let ignoring = |ignore_index| CrossEntropyConfig { ignore_index, ..Default::default() };
    assert_eq!(counted_targets(&targets, &ignoring(Some(-100)))?, 4);
    assert_eq!(counted_targets(&targets, &ignoring(Some(3)))?, 3);
    assert_eq!(counted_targets(&targets, &ignoring(None))?, 6);
    let targets = Tensor::new(&[7u32, u32::MAX, 7], &Device::Cpu)?;
    assert_eq!(counted_targets(&targets, &ignoring(Some(u32::MAX.into())))?, 2);
    assert_eq!(counted_targets(&targets, &ignoring(Some(-100)))?, 3);
    assert_eq!(counted_targets(&targets.narrow(0, 0, 0)?, &ignoring(Some(7)))?, 0);
    let many = Tensor::zeros(70_000, DType::U32, &Device::Cpu)?;
    assert_eq!(counted_targets(&many, &ignoring(Some(1)))?, 70_000);
    Ok(())
}

#[test]
fn a_masked_target_has_an_infinite_loss_and_finite_gradients() -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::F64] {
        let logits = Tensor::new(&[[f32::NEG_INFINITY, 1., 2.]], &Device::Cpu)?.to_dtype(dtype)?;
        let targets = Tensor::new(&[0u32], &Device::Cpu)?;
        for label_smoothing in [0., 0.1, 1.] {
            let [loss, grad] = run(&logits, &targets, &smoothed(label_smoothing))?;
            assert_eq!(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?, f32::INFINITY);
            let grad = grad.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            assert!(grad.iter().all(|d| d.is_finite()), "{grad:?}");
        }
    }
    Ok(())
}

#[test]
fn a_masked_class_has_probability_0() -> Result<()> {
    let masked = f32::NEG_INFINITY;
    let logits = Tensor::new(&[[masked, 1., 2.], [masked, masked, 5.]], &Device::Cpu)?;
    let targets = Tensor::new(&[1u32, 2], &Device::Cpu)?;
    let [loss, grad] = run(&logits, &targets, &smoothed(0.))?;
    assert!((loss.to_scalar::<f32>()? - (1. + 1f32.exp()).ln() / 2.).abs() < 1e-6);
    let grad = grad.to_vec2::<f32>()?;
    assert_eq!([grad[0][0], grad[1][0], grad[1][1], grad[1][2]], [0.; 4]);
    Ok(())
}

#[test]
fn ignored_rows_count_nothing_whatever_they_hold() -> Result<()> {
    let (clean, bad) =
        (random(&[4, 300], DType::F32, 1)?, Tensor::full(f32::NAN, (2, 300), &Device::Cpu)?);
    let logits = Tensor::cat(&[&clean.narrow(0, 0, 2)?, &bad, &clean.narrow(0, 2, 2)?], 0)?;
    for (dtype, ignored) in [(DType::I64, -100), (DType::I64, 8), (DType::U32, i64::from(u32::MAX))]
    {
        let config = CrossEntropyConfig { ignore_index: Some(ignored), ..smoothed(0.1) };
        let targets = |targets: &[i64]| Tensor::new(targets, &Device::Cpu)?.to_dtype(dtype);
        let [loss, grad] = run(&logits, &targets(&[1, 2, ignored, ignored, 3, 4])?, &config)?;
        let [expected, expected_grad] = run(&clean, &targets(&[1, 2, 3, 4])?, &config)?;
        assert_eq!(bits(&loss)?, bits(&expected)?);
        let part = |at| grad.narrow(0, at, 2);
        assert_eq!(bits(&Tensor::cat(&[part(0)?, part(4)?], 0)?)?, bits(&expected_grad)?);
        assert_eq!(bits(&part(2)?)?, [0; 600]);
    }
    Ok(())
}

#[test]
fn if_every_row_is_ignored_loss_and_gradient_are_0() -> Result<()> {
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        for rows in [0, 3] {
            let targets = Tensor::full(-100i64, rows, &Device::Cpu)?;
            let [loss, grad] = run(&random(&[rows, 5], dtype, 1)?, &targets, &smoothed(0.1))?;
            assert_eq!(bits(&loss)?, [0]);
            assert!(bits(&grad)?.iter().all(|bits| *bits == 0));
            assert_eq!(grad.dims(), [rows, 5]);
        }
    }
    Ok(())
}

#[test]
fn the_loss_agrees_with_the_formula_over_a_large_vocabulary() -> Result<()> {
    let logits = (random(&[9, 50_257], DType::F64, 1)? * 4.)?;
    let targets = targets(9, 50_257)?;
    for config in [smoothed(0.), smoothed(0.1)] {
        let exact =
            cases::cross_entropy::formula(&logits, &targets, &config)?.to_scalar::<f64>()?;
        let ours = run(&logits.to_dtype(DType::F32)?, &targets, &config)?;
        let off = f64::from(ours[0].to_scalar::<f32>()?) / exact - 1.;
        assert!(off.abs() < 2e-7, "off by {off}");
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
    let config = CrossEntropyConfig::default();
    let logits = random(&[2, 3, 5], DType::F32, 1)?;
    let targets = Tensor::zeros((2, 3), DType::U32, &Device::Cpu)?;
    let call = |logits: &Tensor, targets: &Tensor| cross_entropy(logits, targets, &config);
    fails(
        call(&logits.to_dtype(DType::I64)?, &targets),
        &["cross_entropy: logits: expected dtype", "got I64", "to_dtype"],
    );
    let scalar = Tensor::new(1f32, &Device::Cpu)?;
    fails(call(&scalar, &targets), &["cross_entropy: logits: expected [.., V], got a scalar"]);
    fails(
        call(&logits, &targets.flatten_all()?),
        &["cross_entropy: targets: expected shape [2, 3]", "got [6]; reshape"],
    );
    fails(
        call(&logits, &targets.to_dtype(DType::F32)?),
        &["cross_entropy: targets: expected dtype u32 or i64, got F32", "to_dtype"],
    );
    let empty = Tensor::zeros((2, 3, 0), DType::F32, &Device::Cpu)?;
    fails(call(&empty, &targets), &["expected at least one class, got [2, 3, 0]"]);
    for label_smoothing in [-0.1, 1.1, f64::NAN] {
        fails(
            cross_entropy(&logits, &targets, &smoothed(label_smoothing)),
            &["cross_entropy: label_smoothing: expected a number from 0 to 1, got"],
        );
    }
    for z_loss in [-1e-4, f64::INFINITY, f64::NAN] {
        let config = CrossEntropyConfig { z_loss, ..smoothed(0.) };
        fails(
            cross_entropy(&logits, &targets, &config),
            &["cross_entropy: z_loss: expected a finite number of at least 0, got"],
        );
    }
    let counted = counted_targets(&targets.to_dtype(DType::F32)?, &config);
    let error = counted.expect_err("an error").to_string();
    assert!(
        error.contains("cross_entropy: targets: expected dtype u32 or i64, got F32"),
        "{error}"
    );
    for (bad, ignore_index) in [(5, Some(-100)), (-1, Some(-100)), (-100, None), (i64::MIN, None)] {
        let targets = Tensor::new(&[[0i64, 1, 2], [bad, 0, 0]], &Device::Cpu)?;
        let config = CrossEntropyConfig { ignore_index, ..Default::default() };
        let expected = format!("below V = 5 or ignore_index, got {bad} in row 3; was the text");
        fails(cross_entropy(&logits, &targets, &config), &[&expected]);
    }
    Ok(())
}
