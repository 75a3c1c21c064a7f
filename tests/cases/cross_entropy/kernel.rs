//! `kernels/cross_entropy.cu` against its formula in f64.
//!
//! One text, though long: grids, rows far from 0, and the mutants that these catch, of one kernel file.

use std::cell::Cell;

use candle_core::DType;
use candle_dropout::functional::{CrossEntropyArgs, CrossEntropyConfig, Reduction};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::host::*;

static KERNELS: Program = Program::new("kernels/cross_entropy.cu");

/// Fewer classes than a vector; rows that begin anywhere; teams of 4, 8 and 32 lanes; a whole block a
/// row, and several stretches of it; more rows than a grid holds at once.
const SHAPES: &[[usize; 2]] =
    &[[1, 1], [5, 3], [70, 16], [9, 61], [600, 96], [11, 256], [4, 1025], [3, 2048], [2, 9001]];

struct Form {
    rows: usize,
    classes: usize,
    smoothing: f64,
    z_loss: f64,
    ignore_index: Option<i64>,
    /// Elements that logits and their gradient lie behind a 16-byte boundary.
    offsets: [usize; 2],
    /// All logits are -inf but for those of the targets and one.
    one_hot: bool,
}

fn forms() -> Vec<Form> {
    let mut forms = Vec::new();
    for &[rows, classes] in SHAPES {
        for (smoothing, z_loss, ignore_index, offsets, one_hot) in [
            (0., 0., None, [0, 0], false),
            (0.1, 0., Some(-100), [0, 0], false),
            (1., 0.01, Some(0), [1, 1], false),
            (0.3, 0., None, [3, 0], false),
            (0., 0.01, Some(-100), [0, 2], true),
        ] {
            forms.push(Form { rows, classes, smoothing, z_loss, ignore_index, offsets, one_hot });
        }
    }
    forms
}

#[derive(Default)]
struct Expected {
    values: Vec<f64>,
    terms: Vec<f64>,
}

impl Expected {
    fn push(&mut self, value: f64, terms: f64) {
        self.values.push(value);
        self.terms.push(terms);
    }
}

/// Losses of the rows, their maxima and sums, and the gradient.
fn formula<T: Element>(
    form: &Form,
    logits: &[T],
    targets: &[i64],
    scale: f64,
) -> (Expected, Expected, Expected) {
    let (mut losses, mut statistics, mut gradient) =
        (Expected::default(), Expected::default(), Expected::default());
    let uniform = form.smoothing / form.classes as f64;
    for (row, target) in logits.chunks(form.classes).zip(targets) {
        if Some(*target) == form.ignore_index {
            losses.push(0., 0.);
            statistics.push(0., 0.);
            statistics.push(1., 1.);
            row.iter().for_each(|_| gradient.push(0., 0.));
            continue;
        }
        let x: Vec<f64> = row.iter().map(|x| x.to_f64()).collect();
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
        let lse = max + sum.ln();
        let q = |j: usize| uniform + if j as i64 == *target { 1. - form.smoothing } else { 0. };
        let loss: f64 = (0..x.len()).filter(|j| q(*j) > 0.).map(|j| q(j) * (lse - x[j])).sum();
        let z = form.z_loss * lse * lse;
        let lse_terms = max.abs() + sum.ln();
        losses.push(loss + z, 1. + loss + form.z_loss * lse_terms * lse_terms);
        statistics.push(max, max.abs());
        statistics.push(sum, sum);
        let factor = 1. + 2. * form.z_loss * lse;
        let factor_terms = 1. + 2. * form.z_loss * lse_terms;
        for (j, x) in x.iter().enumerate() {
            // The exponent is off by the rounding of a difference of logits.
            let p = (x - lse).exp();
            let p_terms = if p == 0. { 0. } else { p * factor_terms * (1. + max - x) };
            let terms = (p_terms + q(j)) * scale;
            gradient.push((p * factor - q(j)) * scale, terms);
        }
    }
    (losses, statistics, gradient)
}

