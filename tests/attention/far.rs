//! Scores that are far from 0 and near one another.

use candle_core::{DType, Device, Tensor, Var};
use candle_dropout::DropMask;
use candle_dropout::functional::{AttentionConfig, AttentionMask, attention, softmax_dropout};
use cases::{largest, random};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// One head whose scores are exact in f32 and far from 0; its `Debug` is what a failure prints.
#[derive(Clone, Debug)]
struct FarScores {
    queries: usize,
    keys: usize,
    causal: bool,
    /// The square root of what the products of queries and keys have in common.
    far: u32,
    seed: u64,
}

fn far_scores() -> impl Strategy<Value = FarScores> {
    let keys = prop_oneof![1usize..40, 1usize..600];
    (1usize..20, keys, any::<bool>(), 0u32..11, any::<u64>()).prop_map(
        |(queries, keys, causal, power, seed)| FarScores {
            queries,
            keys,
            causal,
            far: 1 << power,
            seed,
        },
    )
}

/// A result, and the sum of the sizes of what each element is the sum of.
struct Sum {
    values: Vec<f64>,
    terms: Vec<f64>,
}

impl Sum {
    fn zeros(len: usize) -> Self {
        Self { values: vec![0.; len], terms: vec![0.; len] }
    }

    fn add(&mut self, at: usize, value: f64, size: f64) {
        self.values[at] += value;
        self.terms[at] += size;
    }
}

/// Columns of a head.
const D: usize = 4;

/// `o`, `dq`, `dk` and `dv` in f64, with scale 1/4.
fn exact_attention(case: &FarScores, [q, k, v, dout]: [&[f64]; 4]) -> [Sum; 4] {
    const SCALE: f64 = 0.25;
    let FarScores { queries, keys, causal, .. } = *case;
    let mut results = [queries, queries, keys, keys].map(|rows| Sum::zeros(rows * D));
    let [o, dq, dk, dv] = &mut results;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let size = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum::<f64>();
    for i in 0..queries {
        let seen = if causal { (i + 1 + keys).saturating_sub(queries) } else { keys };
        let [q_row, dout_row] = [&q[i * D..][..D], &dout[i * D..][..D]];
        let row = |x: &'_ [f64], j: usize| -> [f64; D] { x[j * D..][..D].try_into().unwrap() };
        let t: Vec<f64> = (0..seen).map(|j| SCALE * dot(q_row, &row(k, j))).collect();
        let max = t.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = t.iter().map(|t| (t - max).exp()).sum();
        let p: Vec<f64> = t.iter().map(|t| (t - max).exp() / sum).collect();
        for (j, p) in p.iter().enumerate() {
            for (d, dout) in dout_row.iter().enumerate() {
                let (y, back) = (p * v[j * D + d], p * dout);
                o.add(i * D + d, y, y.abs());
                dv.add(j * D + d, back, back.abs());
            }
        }
        let delta = dot(&o.values[i * D..][..D], dout_row);
        let delta_size = size(&o.terms[i * D..][..D], dout_row);
        for (j, p) in p.iter().enumerate() {
            let ds = SCALE * p * (dot(dout_row, &row(v, j)) - delta);
            let ds_size = SCALE * p * (size(dout_row, &row(v, j)) + delta_size);
            for d in 0..D {
                let (k, q) = (k[j * D + d], q[i * D + d]);
                dq.add(i * D + d, ds * k, ds_size * k.abs());
                dk.add(j * D + d, ds * q, ds_size * q.abs());
            }
        }
    }
    results
}

