//! `kernels/adamw.cu`: a step bit for bit as the CPU takes it, the norm in f64.
//!
//! One text, though long: tables of buffers, drawn steps over them, and the mutants that these catch.

use candle_core::{Var, backprop::GradStore};
use candle_dropout::training::{
    AdamW, AdamWArgs, AdamWProgress, AdamWRule, AdamWTensor, Optimizer, ParamGroup, ParamsAdamW,
};
use half::{bf16, f16};

use crate::host::*;

static KERNELS: Program = Program::new("kernels/adamw.cu");

/// Where the pointers of an [`AdamWTensor`] stand: parameter, gradient, first and second moment, master.
const POINTERS: [usize; 5] = [0, 8, 16, 24, 32];

/// Nothing, one element, beside a vector, beside a chunk, several chunks.
const LENS: &[usize] = &[0, 1, 7, 0, 8, 9, 2047, 16_383, 16_384, 16_385, 0, 32_775, 5, 0];

/// A variable of a launch and what belongs to it.
#[derive(Clone)]
struct Variable<P, G> {
    param: Vec<P>,
    grad: Vec<G>,
    first_moment: Vec<f32>,
    second_moment: Vec<f32>,
    master: Option<Vec<f32>>,
    lr: f64,
    weight_decay: f64,
    /// Elements that parameter, gradient and the others lie behind a 16-byte boundary.
    offsets: [usize; 5],
}

fn variable<P: Element, G: Element>(len: usize, at: usize, with_master: bool) -> Variable<P, G> {
    let seed = 10 * at as u64;
    let squares = random::<f32>(seed + 3, len).into_iter().map(|x| x * x).collect();
    let weights = random::<f32>(seed, len);
    Variable {
        param: weights.iter().map(|x| P::from_f64(f64::from(*x))).collect(),
        grad: random(seed + 1, len),
        first_moment: random(seed + 2, len),
        second_moment: squares,
        // Finer than the parameter.
        master: with_master.then_some(weights),
        lr: 0.1 / (at + 1) as f64,
        weight_decay: 0.01 * at as f64,
        offsets: [0; 5],
    }
}

/// The second argument of a kernel.
enum Second {
    /// What a step finds on the device.
    Progress(Option<AdamWProgress>),
    /// What the norm writes: a sum a chunk.
    Partials,
}

/// A launch over variables: their table, the second argument, the others by value; what the table points to
/// stands behind those.
fn case_over<P: Element, G: Element>(
    name: &str,
    variables: &[Variable<P, G>],
    second: Second,
    by_value: &AdamWProgress,
    multiprocessors: usize,
) -> Case {
    const PARAMETERS: usize = 3;
    let (mut table, mut chunks) = (Vec::new(), 0);
    for variable in variables {
        let len = variable.param.len() as u64;
        let [lr, kept] = [variable.lr, 1. - variable.lr * variable.weight_decay]
            .map(|x| u64::from((x as f32).to_bits()));
        table.extend([0, 0, 0, 0, 0, len, chunks, lr | kept << 32]);
        chunks += AdamWTensor::chunks(len);
    }
    let args = AdamWArgs::new(&params(), by_value, (variables.len(), chunks));
    let mut case = case_named(name, args.launch(multiprocessors)).input(&table);
    let mut place = PARAMETERS;
    for (at, variable) in variables.iter().enumerate() {
        let buffers = if variable.master.is_some() { 5 } else { 4 };
        for pointer in &POINTERS[..buffers] {
            case = case.pointing(at * size_of::<AdamWTensor>() + pointer, place);
            place += 1;
        }
    }
    case = match second {
        Second::Progress(None) => case.null(),
        Second::Progress(Some(progress)) => case.input(&progress.to_array()),
        Second::Partials => case.output::<f64>(chunks as usize),
    };
    case = case.by_value(&args);
    for variable in variables {
        let at = variable.offsets;
        case = case.in_out(&variable.param).behind().misaligned_by(at[0] * size_of::<P>());
        case = case.input(&variable.grad).behind().misaligned_by(at[1] * size_of::<G>());
        case = case.in_out(&variable.first_moment).behind().misaligned_by(at[2] * 4);
        case = case.in_out(&variable.second_moment).behind().misaligned_by(at[3] * 4);
        if let Some(master) = &variable.master {
            case = case.in_out(master).behind().misaligned_by(at[4] * 4);
        }
    }
    case
}

