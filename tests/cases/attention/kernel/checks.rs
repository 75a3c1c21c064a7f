//! What is demanded of the kernels of every dtype.

use candle_core::DType;

use super::expected::{Expected, Results, exact, formula};
use super::form::Form;
use super::inputs::Inputs;
use super::run::{Kernels, compute};
use crate::host::{EVERY_ORDER, Element, Order};

fn to_f32(x: &[f64]) -> Vec<f32> {
    x.iter().map(|x| *x as f32).collect()
}

impl Kernels {
    /// The softmax of rows as backward gets it, from the logarithms of their sums: a reference that is 3 below, and the
    /// normaliser that belongs to it.
    fn softmax_of(&self, lse: &[f64]) -> Vec<f32> {
        let of_row = |lse: &f64| match lse.is_infinite() {
            true => [f32::INFINITY, 0.],
            false => {
                let reference = ((lse - 3.) * self.unit_logit) as f32;
                [reference, (f64::from(reference) / self.unit_logit - lse).exp() as f32]
            }
        };
        lse.iter().flat_map(of_row).collect()
    }

    /// And back.
    fn lse_of(&self, softmax: &[f32]) -> Vec<f32> {
        let of_row = |row: &[f32]| {
            let [reference, normaliser] = [row[0], row[1]].map(f64::from);
            (reference / self.unit_logit - normaliser.ln()) as f32
        };
        softmax.chunks(2).map(of_row).collect()
    }
}

/// The unit of rounding.
fn unit<T: Element>() -> f64 {
    0.5f64.powi(match size_of::<T>() {
        4 => 24,
        _ if T::DTYPE == DType::F16 => 11,
        _ => 8,
    })
}

/// Within the roundings of f32, one of the dtype for each term if it is a half, and one of the result. What
/// has no terms is an exact 0.
#[track_caller]
fn assert_within<T: Element>(got: &[T], expected: &Expected, what: &str) {
    const ROUNDINGS: f64 = 12.;
    const LEAST_HALF: f64 = 1. / 33_554_432.; // 2^-25
    let (f32_unit, unit) = (0.5f64.powi(24), unit::<T>());
    let least = if T::DTYPE == DType::F16 { LEAST_HALF } else { 0.5f64.powi(134) };
    assert_eq!(got.len(), expected.values.len(), "{what}");
    for (at, got) in got.iter().enumerate() {
        let (got, value) = (got.to_f64(), expected.values[at]);
        let tolerance = if expected.f32_terms[at] == 0. {
            0.
        } else {
            let terms = if unit > f32_unit { 2. * unit * expected.terms[at] } else { 0. };
            ROUNDINGS * f32_unit * expected.f32_terms[at]
                + terms
                + unit * value.abs()
                + least * (1. + expected.factors[at])
        };
        let error = (got - value).abs();
        assert!(
            error <= tolerance || got == value,
            "{what}: element {at}: got {got}, expected {value} up to {tolerance}"
        );
    }
}

/// Every result of every form is that of the formula.
pub fn equal_the_formula<T: Element>(kernels: &Kernels, forms: &[Form]) {
    let inputs: Vec<Inputs<T>> = forms.iter().map(Inputs::random).collect();
    let expected: Vec<Results> = (forms.iter().zip(&inputs))
        .map(|(form, inputs)| formula(form, inputs, exact, exact))
        .collect();
    let runs: Vec<_> = (forms.iter().zip(&inputs).zip(&expected))
        .map(|((form, inputs), expected)| {
            (form, inputs, kernels.softmax_of(&expected.lse.values), to_f32(&expected.delta))
        })
        .collect();
    for (computed, (expected, form)) in
        compute(kernels, EVERY_ORDER, &runs).iter().zip(expected.iter().zip(forms))
    {
        let what = |result: &str| format!("{result} of {}", form.what());
        assert_within(&computed.o, &expected.o, &what("o"));
        assert_within(&kernels.lse_of(&computed.softmax), &expected.lse, &what("lse"));
        assert_within(&computed.dq, &expected.dq, &what("dq"));
        assert_within(&computed.dk, &expected.dk, &what("dk"));
        assert_within(&computed.dv, &expected.dv, &what("dv"));
    }
}