fn inputs<T: Element>(form: &Form) -> (Vec<T>, Vec<i64>) {
    let target = |row: usize| match row % 4 {
        1 => form.ignore_index.unwrap_or(0),
        _ => ((row * 7919 + 3) % form.classes) as i64,
    };
    let targets: Vec<i64> = (0..form.rows).map(target).collect();
    let mut logits: Vec<T> = random(1, form.rows * form.classes);
    for (row, logits) in logits.chunks_mut(form.classes).enumerate() {
        let last = form.classes - 1;
        for (j, logit) in logits.iter_mut().enumerate() {
            if form.one_hot && j != last && j as i64 != targets[row] {
                *logit = T::from_f64(f64::NEG_INFINITY);
            } else {
                // Far from 0, below it in every other row; growing along the row, in one form so much that
                // exponentials of differences from the first logits overflow.
                let center = if row % 2 == 0 { -9. } else { 9. };
                let growth = if form.smoothing == 0.3 { 150. } else { 1. };
                let along = j as f64 / form.classes as f64;
                *logit = T::from_f64(logit.to_f64() + center + growth * along);
            }
        }
    }
    (logits, targets)
}

fn equals_the_formula<T: Element>() {
    const DLOSS: f32 = 0.75;
    let forms = forms();
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for (at, form) in forms.iter().enumerate() {
        let &Form { rows, classes, .. } = form;
        let (logits, targets) = inputs::<T>(form);
        let config = CrossEntropyConfig {
            label_smoothing: form.smoothing,
            ignore_index: form.ignore_index,
            z_loss: form.z_loss,
            ..Default::default()
        };
        let args = CrossEntropyArgs::new(rows, classes, &config);
        let count = targets.iter().filter(|target| Some(**target) != form.ignore_index).count();
        let row_weight = 1. / count.max(1) as f64;
        let scale = f64::from(DLOSS) * row_weight;
        let (losses, statistics, gradient) = formula(form, &logits, &targets, scale);
        let launch = args.launch(MULTIPROCESSORS[at % 2]);
        let what = format!(
            "[{rows}, {classes}], smoothing {}, z {}, ignoring {:?}, offsets {:?}, one hot {}",
            form.smoothing, form.z_loss, form.ignore_index, form.offsets, form.one_hot
        );
        cases.push(
            case::<T>("cross_entropy_fwd", launch)
                .input(&logits)
                .misaligned_by(form.offsets[0] * size_of::<T>())
                .input(&targets)
                .output::<f32>(2 * rows)
                .output::<f32>(rows)
                .by_value(&args),
        );
        let f32_statistics: Vec<f32> = statistics.values.iter().map(|x| *x as f32).collect();
        cases.push(
            case::<T>("cross_entropy_bwd", launch)
                .input(&logits)
                .misaligned_by(form.offsets[0] * size_of::<T>())
                .input(&targets)
                .input(&f32_statistics)
                .input(&[row_weight as f32])
                .input(&[DLOSS])
                .output::<T>(rows * classes)
                .misaligned_by(form.offsets[1] * size_of::<T>())
                .by_value(&args),
        );
        expected.push((losses, statistics, gradient, what));
    }
    let outputs = KERNELS.run(&cases).unwrap();
    for (outputs, (losses, statistics, gradient, what)) in outputs.chunks(2).zip(expected) {
        let what = |result: &str| format!("{result} of {what}");
        let kept = outputs[0].get::<f32>(0);
        assert_close(&kept, &statistics.values, &statistics.terms, &what("statistics"));
        assert_close(&outputs[0].get::<f32>(1), &losses.values, &losses.terms, &what("loss"));
        let dlogits = outputs[1].get::<T>(0);
        assert_close(&dlogits, &gradient.values, &gradient.terms, &what("gradient"));
    }
}

#[test]
fn forward_and_backward_equal_the_formula() {
    skip_without_compiler!();
    for_each_dtype!(equals_the_formula());
}

