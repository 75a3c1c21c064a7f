//! `kernels/cross_entropy.cu` against its formula in f64.

use candle_dropout::{CrossEntropyArgs, CrossEntropyConfig};

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
    ignore_index: Option<i64>,
    /// Elements that logits and their gradient lie behind a 16-byte boundary.
    offsets: [usize; 2],
    /// All logits are -inf but for those of the targets and one.
    one_hot: bool,
}

fn forms() -> Vec<Form> {
    let mut forms = Vec::new();
    for &[rows, classes] in SHAPES {
        for (smoothing, ignore_index, offsets, one_hot) in [
            (0., None, [0, 0], false),
            (0.1, Some(-100), [0, 0], false),
            (1., Some(0), [1, 1], false),
            (0.3, None, [3, 0], false),
            (0., Some(-100), [0, 2], true),
        ] {
            forms.push(Form { rows, classes, smoothing, ignore_index, offsets, one_hot });
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

/// Losses and log-sum-exps of the rows, and the gradient.
fn formula<T: Element>(
    form: &Form,
    logits: &[T],
    targets: &[i64],
    scale: f64,
) -> (Expected, Expected, Expected) {
    let (mut losses, mut all_lse, mut gradient) =
        (Expected::default(), Expected::default(), Expected::default());
    let uniform = form.smoothing / form.classes as f64;
    for (row, target) in logits.chunks(form.classes).zip(targets) {
        if Some(*target) == form.ignore_index {
            losses.push(0., 0.);
            all_lse.push(0., 0.);
            row.iter().for_each(|_| gradient.push(0., 0.));
            continue;
        }
        let x: Vec<f64> = row.iter().map(|x| x.to_f64()).collect();
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
        let q = |j: usize| uniform + if j as i64 == *target { 1. - form.smoothing } else { 0. };
        let loss: f64 = (0..x.len()).filter(|j| q(*j) > 0.).map(|j| q(j) * (lse - x[j])).sum();
        losses.push(loss, 1. + lse.abs() + max.abs());
        all_lse.push(lse, 1. + lse.abs());
        for (j, x) in x.iter().enumerate() {
            // The exponent is off by roundings of the logit and of the log-sum-exp.
            let p = (x - lse).exp();
            let terms = (p * (1. + lse.abs()) + q(j)) * scale;
            gradient.push((p - q(j)) * scale, terms);
        }
    }
    (losses, all_lse, gradient)
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
        let config =
            CrossEntropyConfig { label_smoothing: form.smoothing, ignore_index: form.ignore_index };
        let args = CrossEntropyArgs::new(rows, classes, &config);
        let count = targets.iter().filter(|target| Some(**target) != form.ignore_index).count();
        let inverse_count = if count == 0 { 0. } else { 1. / count as f64 };
        let scale = f64::from(DLOSS) * inverse_count;
        let (losses, lse, gradient) = formula(form, &logits, &targets, scale);
        let launch = args.launch(MULTIPROCESSORS[at % 2]);
        let what = format!(
            "[{rows}, {classes}], smoothing {}, ignoring {:?}, offsets {:?}, one hot {}",
            form.smoothing, form.ignore_index, form.offsets, form.one_hot
        );
        cases.push(
            case::<T>("cross_entropy_fwd", launch)
                .input(&logits)
                .misaligned_by(form.offsets[0] * size_of::<T>())
                .input(&targets)
                .output::<f32>(rows)
                .output::<f32>(rows)
                .by_value(&args),
        );
        let f32_lse: Vec<f32> = lse.values.iter().map(|lse| *lse as f32).collect();
        cases.push(
            case::<T>("cross_entropy_bwd", launch)
                .input(&logits)
                .misaligned_by(form.offsets[0] * size_of::<T>())
                .input(&targets)
                .input(&f32_lse)
                .input(&[inverse_count as f32])
                .input(&[DLOSS])
                .output::<T>(rows * classes)
                .misaligned_by(form.offsets[1] * size_of::<T>())
                .by_value(&args),
        );
        expected.push((losses, lse, gradient, what));
    }
    let outputs = KERNELS.run(&cases).unwrap();
    for (outputs, (losses, lse, gradient, what)) in outputs.chunks(2).zip(expected) {
        let what = |result: &str| format!("{result} of {what}");
        assert_close(&outputs[0].get::<f32>(0), &lse.values, &lse.terms, &what("lse"));
        assert_close(&outputs[0].get::<f32>(1), &losses.values, &losses.terms, &what("loss"));
        let dlogits = outputs[1].get::<T>(0);
        assert_close(&dlogits, &gradient.values, &gradient.terms, &what("gradient"));
    }
}

#[test]
fn forward_and_backward_equal_the_formula() {
    for_each_dtype!(equals_the_formula());
}

/// The loss of one row.
fn loss_of(logits: &[f32], target: i64, label_smoothing: f64) -> f32 {
    let config = CrossEntropyConfig { label_smoothing, ignore_index: None };
    let args = CrossEntropyArgs::new(1, logits.len(), &config);
    let forward = case::<f32>("cross_entropy_fwd", args.launch(1))
        .input(logits)
        .input(&[target])
        .output::<f32>(1)
        .output::<f32>(1)
        .by_value(&args);
    KERNELS.run_one(forward).unwrap().get::<f32>(1)[0]
}

#[test]
fn what_logits_have_in_common_changes_no_loss() {
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
    for label_smoothing in [0., 0.1, 1.] {
        let loss = loss_of(&[f32::NEG_INFINITY, 1., 2., 0.5], 0, label_smoothing);
        assert_eq!(loss, f32::INFINITY, "smoothing {label_smoothing}");
    }
}

#[test]
fn the_mean_is_over_the_rows_that_are_not_ignored() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for rows in [1, 7, 255, 256, 1000] {
        for ignore_index in [None, Some(3), Some(-100)] {
            let losses: Vec<f32> = random(rows as u64, rows);
            let targets: Vec<i64> =
                (0..rows as i64).map(|row| if row % 3 == 0 { 3 } else { row }).collect();
            let counts = |target: &i64| Some(*target) != ignore_index;
            let count = targets.iter().filter(|target| counts(target)).count();
            let total: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
            let config = CrossEntropyConfig { label_smoothing: 0., ignore_index };
            cases.push(
                case_named("cross_entropy_fwd_total", CrossEntropyArgs::launch_total())
                    .input(&losses)
                    .input(&targets)
                    .output::<f32>(1)
                    .output::<f32>(1)
                    .by_value(&CrossEntropyArgs::new(rows, 8, &config)),
            );
            let inverse = if count == 0 { 0. } else { 1. / count as f64 };
            expected.push([total * inverse, inverse]);
        }
    }
    for (outputs, [loss, inverse]) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert!((f64::from(outputs.get::<f32>(0)[0]) - loss).abs() <= 1e-7 * loss.abs().max(1e-3));
        assert_eq!(outputs.get::<f32>(1), [inverse as f32]);
    }
}

