//! `kernels/concrete_dropout.cu` against the CPU op in f64.

use candle_core::{Device, Tensor, Var};
use candle_dropout::functional::concrete_dropout;
use candle_dropout::sizes::{Launch, elementwise};

use super::logit_u;
use crate::host::*;

static KERNELS: Program = Program::new("kernels/concrete_dropout.cu");

/// The second kernel of backward: one block.
const TOTAL: Launch = Launch { grid: [1; 3], block: [256, 1, 1], shared_bytes: 0 };

struct Form {
    mask: Mask,
    dims: Vec<usize>,
    /// Elements that x, and then its result, lie behind a boundary.
    offsets: [usize; 2],
    logit_p: f32,
    temperature: f64,
    what: String,
}

fn forms() -> Vec<Form> {
    let mut forms = Vec::new();
    let mut add = |mask, dims: &[usize], offsets, [logit_p, temperature]: [f32; 2], what| {
        let (dims, temperature) = (dims.to_vec(), temperature.into());
        forms.push(Form { mask, dims, offsets, logit_p, temperature, what });
    };
    for dims in SHAPES {
        for (offsets, start, at) in [
            ([0, 0], [0, 0], [-2.2, 0.125]),
            ([1, 0], [5, 8], [0.5, 0.75]),
            ([0, 1], [0, 0], [-0.5, 0.25]),
            ([0, 0], [0, 3], [3., 1.]),
            ([8, 8], [2, 12], [-110., 8.]),
            ([0, 0], [0, 0], [110., 0.125]),
        ] {
            let what = format!(
                "{dims:?}, start {start:?}, offsets {offsets:?}, logit and temperature {at:?}"
            );
            add(Mask::from_start(0.5, dims, &start), dims, offsets, at, what);
        }
    }
    for &window in WINDOWS {
        let what = format!("{window:?}");
        let mask = Mask::window(0.5, window);
        add(mask, window[0], [0, 0], [-1., 0.125], what);
    }
    forms
}

#[test]
fn forward_and_backward_equal_the_cpu() {
    skip_without_compiler!();
    for_each_dtype!(equals_the_cpu());
}

fn equals_the_cpu<T: Element>() {
    let (mut cases, mut expected) = (Vec::new(), Vec::new());
    for (at, form) in forms().into_iter().enumerate() {
        let Form { mask, dims, offsets, logit_p, temperature, what } = form;
        let (cols, len) = (dims[dims.len() - 1], dims.iter().product::<usize>());
        let rows = len / cols;
        let [x, dy]: [Vec<T>; 2] = [1, 2].map(|seed| random(seed, len));
        let x_var = Var::from_tensor(&wide(&x, &dims)).unwrap();
        let logit_var = Var::new(f64::from(logit_p), &Device::Cpu).unwrap();
        let y = concrete_dropout(&x_var, &logit_var, temperature, &mask.drop).unwrap();
        let grads = (&y * wide(&dy, &dims)).unwrap().backward().unwrap();
        let [dx, dlogit_p] = [&x_var, &logit_var].map(|var| grads.get(var).unwrap());

        // Rounded is the logit of z, before the temperature divides it; what underflows is lost.
        let logit_u = logit_u(&mask.drop, &dims).unwrap();
        let size = ((logit_u.abs().unwrap() + f64::from(logit_p).abs().min(60.)).unwrap()
            / temperature)
            .unwrap();
        let terms = |of: &Tensor| {
            let terms = (of.abs().unwrap() * (&size + 1.).unwrap()).unwrap();
            (terms + 1e-25).unwrap()
        };
        let [y_terms, dx_terms] = [terms(&y), terms(dx)];
        let sum_terms = (&y_terms * wide(&dy, &dims).abs().unwrap()).unwrap();
        let sum_terms =
            sum_terms.sum_all().unwrap().to_scalar::<f64>().unwrap() * (1. + 1. / temperature);

        let launch = elementwise(rows, cols, MULTIPROCESSORS[at % 2]);
        for pass in ["fwd", "bwd"] {
            let mut case = case::<T>(&format!("concrete_dropout_{pass}"), launch)
                .input(&x)
                .misaligned_by(offsets[0] * size_of::<T>())
                .input(&[logit_p]);
            if pass == "bwd" {
                case = case.input(&dy);
            }
            case = case.output::<T>(len).misaligned_by(offsets[1] * size_of::<T>());
            if pass == "bwd" {
                case = case.output::<f64>(launch.grid[0] as usize);
            }
            let case = case.value(rows as u64).value(cols as u64);
            cases.push(case.value(temperature.recip() as f32).by_value(&mask.args));
        }
        expected.push((
            y_and_terms(&y, &y_terms),
            y_and_terms(dx, &dx_terms),
            values::<f64>(dlogit_p),
            sum_terms,
            what,
        ));
    }
    let outputs = KERNELS.run(&cases).unwrap();
    let totals: Vec<Case> = outputs
        .chunks_exact(2)
        .map(|outputs| {
            let sums = outputs[1].get::<f64>(1);
            case_named("concrete_dropout_bwd_total", TOTAL)
                .input(&sums)
                .output::<f32>(1)
                .value(sums.len() as u64)
        })
        .collect();
    let totals = KERNELS.run(&totals).unwrap();
    for ((outputs, total), (y, dx, dlogit_p, sum_terms, what)) in
        outputs.chunks_exact(2).zip(totals).zip(expected)
    {
        assert_close(&outputs[0].get::<T>(0), &y.0, &y.1, &what);
        assert_close(&outputs[1].get::<T>(0), &dx.0, &dx.1, &what);
        assert_close(&total.get::<f32>(0), &dlogit_p, &[sum_terms], &what);
    }
}

fn y_and_terms(y: &Tensor, terms: &Tensor) -> (Vec<f64>, Vec<f64>) {
    let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1().unwrap();
    (values(y), values(terms))
}

// mutant: the logit unbounded|s/of > MAX_LOGIT \? MAX_LOGIT : of/of/
// mutant: the negative logit unbounded|s/of < -MAX_LOGIT \? -MAX_LOGIT : of/of/
// mutant: u of 1|s/\(float\(~draw\) \+ 0\.5f\)/(4294967296.f - float(draw))/
// mutant: aligned draws|s/^    if \(VECTOR\) \{/    if (true) {/
// mutant: the second call forgotten|s/high = draw_wide\(mask, mask_row, col \+ 4\)/high = low/
// mutant: 1 - p kept in the gradient|s/concrete\.p - z/1.f - z/
// mutant of kernels/philox.cuh: wide draws of the narrow calls|s/\(mask\.col_0 \+ col\) \/ 4\), 1\)/(mask.col_0 + col) \/ 4), 0)/
// mutant of kernels/philox.cuh: the odd word lost|s/& 1 \? draws\.word\[1\]/\& 1 ? draws.word[0]/