/// The loss of one row.
fn loss_of(logits: &[f32], target: i64, label_smoothing: f64) -> f32 {
    let config = CrossEntropyConfig { label_smoothing, ..Default::default() };
    let args = CrossEntropyArgs::new(1, logits.len(), &config);
    let forward = case::<f32>("cross_entropy_fwd", args.launch(1))
        .input(logits)
        .input(&[target])
        .output::<f32>(2)
        .output::<f32>(1)
        .by_value(&args);
    KERNELS.run_one(forward).unwrap().get::<f32>(1)[0]
}

#[test]
fn what_logits_have_in_common_changes_no_loss() {
    skip_without_compiler!();
    // A step of f32 at 4096 is 2^-11: these logits have the same differences with it and without.
    let near: Vec<f32> = (0..5003).map(|j| (j * 37 % 64) as f32 / 64.).collect();
    let far: Vec<f32> = near.iter().map(|x| x + 4096.).collect();
    for label_smoothing in [0., 0.1, 1.] {
        let [near, far] = [&near, &far].map(|logits| loss_of(logits, 17, label_smoothing));
        assert!((near - far).abs() < 2e-6, "{near} and {far}");
    }
}

#[test]
fn a_masked_target_has_an_infinite_loss() {
    skip_without_compiler!();
    for label_smoothing in [0., 0.1, 1.] {
        let loss = loss_of(&[f32::NEG_INFINITY, 1., 2., 0.5], 0, label_smoothing);
        assert_eq!(loss, f32::INFINITY, "smoothing {label_smoothing}");
    }
}

#[test]
fn mean_and_sum_are_over_the_rows_that_are_not_ignored() {
    skip_without_compiler!();
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for rows in [1, 7, 255, 256, 1000] {
        for (at, ignore_index) in [None, Some(3), Some(-100), Some(3)].into_iter().enumerate() {
            let reduction = if at < 3 { Reduction::Mean } else { Reduction::Sum };
            let losses: Vec<f32> = random(rows as u64, rows);
            let targets: Vec<i64> =
                (0..rows as i64).map(|row| if row % 3 == 0 { 3 } else { row }).collect();
            let counts = |target: &i64| Some(*target) != ignore_index;
            let count = targets.iter().filter(|target| counts(target)).count();
            let total: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
            let config = CrossEntropyConfig { ignore_index, reduction, ..Default::default() };
            cases.push(
                case_named("cross_entropy_fwd_total", CrossEntropyArgs::launch_total())
                    .input(&losses)
                    .input(&targets)
                    .output::<f32>(1)
                    .output::<f32>(1)
                    .by_value(&CrossEntropyArgs::new(rows, 8, &config)),
            );
            let row_weight = if at < 3 { 1. / count.max(1) as f64 } else { 1. };
            expected.push([total * row_weight, row_weight]);
        }
    }
    for (outputs, [loss, row_weight]) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert!((f64::from(outputs.get::<f32>(0)[0]) - loss).abs() <= 1e-7 * loss.abs().max(1e-3));
        assert_eq!(outputs.get::<f32>(1), [row_weight as f32]);
    }
}

#[test]
fn a_target_that_is_no_class_gives_nan_in_its_row_alone() {
    skip_without_compiler!();
    for classes in [5usize, 96] {
        let logits: Vec<f32> = random(1, 4 * classes);
        let targets = [1, classes as i64, -1, 2];
        let args = CrossEntropyArgs::new(4, classes, &CrossEntropyConfig::default());
        let launch = args.launch(1);
        let forward = case::<f32>("cross_entropy_fwd", launch)
            .input(&logits)
            .input(&targets)
            .output::<f32>(8)
            .output::<f32>(4)
            .by_value(&args);
        let outputs = KERNELS.run_one(forward).unwrap();
        let (statistics, losses) = (outputs.get::<f32>(0), outputs.get::<f32>(1));
        assert_eq!([0, 1, 2, 3].map(|row| losses[row].is_nan()), [false, true, true, false]);
        let backward = case::<f32>("cross_entropy_bwd", launch)
            .input(&logits)
            .input(&targets)
            .input(&statistics)
            .input(&[0.25f32])
            .input(&[1f32])
            .output::<f32>(4 * classes)
            .by_value(&args);
        let dlogits: Vec<f32> = KERNELS.run_one(backward).unwrap().get(0);
        for (row, dlogits) in dlogits.chunks(classes).enumerate() {
            assert!(dlogits.iter().all(|d| d.is_nan() == (row == 1 || row == 2)), "row {row}");
        }
    }
}