#[test]
fn a_target_that_is_no_class_gives_nan_in_its_row_alone() {
    for classes in [5usize, 96] {
        let logits: Vec<f32> = random(1, 4 * classes);
        let targets = [1, classes as i64, -1, 2];
        let args = CrossEntropyArgs::new(4, classes, &CrossEntropyConfig::default());
        let launch = args.launch(1);
        let forward = case::<f32>("cross_entropy_fwd", launch)
            .input(&logits)
            .input(&targets)
            .output::<f32>(4)
            .output::<f32>(4)
            .by_value(&args);
        let outputs = KERNELS.run_one(forward).unwrap();
        let (lse, losses) = (outputs.get::<f32>(0), outputs.get::<f32>(1));
        assert_eq!([0, 1, 2, 3].map(|row| losses[row].is_nan()), [false, true, true, false]);
        let backward = case::<f32>("cross_entropy_bwd", launch)
            .input(&logits)
            .input(&targets)
            .input(&lse)
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

// mutant: first maximum stays|s/if \(grown > max\) \{/if (grown > max \&\& max == -INFINITY) {/
// mutant: sum not rescaled|s/exponentials \*= exponential<T>\(max - grown\);.*/exponentials *= 1.f;/
// mutant: threads not rescaled|s/exponential<T>\(thread_max - sums\.shift\(\)\);.*/1.f;/
// mutant: ignored rows count|s/args\.ignored\(targets\[r\]\) \? 0\. : 1\./1./
// mutant: smoothing lost|s/if \(args\.uniform != 0\. && of_target != -INFINITY\)/if (false)/
// mutant: smoothing of logits as they are|s/above_target \+= x\[j\] - of_target/above_target += x[j]/
// mutant: masked target not told apart|s/ && of_target != -INFINITY\) loss/) loss/
// mutant: target read unchecked|s/const bool is_class = args\.is_class\(target\);/const bool is_class = true;/
// mutant: head of a row lost|s/body\(i < head \? i : i \+ middle\)/body(i + middle)/
// mutant: rows all aligned|s/head = min\(uint64_t\(-reinterpret.*/head = 0;/
// mutant: target of the vector|s/target - int64_t\(parts\.head \+ col\)/target - int64_t(col)/
// mutant: other alignment of the gradient|s/\) % 16 == 0;/) % 16 >= 0;/