fn params() -> ParamsAdamW {
    ParamsAdamW { lr: 0.1, beta1: 0.87, beta2: 0.98, eps: 1e-6, weight_decay: 0.01 }
}

fn progress(step: f64, factor: f64) -> AdamWProgress {
    let correction = |beta: f64| 1. / (1. - beta.powi(step as i32));
    let (scale_m, scale_v) = (correction(params().beta1), correction(params().beta2));
    AdamWProgress { step, factor, scale_m, scale_v, ..AdamWProgress::new(1.) }
}

/// A step in f32, operation by operation.
fn expected<P: Element, G: Element>(
    of: &Variable<P, G>,
    progress: &AdamWProgress,
) -> Variable<P, G> {
    let (mut next, mut weights) = (of.clone(), Vec::new());
    let params = params();
    let [beta1, beta2, eps] = [params.beta1, params.beta2, params.eps].map(|x| x as f32);
    let [left1, left2] = [1. - params.beta1, 1. - params.beta2].map(|x| x as f32);
    let [scale_m, scale_v] = [progress.scale_m, progress.scale_v].map(|x| x as f32);
    let [lr, kept] = [of.lr, 1. - of.lr * of.weight_decay].map(|x| x as f32);
    for i in 0..of.param.len() {
        let grad = of.grad[i].to_f64() as f32 * progress.factor as f32;
        let m = of.first_moment[i] * beta1 + grad * left1;
        let v = of.second_moment[i] * beta2 + grad * grad * left2;
        let weight = of.master.as_ref().map_or(of.param[i].to_f64() as f32, |master| master[i]);
        let weight = weight * kept - m * scale_m / ((v * scale_v).sqrt() + eps) * lr;
        (next.first_moment[i], next.second_moment[i]) = (m, v);
        if let Some(master) = &mut next.master {
            master[i] = weight;
        }
        weights.push(weight);
    }
    // Rounded once, from f32: from f64 the half crate drops bits first.
    next.param = values(&tensor(&weights, &[weights.len()]).to_dtype(P::DTYPE).unwrap());
    next
}

/// Where a step finds its numbers.
#[derive(Clone, Copy)]
enum Numbers {
    Value(AdamWProgress),
    Device(AdamWProgress),
}

fn step<P: Element, G: Element>(
    name: &str,
    variables: &[Variable<P, G>],
    from: Numbers,
    multiprocessors: usize,
) -> Case {
    // By value they are wrong where the device has others.
    let (second, by_value) = match from {
        Numbers::Value(progress) => (Second::Progress(None), progress),
        Numbers::Device(progress) => (Second::Progress(Some(progress)), AdamWProgress::new(1.)),
    };
    case_over(name, variables, second, &by_value, multiprocessors)
}

#[track_caller]
fn assert_variables<P: Element, G: Element>(
    outputs: &Outputs,
    expected: &[Variable<P, G>],
    what: &str,
) {
    let mut at = 0;
    for (i, variable) in expected.iter().enumerate() {
        let what = |of: &str| format!("{what}, {of} of variable {i} ({})", variable.param.len());
        assert_same(&outputs.get::<P>(at), &variable.param, &what("weights"));
        assert_same(&outputs.get::<f32>(at + 1), &variable.first_moment, &what("first moment"));
        assert_same(&outputs.get::<f32>(at + 2), &variable.second_moment, &what("second moment"));
        at += 3;
        if let Some(master) = &variable.master {
            assert_same(&outputs.get::<f32>(at), master, &what("master weights"));
            at += 1;
        }
    }
}

/// Variables of all lengths, with and without master weights, some of their pointers off by an element.
fn variables<P: Element, G: Element>(with_masters: bool) -> Vec<Variable<P, G>> {
    let variable = |(at, len): (usize, &usize)| {
        let mut variable = variable::<P, G>(*len, at, with_masters && at % 3 != 2);
        if let Some(offset) = variable.offsets.get_mut(at % 6) {
            *offset = 1;
        }
        variable
    };
    LENS.iter().enumerate().map(variable).collect()
}