/// A row of logits that have much in common.
#[derive(Clone, Debug)]
struct FarRow {
    classes: usize,
    /// What they have in common, and how far they lie apart.
    offset: f64,
    spread: f64,
    label_smoothing: f64,
    seed: u64,
}

fn far_row() -> impl Strategy<Value = FarRow> {
    let offset = (any::<bool>(), 0f64..30.).prop_map(|(negative, power)| {
        if negative { -10f64.powf(power) } else { 10f64.powf(power) }
    });
    let classes = prop_oneof![1usize..100, 1usize..5000];
    let spread = prop_oneof![Just(0.), (-3f64..2.).prop_map(|power| 10f64.powf(power))];
    (classes, offset, spread, prop_oneof![Just(0.), 0f64..1.], any::<u64>()).prop_map(
        |(classes, offset, spread, label_smoothing, seed)| FarRow {
            classes,
            offset,
            spread,
            label_smoothing,
            seed,
        },
    )
}

/// The loss of a row, its gradient and the sum of that, each to the rounding of f32 and of the dtype.
fn far_rows_are_those_of_f64<T: Element>() {
    let judged = Cell::new(0);
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() };
    let outcome = TestRunner::new(config).run(&far_row(), |row| {
        let FarRow { classes, offset, spread, label_smoothing, seed } = row;
        let logits: Vec<T> = random::<f32>(seed, classes)
            .iter()
            .map(|x| T::from_f64(offset + spread * f64::from(*x)))
            .collect();
        // f16 has no numbers beyond 65504.
        if logits.iter().any(|x| x.to_f64().is_infinite()) {
            return Ok(());
        }
        judged.set(judged.get() + 1);
        let target = (seed % classes as u64) as i64;
        let reduction = Reduction::Sum;
        let config = CrossEntropyConfig { label_smoothing, reduction, ..Default::default() };
        let args = CrossEntropyArgs::new(1, classes, &config);
        let forward = case::<T>("cross_entropy_fwd", args.launch(1))
            .input(&logits)
            .input(&[target])
            .output::<f32>(2)
            .output::<f32>(1)
            .by_value(&args);
        let outputs = KERNELS.run_one(forward).unwrap();
        let (statistics, loss) = (outputs.get::<f32>(0), f64::from(outputs.get::<f32>(1)[0]));
        let backward = case::<T>("cross_entropy_bwd", args.launch(1))
            .input(&logits)
            .input(&[target])
            .input(&statistics)
            .input(&[1f32])
            .input(&[1f32])
            .output::<T>(classes)
            .by_value(&args);
        let dlogits: Vec<T> = KERNELS.run_one(backward).unwrap().get(0);

        let wide: Vec<f64> = logits.iter().map(|x| x.to_f64()).collect();
        let max = wide.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = wide.iter().map(|x| (x - max).exp()).sum();
        let uniform = label_smoothing / classes as f64;
        let q = |j: usize| uniform + if j as i64 == target { 1. - label_smoothing } else { 0. };
        // Relative to the maximum, so that nothing cancels.
        let below = |(j, x): (usize, &f64)| q(j) * (max - x);
        let exact = sum.ln() + wide.iter().enumerate().map(below).sum::<f64>();
        // Of a sum that is hardly more than 1 the logarithm is known to a rounding of 1.
        let off = loss - exact;
        prop_assert!(off.abs() <= 5e-7 * exact + 1e-7, "loss off by {:e} of {}", off, exact);
        // What the dtype rounds by, of normal numbers and of others.
        let (unit, least) = match T::DTYPE {
            DType::F16 => (0.5f64.powi(11), 0.5f64.powi(25)),
            DType::BF16 => (0.5f64.powi(8), f64::from(f32::MIN_POSITIVE)),
            // The exponentials of f32 end with its normal numbers.
            _ => (0., f64::from(f32::MIN_POSITIVE)),
        };
        let (mut total, mut rounded_off) = (0., 0.);
        for (j, (got, x)) in dlogits.iter().zip(&wide).enumerate() {
            let (got, p, q) = (got.to_f64(), (x - max).exp() / sum, q(j));
            // The rounding of the exponent, x - max, comes on top of 1e-6 of what is subtracted.
            let tolerance = 1e-6 * (p * (1. + (max - x) / 16.) + q) + unit * (p - q).abs() + least;
            prop_assert!((got - (p - q)).abs() <= tolerance, "{}: {} not {}", j, got, p - q);
            total += got;
            rounded_off += unit * got.abs() + least;
        }
        prop_assert!(total.abs() <= 1e-6 + rounded_off, "the sum is {:e}", total);
        Ok(())
    });
    outcome.unwrap();
    // Offsets up to 1e30, of which f16 holds the smallest seventh.
    let least = if T::DTYPE == DType::F16 { 1 } else { 64 };
    assert!(judged.get() >= least, "{} rows of {}", judged.get(), T::DTYPE.as_str());
}

