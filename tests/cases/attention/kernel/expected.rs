//! The formula, with how far each element may be off.

use super::form::Form;
use super::inputs::Inputs;
use crate::host::Element;

/// What a pass computes, and how far each element may be off.
#[derive(Clone, Default)]
pub struct Expected {
    pub values: Vec<f64>,
    /// Sizes of what an element is the sum of, each times the number of roundings in f32 that it goes through.
    pub f32_terms: Vec<f64>,
    /// Those that pass through the dtype once, such as probabilities on their way into a product.
    pub terms: Vec<f64>,
    /// What those are multiplied with behind it: where they are subnormal halves, their error is absolute.
    pub factors: Vec<f64>,
}

impl Expected {
    fn zeros(len: usize) -> Self {
        let zeros = vec![0.; len];
        Self {
            values: zeros.clone(),
            f32_terms: zeros.clone(),
            terms: zeros.clone(),
            factors: zeros,
        }
    }

    fn add(&mut self, at: usize, value: f64, [size, factor]: [f64; 2], roundings: f64) {
        self.values[at] += value;
        self.terms[at] += size;
        self.factors[at] += factor;
        self.f32_terms[at] += size * roundings;
    }
}

pub struct Results {
    pub o: Expected,
    pub lse: Expected,
    pub delta: Vec<f64>,
    pub dq: Expected,
    pub dk: Expected,
    pub dv: Expected,
}

/// The formula, with every intermediate result passed through `round` and every sum through `round_sum`.
pub fn formula<T: Element>(
    form: &Form,
    inputs: &Inputs<T>,
    round: fn(f64) -> f64,
    round_sum: fn(f64) -> f64,
) -> Results {
    let Form { batches, heads, kv_heads, queries, keys, head_size, softcap, .. } = *form;
    let wide = |x: &[T]| -> Vec<f64> { x.iter().map(|x| x.to_f64()).collect() };
    let (q, k, v, dout) = (wide(&inputs.q), wide(&inputs.k), wide(&inputs.v), wide(&inputs.dout));
    let (q_len, k_len, rows) = (q.len(), k.len(), batches * heads * queries);
    let mut results = Results {
        o: Expected::zeros(q_len),
        lse: Expected::zeros(rows),
        delta: vec![0.; rows],
        dq: Expected::zeros(q_len),
        dk: Expected::zeros(k_len),
        dv: Expected::zeros(k_len),
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).fold(0., |sum, (a, b)| round_sum(sum + a * b));
    let dot_size =
        |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum() };
    let drop_scale = form.drop_scale();
    for row in 0..rows {
        let (head, query) = (row / queries, row % queries);
        let (batch, h) = (head / heads, head % heads);
        let kv_head = batch * kv_heads + h / (heads / kv_heads);
        let of_row = |x: &'_ [f64]| x[row * head_size..][..head_size].to_vec();
        let of_key = |key: usize| (kv_head * keys + key) * head_size;
        let (q_row, dout_row) = (of_row(&q), of_row(&dout));
        let slope = form.slopes.as_ref().map_or(0., |slopes| f64::from(slopes[h]));
        let keep = |key: usize| form.mask.keep[row * keys + key];
        let sees = |key: usize| form.sees(batch, query, key) && (keep(key) || !form.drop_key);
        let visible: Vec<usize> = (0..keys).filter(|key| sees(*key)).collect();
        if visible.is_empty() {
            results.lse.values[row] = f64::INFINITY;
            continue;
        }
        // Logits, roundings they went through, derivative of the softcap.
        let (mut t, mut roundings, mut cap_slope) = (Vec::new(), Vec::new(), Vec::new());
        for &key in &visible {
            let k_row = &k[of_key(key)..][..head_size];
            let s = round(form.scale * round(dot(&q_row, k_row)));
            let u = if softcap == 0. { 0. } else { (s / softcap).tanh() };
            let capped = if softcap == 0. { s } else { round(softcap * u) };
            let distance = ((query + keys) as f64 - (queries + key) as f64).abs();
            t.push(round(capped - slope * distance));
            let size = form.scale.abs() * dot_size(&q_row, k_row) + capped.abs() + slope * distance;
            roundings.push(if form.far == 0. { size } else { 0. });
            cap_slope.push(1. - u * u);
        }
        let max = t.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let e: Vec<f64> = t.iter().map(|t| round_sum((t - max).exp())).collect();
        let sum = e.iter().fold(0., |sum, e| round_sum(sum + e));
        let p: Vec<f64> = e.iter().map(|e| round(e / sum)).collect();
        let lse = max + sum.ln();
        let row_roundings: f64 = p.iter().zip(&roundings).map(|(p, r)| p * r).sum();
        let roundings: Vec<f64> =
            (roundings.iter().zip(&t)).map(|(r, t)| 4. + r + row_roundings + (max - t)).collect();
        results.lse.values[row] = lse;
        results.lse.f32_terms[row] = 4. + row_roundings + lse.abs();

        let y: Vec<f64> = (visible.iter().zip(&p))
            .map(|(&key, p)| if keep(key) { round(p * drop_scale) } else { 0. })
            .collect();
        let dp: Vec<f64> = (visible.iter())
            .map(|&key| {
                let dy = dot(&dout_row, &v[of_key(key)..][..head_size]);
                if keep(key) { round(round(dy) * drop_scale) } else { 0. }
            })
            .collect();
        for (d, dout) in dout_row.iter().enumerate() {
            for (at, &key) in visible.iter().enumerate() {
                let v_at = of_key(key) + d;
                let (o, size) = (y[at] * v[v_at], (y[at] * v[v_at]).abs());
                let factor = drop_scale * v[v_at].abs();
                results.o.add(row * head_size + d, o, [size, factor], roundings[at]);
                let value = round_sum(results.o.values[row * head_size + d]);
                results.o.values[row * head_size + d] = value;
                // Backward keeps small probabilities from being subnormal.
                results.dv.add(v_at, y[at] * dout, [(y[at] * dout).abs(), 0.], roundings[at]);
                results.dv.values[v_at] = round_sum(results.dv.values[v_at]);
            }
        }
        let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
        let delta = round_sum(delta);
        let delta_size: f64 = (p.iter().zip(&dp)).map(|(p, dp)| (p * dp).abs()).sum();
        results.delta[row] = delta;
        for (at, &key) in visible.iter().enumerate() {
            let ds = round(p[at] * (dp[at] - delta) * cap_slope[at]);
            let dp_size = match keep(key) {
                true => drop_scale * dot_size(&dout_row, &v[of_key(key)..][..head_size]),
                false => 0.,
            };
            let size = p[at] * (dp_size + delta.abs() + delta_size);
            for d in 0..head_size {
                let (q_at, k_at) = (row * head_size + d, of_key(key) + d);
                let [dq, dk] = [k[k_at], q[q_at]].map(|x| form.scale * ds * x);
                let [dq_size, dk_size] = [k[k_at], q[q_at]].map(|x| {
                    let factor = form.scale.abs() * x.abs();
                    [size * factor, factor]
                });
                results.dq.add(q_at, dq, dq_size, roundings[at]);
                results.dq.values[q_at] = round_sum(results.dq.values[q_at]);
                results.dk.add(k_at, dk, dk_size, roundings[at]);
                results.dk.values[k_at] = round_sum(results.dk.values[k_at]);
            }
        }
    }
    results
}

pub fn exact(x: f64) -> f64 {
    x
}