fn steps_are_those_of_the_formula<P: Element, G: Element>(name: &str, with_masters: bool) {
    let variables = variables::<P, G>(with_masters);
    // More chunks than a grid has blocks.
    let many = vec![variable::<P, G>(34 * 16_384 + 3, 1, with_masters)];
    let forms = [
        (variables.clone(), Numbers::Value(progress(1., 1.)), 132),
        (variables.clone(), Numbers::Value(progress(100., 0.3)), 1),
        (variables.clone(), Numbers::Device(progress(3., 0.7)), 1),
        (variables[4..5].to_vec(), Numbers::Value(progress(1., 1.)), 1),
        (many, Numbers::Value(progress(7., 1.)), 1),
    ];
    let case = |(at, (variables, from, multiprocessors)): (usize, &(Vec<_>, Numbers, usize))| {
        let case = step(name, variables, *from, *multiprocessors);
        // The large one once: it is there for the walk over chunks.
        if at == 4 { case.orders(&[Order::Reverse]) } else { case }
    };
    let cases: Vec<_> = forms.iter().enumerate().map(case).collect();
    let outputs = KERNELS.run(&cases).unwrap();
    for (at, (outputs, (variables, from, _))) in outputs.iter().zip(&forms).enumerate() {
        let (Numbers::Value(progress) | Numbers::Device(progress)) = from;
        let next: Vec<_> = variables.iter().map(|of| expected(of, progress)).collect();
        assert_variables(outputs, &next, &format!("{name}, form {at}"));
    }
}

#[test]
fn a_step_is_that_of_the_formula_bit_for_bit() {
    skip_without_compiler!();
    steps_are_those_of_the_formula::<f32, f32>("adamw_step_f32", false);
}

#[test]
fn so_are_steps_of_halves() {
    skip_without_compiler!();
    steps_are_those_of_the_formula::<f16, f16>("adamw_step_f16", true);
    steps_are_those_of_the_formula::<bf16, bf16>("adamw_step_bf16", true);
    steps_are_those_of_the_formula::<bf16, bf16>("adamw_step_bf16", false);
}

#[test]
fn so_are_steps_of_halves_with_gradients_in_f32() {
    skip_without_compiler!();
    steps_are_those_of_the_formula::<f16, f32>("adamw_step_of_f32_f16", true);
    steps_are_those_of_the_formula::<bf16, f32>("adamw_step_of_f32_bf16", true);
}

#[test]
fn a_step_that_is_skipped_changes_nothing() {
    skip_without_compiler!();
    let variables = variables::<f16, f16>(true);
    let skipped = AdamWProgress { skipped: 1., ..progress(2., 1.) };
    let case = step("adamw_step_f16", &variables, Numbers::Device(skipped), 132);
    assert_variables(&KERNELS.run_one(case).unwrap(), &variables, "skipped");
}

#[test]
fn the_formula_is_that_of_the_library_on_the_cpu() {
    let mut next: Vec<_> = variables::<bf16, bf16>(true);
    for variable in &mut next {
        variable.first_moment.fill(0.);
        variable.second_moment.fill(0.);
        variable.master = Some(variable.param.iter().map(|x| x.to_f32()).collect());
    }
    let vars: Vec<_> = next
        .iter()
        .map(|of| Var::from_tensor(&tensor(&of.param, &[of.param.len()])).unwrap())
        .collect();
    let groups = next.iter().zip(&vars).enumerate().map(|(at, (of, var))| ParamGroup {
        vars: vec![(at.to_string(), var.clone())],
        weight_decay: Some(of.weight_decay),
        lr_scale: of.lr / params().lr,
    });
    let mut adamw =
        AdamW::from_groups(groups.collect(), params()).unwrap().with_master_weights().unwrap();
    for variable in &mut next {
        // As the library rounds the product.
        variable.lr = params().lr * (variable.lr / params().lr);
    }
    for at in 1..4 {
        let mut grads = GradStore::default();
        for (of, var) in next.iter_mut().zip(&vars) {
            of.grad = random(at, of.grad.len());
            grads.insert(var, tensor(&of.grad, &[of.grad.len()]));
        }
        adamw.step(&grads).unwrap();
        next = next.iter().map(|of| expected(of, &progress(at as f64, 1.))).collect();
    }
    let state = adamw.state().unwrap();
    for (at, (of, var)) in next.iter().zip(&vars).enumerate() {
        assert_same(&values::<bf16>(var), &of.param, "weights");
        let first: Vec<f32> = values(&state[&format!("first_moment.{at}")]);
        assert_same(&first, &of.first_moment, "first moment");
        let second: Vec<f32> = values(&state[&format!("second_moment.{at}")]);
        assert_same(&second, &of.second_moment, "second moment");
        assert_same(
            &values::<f32>(&state[&format!("master_weight.{at}")]),
            of.master.as_ref().unwrap(),
            "master weights",
        );
    }
}