/// Backward goes on from what forward left of scores far from 0, and loses nothing by their distance.
pub fn lose_no_digits_far_from_0<T: Element>(kernels: &Kernels, forms: &[Form]) {
    let inputs: Vec<Inputs<T>> = forms.iter().map(Inputs::random).collect();
    let expected: Vec<Results> = (forms.iter().zip(&inputs))
        .map(|(form, inputs)| formula(form, inputs, exact, exact))
        .collect();
    let mut runs: Vec<_> = (forms.iter().zip(&inputs).zip(&expected))
        .map(|((form, inputs), expected)| {
            let rows = expected.delta.len();
            (form, inputs, vec![0.; 2 * rows], to_f32(&expected.delta))
        })
        .collect();
    let forward = compute(kernels, &[Order::Forward], &runs);
    for (run, computed) in runs.iter_mut().zip(&forward) {
        run.2 = computed.softmax.clone();
    }
    for ((computed, forward), (expected, form)) in compute(kernels, &[Order::Forward], &runs)
        .iter()
        .zip(forward)
        .zip(expected.iter().zip(forms))
    {
        let what = |result: &str| format!("{result} of {} far from 0, {}", form.far, form.what());
        assert_within(&forward.o, &expected.o, &what("o"));
        assert_within(&computed.dq, &expected.dq, &what("dq"));
        assert_within(&computed.dk, &expected.dk, &what("dk"));
        assert_within(&computed.dv, &expected.dv, &what("dv"));
    }
}

/// The masks that forward, dq, dk and dv applied are that of the law, in every bit: one-hot inputs bring out
/// one draw an element of the result.
pub fn draw_the_law<T: Element>(kernels: &Kernels, forms: &[Form]) {
    for form in forms {
        let Form { batches, heads, kv_heads, queries, keys, head_size, .. } = *form;
        assert_eq!(heads, kv_heads, "each draw of its own head");
        let rows = batches * heads * queries;
        let (zero, one) = (T::from_f64(0.), T::from_f64(1.));
        let steps = queries.max(keys).div_ceil(head_size);
        let hot = |rows: usize, step: usize| -> Vec<T> {
            let at = |i: usize| (i / head_size % rows, step * head_size + i % head_size);
            (0..batches * heads * rows * head_size)
                .map(|i| if at(i).0 == at(i).1 { one } else { zero })
                .collect()
        };
        // The first column of each row is 1.
        let ones = |rows: usize| -> Vec<T> {
            (0..batches * heads * rows * head_size)
                .map(|i| if i % head_size == 0 { one } else { zero })
                .collect()
        };
        let zeros = |rows: usize| vec![zero; batches * heads * rows * head_size];
        // Forward: o = y, with v one-hot. dv = y^T, with do one-hot.
        let for_y = |step| Inputs {
            q: zeros(queries),
            k: zeros(keys),
            v: hot(keys, step),
            dout: hot(queries, step),
        };
        // dP = keep * scale: ds = P dP where delta is 0. dq = ds with k one-hot, dk = ds^T with q one-hot;
        // scores vanish as the other one is 0.
        let for_dq = |step| Inputs {
            q: zeros(queries),
            k: hot(keys, step),
            v: ones(keys),
            dout: ones(queries),
        };
        let for_dk = |step| Inputs {
            q: hot(queries, step),
            k: zeros(keys),
            v: ones(keys),
            dout: ones(queries),
        };
        let inputs: Vec<Inputs<T>> =
            (0..steps).flat_map(|step| [for_y(step), for_dq(step), for_dk(step)]).collect();
        let softmax = kernels.softmax_of(&vec![(keys as f64).ln(); rows]);
        let runs: Vec<_> =
            inputs.iter().map(|inputs| (form, inputs, softmax.clone(), vec![0.; rows])).collect();
        // Other tests see to it that the order does not matter.
        let computed = compute(kernels, &[Order::Forward], &runs);

        let mut recovered = vec![Vec::new(); 4];
        for head in 0..batches * heads {
            for query in 0..queries {
                for key in 0..keys {
                    let by_query = (head * queries + query) * head_size + key % head_size;
                    let by_key = (head * keys + key) * head_size + query % head_size;
                    let of_key = 3 * (key / head_size);
                    let of_query = 3 * (query / head_size);
                    let kept = |x: &T| x.to_f64() != 0.;
                    recovered[0].push(kept(&computed[of_key].o[by_query]));
                    recovered[1].push(kept(&computed[of_query].dv[by_key]));
                    recovered[2].push(kept(&computed[of_key + 1].dq[by_query]));
                    recovered[3].push(kept(&computed[of_query + 2].dk[by_key]));
                }
            }
        }
        for (recovered, pass) in recovered.iter().zip(["o", "dv", "dq", "dk"]) {
            let wrong = recovered.iter().zip(&form.mask.keep).position(|(got, keep)| got != keep);
            assert_eq!(wrong, None, "{pass} of {}", form.what());
        }
        keep_rates_of_tiles_are_binomial(form, &recovered[0]);
    }
}