#[test]
fn scores_far_from_0_keep_the_digits_of_probabilities_and_gradients() {
    let config = ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() };
    let outcome = TestRunner::new(config).run(&far_scores(), |case| {
        let FarScores { queries, keys, causal, far, seed } = case;
        let whole = |rows: usize, at: u64| -> Vec<f64> {
            let x = random(&[rows * D], DType::F64, seed ^ at).unwrap().to_vec1::<f64>().unwrap();
            let at = |(i, x): (usize, f64)| if i % D == 0 { far.into() } else { x.round() };
            x.into_iter().enumerate().map(at).collect()
        };
        for (dtype, unit) in
            [(DType::F32, 0.), (DType::F16, 0.5f64.powi(11)), (DType::BF16, 0.5f64.powi(8))]
        {
            let tensor = |x: Vec<f64>| {
                let rows = x.len() / D;
                Tensor::from_vec(x, (1, 1, rows, D), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
            };
            let any = |rows: usize, at: u64| random(&[1, 1, rows, D], dtype, seed ^ at).unwrap();
            let [q, k] = [tensor(whole(queries, 1)), tensor(whole(keys, 2))];
            let [v, dout] = [any(keys, 3), any(queries, 4)];
            let wide = [&q, &k, &v, &dout].map(|x| -> Vec<f64> {
                x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
            });
            let exact = exact_attention(&case, wide.each_ref().map(|x| x.as_slice()));
            let [q, k, v] = [q, k, v].map(|x| Var::from_tensor(&x).unwrap());
            let config = AttentionConfig { scale: Some(0.25), causal, ..Default::default() };
            let o = attention(&q, &k, &v, &config, &DropMask::none()).unwrap();
            let grads = (&o * &dout).unwrap().backward().unwrap();
            let got = [&o, grads.get(&q).unwrap(), grads.get(&k).unwrap(), grads.get(&v).unwrap()];
            for ((got, Sum { values, terms }), what) in
                got.iter().zip(&exact).zip(["o", "dq", "dk", "dv"])
            {
                let got = got.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
                for ((got, value), terms) in
                    got.to_vec1::<f64>().unwrap().iter().zip(values).zip(terms)
                {
                    // Backward begins with the rounded o.
                    let rounded =
                        unit * (value.abs() + terms) + if dtype == DType::F16 { 6e-8 } else { 0. };
                    let tolerance = 1e-6 * terms + rounded;
                    prop_assert!(
                        (got - value).abs() <= tolerance,
                        "{} in {:?}: {} not {}",
                        what,
                        dtype,
                        got,
                        value
                    );
                }
            }
        }
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn probabilities_of_backward_sum_to_1_wherever_scores_are() {
    let draw = (1usize..700, -3f64..7., any::<bool>(), any::<u64>());
    let config = ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() };
    let outcome = TestRunner::new(config).run(&draw, |(keys, power, negative, seed)| {
        // The first column is what all scores have in common, rounded or not.
        let far = 10f64.powf(power / 2.);
        let scale = if negative { -0.5 } else { 0.5 };
        let of = |rows: usize, at: u64| {
            let first = Tensor::full(far as f32, (1, 1, rows, 1), &Device::Cpu).unwrap();
            let rest = random(&[1, 1, rows, 7], DType::F32, seed ^ at).unwrap();
            Tensor::cat(&[&first, &rest], 3).unwrap()
        };
        let (q, k) = (of(1, 1), of(keys, 2));
        let v = Var::zeros((1, 1, keys, 8), DType::F32, &Device::Cpu).unwrap();
        let config = AttentionConfig { scale: Some(scale), ..Default::default() };
        let o = attention(&q, &k, &v, &config, &DropMask::none()).unwrap();
        // With a gradient of ones that of a value is its probability.
        let grads = o.backward().unwrap();
        let p = grads.get(&v).unwrap().narrow(3, 0, 1).unwrap().to_dtype(DType::F64).unwrap();
        let sum = p.sum_all().unwrap().to_scalar::<f64>().unwrap();
        prop_assert!((sum - 1.).abs() <= 1e-6, "the sum is off by {:e}", sum - 1.);
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn what_the_gradients_of_weights_have_in_common_changes_no_gradient_of_scores() {
    let draw = (1usize..700, 0i32..13, any::<u64>());
    let config = ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() };
    let outcome = TestRunner::new(config).run(&draw, |(keys, power, seed)| {
        let scores = random(&[1, keys], DType::F32, seed).unwrap();
        // Multiples of 1/64, of which f32 has all up to 2^18.
        let near =
            ((random(&[1, keys], DType::F32, !seed).unwrap() * 64.).unwrap().round().unwrap()
                / 64.)
                .unwrap();
        let far = (&near + 2f64.powi(power)).unwrap();
        let gradient = |dy: &Tensor, dtype: DType| {
            let scores = Var::from_tensor(&scores.to_dtype(dtype).unwrap()).unwrap();
            let y = softmax_dropout(&scores, 1., &AttentionMask::None, &DropMask::none()).unwrap();
            let grads = (y * dy.to_dtype(dtype).unwrap()).unwrap().backward().unwrap();
            grads.get(&scores).unwrap().to_dtype(DType::F64).unwrap()
        };
        let exact = gradient(&near, DType::F64);
        let off = (gradient(&far, DType::F32) - &exact).unwrap();
        // A row of few keys may have next to no gradient; its terms are those of a difference.
        let largest = largest(&exact).unwrap().max(1. / keys as f64);
        let off = cases::largest(&off).unwrap();
        prop_assert!(off <= 1e-6 * largest, "off by {:e} of {:e}", off, largest);
        Ok(())
    });
    outcome.unwrap();
}