fn norms_are_those_of_f64<G: Element>(name: &str) {
    let variables = variables::<f32, G>(false);
    let case = |multiprocessors| {
        let by_value = AdamWProgress::new(1.);
        case_over(name, &variables, Second::Partials, &by_value, multiprocessors)
    };
    let mut expected = Vec::new();
    for chunk in variables.iter().flat_map(|of| of.grad.chunks(16_384)) {
        expected.push(chunk.iter().map(|x| x.to_f64() * x.to_f64()).sum::<f64>());
    }
    for outputs in KERNELS.run(&[case(1), case(132)]).unwrap() {
        let sums: Vec<f64> = outputs.get(0);
        assert_eq!(sums.len(), expected.len());
        for (at, (got, expected)) in sums.iter().zip(&expected).enumerate() {
            assert!((got / expected - 1.).abs() < 1e-13, "{name}, chunk {at}: {got}, {expected}");
        }
    }
}

#[test]
fn norms_are_taken_in_f64_chunk_by_chunk() {
    skip_without_compiler!();
    norms_are_those_of_f64::<f32>("adamw_norm_f32");
    norms_are_those_of_f64::<f16>("adamw_norm_f16");
    norms_are_those_of_f64::<bf16>("adamw_norm_bf16");
}

#[test]
fn the_walk_over_chunks_gives_each_its_own_sum() {
    skip_without_compiler!();
    // More chunks than blocks, so that a block sums several, one after the other.
    let len = 67 * 16_384 - 5;
    let mut of = variable::<f32, f32>(len, 1, false);
    of.grad = (0..len).map(|i| (i / 16_384 + 1) as f32).collect();
    let by_value = AdamWProgress::new(1.);
    let case = case_over("adamw_norm_f32", &[of], Second::Partials, &by_value, 1);
    let sums: Vec<f64> = KERNELS.run_one(case).unwrap().get(0);
    for (at, sum) in sums.iter().enumerate() {
        let count = if at == 66 { 16_379. } else { 16_384. };
        assert_eq!(*sum, count * ((at + 1) * (at + 1)) as f64, "chunk {at}");
    }
}

#[test]
fn the_optimiser_goes_on_as_on_the_cpu() {
    skip_without_compiler!();
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for chunks in [1usize, 255, 256, 1000] {
        for bad in [None, Some(f64::INFINITY), Some(f64::NAN)] {
            for max_norm in [f64::INFINITY, 3.5, 1e9] {
                for (growth_interval, good_steps) in [(0., 0.), (2000., 7.), (3., 2.), (1., 0.)] {
                    for loss_scale in [1., 65_536., 2f64.powi(24), 2f64.powi(-24)] {
                        // Whole numbers: their sums are exact in any order.
                        let mut partials: Vec<f64> =
                            (0..chunks).map(|i| (i * 7919 % 1001) as f64 + 1.).collect();
                        if let Some(bad) = bad {
                            partials[chunks / 2] = bad;
                        }
                        let rule =
                            AdamWRule { beta1: 0.9, beta2: 0.999, max_norm, growth_interval };
                        let before = AdamWProgress {
                            good_steps,
                            step: (chunks * 3 % 1007) as f64,
                            ..AdamWProgress::new(loss_scale)
                        };
                        let mut after = before;
                        after.advance(partials.iter().sum(), &rule);
                        cases.push(
                            case_named("adamw_norm_total", AdamWArgs::launch_total())
                                .input(&partials)
                                .in_out(&before.to_array())
                                .value(chunks as u64)
                                .by_value(&rule),
                        );
                        expected.push((after, format!("{before:?}, {rule:?}, {bad:?}")));
                    }
                }
            }
        }
    }
    for (outputs, (expected, what)) in KERNELS.run(&cases).unwrap().iter().zip(expected) {
        assert_same(&outputs.get::<f64>(0), &expected.to_array(), &what);
    }
}