/// 16 x 32 tiles: each is within 5 standard deviations, and their spread is that of independent draws.
fn keep_rates_of_tiles_are_binomial(form: &Form, keep: &[bool]) {
    const TILE: [usize; 2] = [16, 32];
    let keep_p = 1. / form.mask.scale;
    let count = (TILE[0] * TILE[1]) as f64;
    let mut scores = Vec::new();
    for head in 0..form.batches * form.heads {
        for row in 0..form.queries / TILE[0] {
            for col in 0..form.keys / TILE[1] {
                let kept = (0..TILE[0] * TILE[1]).filter(|i| {
                    let query = head * form.queries + row * TILE[0] + i / TILE[1];
                    keep[query * form.keys + col * TILE[1] + i % TILE[1]]
                });
                let z = (kept.count() as f64 - count * keep_p)
                    / (count * keep_p * (1. - keep_p)).sqrt();
                assert!(z.abs() < 5., "tile {row}, {col} of head {head}: z = {z}, {}", form.what());
                scores.push(z);
            }
        }
    }
    let tiles = scores.len() as f64;
    if tiles >= 16. {
        let mean_square = scores.iter().map(|z| z * z).sum::<f64>() / tiles;
        let z = (mean_square - 1.) / (2. / tiles).sqrt();
        assert!(z.abs() < 5., "spread of {tiles} tiles: z = {z}, {}", form.what());
    }
}

/// The kernels' root mean square error is at most twice that of the formula computed step by step in the
/// dtype, for the output and every gradient.
pub fn err_no_more_than_the_naive_formula<T: Element>(kernels: &Kernels, forms: &[Form]) {
    let round: fn(f64) -> f64 = |x| T::from_f64(x).to_f64();
    let round_sum: fn(f64) -> f64 = |x| f64::from(x as f32);
    for form in forms {
        let inputs = Inputs::<T>::random(form);
        let reference = formula(form, &inputs, exact, exact);
        let naive = formula(form, &inputs, round, round_sum);
        // Backward goes on from what forward made of it, as in the op.
        let (softmax, delta) =
            (kernels.softmax_of(&reference.lse.values), to_f32(&reference.delta));
        let computed = compute(kernels, EVERY_ORDER, &[(form, &inputs, softmax, delta)]).remove(0);
        let rms = |x: &[f64], reference: &[f64]| {
            let sum: f64 = x.iter().zip(reference).map(|(x, y)| (x - y) * (x - y)).sum();
            (sum / x.len() as f64).sqrt()
        };
        for (name, got, naive, reference) in [
            ("o", &computed.o, &naive.o, &reference.o),
            ("dq", &computed.dq, &naive.dq, &reference.dq),
            ("dk", &computed.dk, &naive.dk, &reference.dk),
            ("dv", &computed.dv, &naive.dv, &reference.dv),
        ] {
            let got: Vec<f64> = got.iter().map(|x| x.to_f64()).collect();
            let naive: Vec<f64> = naive.values.iter().map(|x| round(*x)).collect();
            let (ours, theirs) = (rms(&got, &reference.values), rms(&naive, &reference.values));
            assert!(
                ours <= 2. * theirs,
                "{name} of {}: root mean square error {ours:e}, naive {theirs:e}",
                form.what()
            );
        }
    }
}