#[test]
fn the_gradient_of_a_row_sums_to_0_at_any_offset_and_is_that_of_f64() {
    skip_without_compiler!();
    for_each_dtype!(far_rows_are_those_of_f64());
}

// mutant: first maximum stays|s/if \(!\(grown > max\)\) return;/if (!(grown > max) || max != -INFINITY) return;/
// mutant: sum not rescaled|s/exponentials \*= exponential<T>\(max - grown\);.*/exponentials *= 1.f;/
// mutant: threads not rescaled|s/sums\.raise\(team_reduce\(sums\.max, scratch, Max\(\)\)\);/sums.max = team_reduce(sums.max, scratch, Max());/
// mutant: ignored rows count|s/args\.ignored\(targets\[r\]\) \? 0\. : 1\./1./
// mutant: smoothing lost|s/if \(args\.uniform != 0\.\)/if (false)/
// mutant: smoothing of logits as they are|s/below_max \+= from - x\[j\]/below_max -= x[j]/
// mutant: distances from the first maximum|s/if \(count > 0\.f\) below_max.*/;/
// mutant: distances from no maximum|s/if \(count > 0\.f\) below_max/below_max/
// mutant: uncounted target counts|s/if \(args\.peak != 0\.\) loss/loss/
// mutant: whole peak|s/loss \+= float\(args\.peak\) \*/loss += 1.f */
// mutant: z-loss lost|s/if \(args\.z_loss != 0\.\) loss/if (false) loss/
// mutant: gradient of the z-loss lost|s/\(1\.f \+ 2\.f \* float.*\) \/ sum;/1.f \/ sum;/
// mutant: sum is a mean|s/args\.averages \? 1\. \/ fmax/true ? 1. \/ fmax/
// mutant: rounded log-sum-exp|s/exponential<T>\(logit - max\) \* normaliser/exponential<T>(logit - (max + logf(sum))) * (normaliser * sum)/
// mutant: target read unchecked|s/const bool is_class = args\.is_class\(target\);/const bool is_class = true;/
// mutant: head of a row lost|s/body\(i < head \? i : i \+ middle\)/body(i + middle)/
// mutant: rows all aligned|s/head = min\(uint64_t\(-reinterpret.*/head = 0;/
// mutant: target of the vector|s/target - int64_t\(parts\.head \+ col\)/target - int64_t(col)/
// mutant: other alignment of the gradient|s/\) % 16 == 0;/) % 16 >= 0;/