// mutant: chunk of the one before|s/first_chunk <= chunk\) \{/first_chunk < chunk) {/
// mutant: chunks counted from the first variable|s/\(chunk - tensor\.first_chunk\) \* CHUNK/chunk * CHUNK/
// mutant: chunk one too long|s/min\(tensor\.len, start \+ CHUNK\)/min(tensor.len, start + CHUNK + 1)/
// mutant: end of the variable lost|s/min\(tensor\.len, start \+ CHUNK\)/start + CHUNK/
// mutant: one chunk a block|s/chunk < args\.chunks; chunk \+= gridDim\.x/chunk < min(args.chunks, uint64_t(gridDim.x)); chunk += gridDim.x/
// mutant: all aligned|s/if \(aligned && count == WIDTH\)/if (count == WIDTH)/
// mutant: vectors past the end|s/if \(aligned && count == WIDTH\)/if (aligned)/
// mutant: gradient taken as aligned|s/is_aligned\(tensor\.param\) && is_aligned\(tensor\.grad\) &&/is_aligned(tensor.param) \&\&/
// mutant: master taken as aligned|s/is_aligned\(tensor\.master\);/true;/
// mutant: second moment taken as aligned|s/is_aligned\(tensor\.first_moment\) && is_aligned\(tensor\.second_moment\) &&/is_aligned(tensor.first_moment) \&\&/
// mutant: skipped steps taken|s/if \(progress->skipped != 0\.\) return;/;/
// mutant: device's numbers not read|s/scale_m = progress->scale_m, scale_v = progress->scale_v, factor = progress->factor;/;/
// mutant: master not written|s/if \(tensor\.master\) store<VECTOR>/if (false) store<VECTOR>/
// mutant: master not read|s/if \(tensor\.master\) \{/if (false) {/
// mutant: rate of another variable|s/rule\.lr = tensor\.lr,/rule.lr = tensors[0].lr,/
// mutant: decay left out|s/__fmul_rn\(weight, kept\)/weight/
// mutant: squares of scaled gradients only|s/__fmul_rn\(__fmul_rn\(grad, grad\), beta2_left\)/__fmul_rn(grad, beta2_left)/
// mutant: eps under the root|s/__fadd_rn\(__fsqrt_rn\(__fmul_rn\(v, scale_v\)\), eps\)/__fsqrt_rn(__fadd_rn(__fmul_rn(v, scale_v), eps))/
// mutant: norm in f32|s/double\(x\[j\]\) \* double\(x\[j\]\)/double(x[j] * x[j])/
// mutant: NaN is finite|s/sum_of_squares < INFINITY;/!(sum_of_squares == INFINITY);/
// mutant: skipped steps count|s/progress\.skipped = 1\.;/progress.skipped = 1.; progress.step += 1.;/
// mutant: scale grows too late|s/good_steps >= rule\.growth_interval/good_steps > rule.growth_interval/
// mutant: scale without bound|s/min\(progress\.loss_scale \* 2\., MOST_SCALE\)/progress.loss_scale * 2./
// mutant: scale vanishes|s/max\(progress\.loss_scale \* 0\.5, LEAST_SCALE\)/progress.loss_scale * 0.5/
// mutant: clipped to the norm of scaled gradients|s/progress\.norm = sqrt\(sum_of_squares\) \* unscaled/progress.norm = sqrt(sum_of_squares)/
// mutant: gradients not unscaled|s/progress\.factor = unscaled \*/progress.factor =/
// mutant: partial sums of the first threads only|s/chunk < chunks; chunk \+= THREADS/chunk < min(chunks, uint64_t(THREADS)); chunk += THREADS/
