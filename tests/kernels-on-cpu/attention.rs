//! What the tests of the attention kernels of every dtype share: forms, and the formula in f64.

use crate::attention_args::{AttentionArgs, AttentionLayout, HeadStrides, UNBOUNDED};
use crate::common::*;
use crate::harness::{Case, EVERY_ORDER, Order as ThreadOrder, POISON, Program};
use crate::launch::{AttentionPass, Launch};

/// The attention kernels of one file.
pub struct Kernels {
    pub program: &'static Program,
    /// Head sizes that there are instances for.
    pub head_sizes: &'static [usize],
    /// Of an instance: pass, its head size, heads of all samples, rows.
    pub launch: fn(AttentionPass, usize, usize, usize) -> Launch,
}

impl Kernels {
    fn case<T: Element>(&self, pass: AttentionPass, form: &Form) -> Case {
        let head_size = form.head_size;
        let instance = *self.head_sizes.iter().find(|size| **size >= head_size).unwrap();
        let (heads, rows) = match pass {
            AttentionPass::BwdDkdv => (form.kv_heads, form.keys),
            _ => (form.heads, form.queries),
        };
        let launch = (self.launch)(pass, instance, form.batches * heads, rows);
        let nodrop = if form.mask.args.keeps_all() { "_nodrop" } else { "" };
        case::<T>(&format!("{}{nodrop}_d{instance}", pass.kernel()), launch)
    }
}

/// Where the heads of a tensor lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    /// `[B, H, S, D]`.
    HeadsFirst,
    /// `[B, S, H, D]`, as a projection produces it.
    Projection,
    /// `[B, S, H + 2 Hkv, D]`: queries, keys and values of one projection.
    Packed,
    /// As many elements between rows as there are in one, full of NaN.
    Spread,
    /// One element between rows, so that few of them begin at 16-byte boundaries.
    Odd,
}

/// An attention over part of a mask, and where its tensors lie.
pub struct Form {
    pub batches: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub queries: usize,
    pub keys: usize,
    pub head_size: usize,
    pub order: Order,
    /// Elements by which views begin behind a 16-byte boundary.
    pub offset: usize,
    /// Keys that a query sees before and after its own.
    pub left: u32,
    pub right: u32,
    pub scale: f64,
    pub softcap: f64,
    pub lengths: Option<Vec<u32>>,
    pub slopes: Option<Vec<f32>>,
    pub mask: Mask,
}

impl Form {
    /// One sample with one head, every key visible, a mask of its own size.
    pub fn new([queries, keys, head_size]: [usize; 3], drop_p: f32) -> Self {
        Self::with_heads([1, 1, 1], [queries, keys, head_size], drop_p)
    }

    /// Samples, heads, heads of keys and values.
    pub fn with_heads(
        [batches, heads, kv_heads]: [usize; 3],
        [queries, keys, head_size]: [usize; 3],
        drop_p: f32,
    ) -> Self {
        let dims = [batches, heads, queries, keys];
        Self {
            batches,
            heads,
            kv_heads,
            queries,
            keys,
            head_size,
            order: Order::HeadsFirst,
            offset: 0,
            left: UNBOUNDED,
            right: UNBOUNDED,
            scale: 1. / (head_size as f64).sqrt(),
            softcap: 0.,
            lengths: None,
            slopes: None,
            mask: Mask::from_start(drop_p, &dims, &[0; 4]),
        }
    }

    pub fn causal(self) -> Self {
        Self { right: 0, ..self }
    }

    pub fn window(self, left: u32, right: u32) -> Self {
        Self { left, right, ..self }
    }

    /// Penalties that differ a lot from head to head.
    pub fn alibi(self) -> Self {
        let slopes = (0..self.heads).map(|head| 0.5f32.powi(head as i32 + 1)).collect();
        Self { slopes: Some(slopes), ..self }
    }

    fn dims(&self) -> [usize; 4] {
        [self.batches, self.heads, self.queries, self.keys]
    }

    fn args(&self) -> AttentionArgs {
        AttentionArgs {
            scale: self.scale,
            softcap: self.softcap,
            batches: self.batches as u32,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            queries: self.queries as u32,
            keys: self.keys as u32,
            head_size: self.head_size as u32,
            left: self.left,
            right: self.right,
        }
    }

    /// Written out as the definition reads, apart from what kernels and op do.
    fn sees(&self, batch: usize, query: usize, key: usize) -> bool {
        let ahead = (key + self.queries) as i64 - (query + self.keys) as i64;
        (self.left == UNBOUNDED || -ahead <= i64::from(self.left))
            && (self.right == UNBOUNDED || ahead <= i64::from(self.right))
            && self.lengths.as_ref().is_none_or(|lengths| key < lengths[batch] as usize)
    }

    fn what(&self) -> String {
        let Self { order, offset, left, right, softcap, lengths, slopes, .. } = self;
        format!(
            "{:?} x {}, {} kv heads, {order:?} + {offset}, left {left}, right {right}, softcap {softcap}, \
             lengths {lengths:?}, slopes {slopes:?}, {:?}",
            self.dims(),
            self.head_size,
            self.kv_heads,
            self.mask.args
        )
    }

    /// Where q and o, and where k and v lie: strides, and the element at which q, k and v begin in a packed
    /// tensor.
    fn place(&self) -> (AttentionLayout, [usize; 4]) {
        let Self { heads, kv_heads, queries, keys, head_size: d, order, .. } = *self;
        let strides = |[batch, head, row]: [usize; 3]| {
            let [batch, head, row] = [batch, head, row].map(|stride| stride as u64);
            HeadStrides { batch, head, row }
        };
        let of = |heads: usize, rows: usize| match order {
            Order::HeadsFirst => strides([heads * rows * d, rows * d, d]),
            Order::Projection => strides([rows * heads * d, d, heads * d]),
            Order::Packed => {
                let all = self.heads + 2 * kv_heads;
                strides([rows * all * d, d, all * d])
            }
            Order::Spread => strides([heads * rows * 2 * d, rows * 2 * d, 2 * d]),
            Order::Odd => strides([heads * rows * (d + 1), rows * (d + 1), d + 1]),
        };
        let (q, k) = (of(heads, queries), of(kv_heads, keys));
        let packed = order == Order::Packed;
        let o = if packed { strides([queries * heads * d, d, heads * d]) } else { q };
        let starts = if packed { [0, heads * d, (heads + kv_heads) * d, 0] } else { [0; 4] };
        (AttentionLayout { q, k, v: k, o }, starts)
    }
}

/// A tensor `[B, H, S, D]` somewhere in memory.
struct Placed {
    dims: [usize; 4],
    strides: HeadStrides,
    /// Elements behind a 16-byte boundary.
    start: usize,
}

impl Placed {
    fn index(&self, mut i: usize) -> usize {
        let [_, heads, rows, cols] = self.dims;
        let col = i % cols;
        i /= cols;
        let (row, i) = (i % rows, i / rows);
        let (head, batch) = (i % heads, i / heads);
        let HeadStrides { batch: b, head: h, row: r } = self.strides;
        batch * b as usize + head * h as usize + row * r as usize + col
    }

    fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Up to its last element and no further.
    fn span(&self) -> usize {
        self.index(self.len() - 1) + 1
    }

    fn input<T: Element>(&self, case: Case, elements: &[T]) -> Case {
        let mut memory = vec![poison(0); self.span()];
        elements.iter().enumerate().for_each(|(i, x)| memory[self.index(i)] = *x);
        case.input(&memory).misaligned_by(self.start * size_of::<T>() % 16)
    }

    fn output<T: Element>(&self, case: Case) -> Case {
        case.output::<T>(self.span()).misaligned_by(self.start * size_of::<T>() % 16)
    }

    /// The elements; between them nothing may have been written.
    fn read<T: Element>(&self, memory: &[T], bytes: &[u8], what: &str) -> Vec<T> {
        let mut is_element = vec![false; memory.len()];
        (0..self.len()).for_each(|i| is_element[self.index(i)] = true);
        for (at, bytes) in bytes.chunks(size_of::<T>()).enumerate() {
            let untouched = bytes.iter().all(|byte| *byte == POISON);
            assert!(
                is_element[at] || untouched,
                "{what}: wrote element {at}, which is not its own"
            );
        }
        (0..self.len()).map(|i| memory[self.index(i)]).collect()
    }
}

/// What the kernels are given, `[B, H, S, D]` each.
pub struct Inputs<T> {
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub dout: Vec<T>,
}

impl<T: Element> Inputs<T> {
    /// Random numbers, and NaN or infinities in every key that is padding and every query that sees nothing.
    pub fn random(form: &Form) -> Self {
        let Form { batches, heads, kv_heads, queries, keys, head_size, .. } = *form;
        let of = |seed: u64, len: usize| random::<T>(seed, len);
        let mut inputs = Self {
            q: of(1, batches * heads * queries * head_size),
            k: of(2, batches * kv_heads * keys * head_size),
            v: of(3, batches * kv_heads * keys * head_size),
            dout: of(4, batches * heads * queries * head_size),
        };
        for batch in 0..batches {
            for key in 0..keys {
                if (0..queries).any(|query| form.sees(batch, query, key)) {
                    continue;
                }
                for head in 0..kv_heads {
                    for d in 0..head_size {
                        let at = ((batch * kv_heads + head) * keys + key) * head_size + d;
                        inputs.k[at] = poison(d);
                        inputs.v[at] = poison(d + 1);
                    }
                }
            }
            for query in 0..queries {
                if (0..keys).any(|key| form.sees(batch, query, key)) {
                    continue;
                }
                for head in 0..heads {
                    for d in 0..head_size {
                        let at = ((batch * heads + head) * queries + query) * head_size + d;
                        inputs.q[at] = poison(d);
                        inputs.dout[at] = poison(d + 1);
                    }
                }
            }
        }
        inputs
    }
}

/// What a pass computes, and how far each element may be off.
#[derive(Clone, Default)]
pub struct Expected {
    pub values: Vec<f64>,
    /// Sizes of what an element is the sum of, each times the number of roundings in f32 that it goes through.
    f32_terms: Vec<f64>,
    /// Those that pass through the dtype once, such as probabilities on their way into a product.
    terms: Vec<f64>,
    /// What those are multiplied with behind it: where they are subnormal halves, their error is absolute.
    factors: Vec<f64>,
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
    let drop_scale = form.mask.scale;
    for row in 0..rows {
        let (head, query) = (row / queries, row % queries);
        let (batch, h) = (head / heads, head % heads);
        let kv_head = batch * kv_heads + h / (heads / kv_heads);
        let of_row = |x: &'_ [f64]| x[row * head_size..][..head_size].to_vec();
        let of_key = |key: usize| (kv_head * keys + key) * head_size;
        let (q_row, dout_row) = (of_row(&q), of_row(&dout));
        let slope = form.slopes.as_ref().map_or(0., |slopes| f64::from(slopes[h]));
        let visible: Vec<usize> = (0..keys).filter(|key| form.sees(batch, query, *key)).collect();
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
            roundings.push(size);
            cap_slope.push(1. - u * u);
        }
        let max = t.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let e: Vec<f64> = t.iter().map(|t| round_sum((t - max).exp())).collect();
        let sum = e.iter().fold(0., |sum, e| round_sum(sum + e));
        let p: Vec<f64> = e.iter().map(|e| round(e / sum)).collect();
        let lse = max + sum.ln();
        let row_roundings: f64 = p.iter().zip(&roundings).map(|(p, r)| p * r).sum();
        let roundings: Vec<f64> =
            roundings.iter().map(|r| 4. + r + row_roundings + lse.abs()).collect();
        results.lse.values[row] = lse;
        results.lse.f32_terms[row] = 4. + row_roundings + lse.abs();

        let keep = |key: usize| form.mask.keep[row * keys + key];
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

/// What the kernels made of a form.
pub struct Computed<T> {
    pub o: Vec<T>,
    pub lse: Vec<f32>,
    pub dq: Vec<T>,
    pub dk: Vec<T>,
    pub dv: Vec<T>,
}

/// A form, its inputs, and the lse and delta that backward gets.
type Run<'a, T> = (&'a Form, &'a Inputs<T>, Vec<f32>, Vec<f32>);

/// Runs forward and both backward kernels, in each of the orders of their threads.
fn compute<T: Element>(
    kernels: &Kernels,
    orders: &[ThreadOrder],
    forms: &[Run<T>],
) -> Vec<Computed<T>> {
    let mut cases = Vec::new();
    let mut places = Vec::new();
    for (form, inputs, lse, delta) in forms {
        let (layout, starts) = form.place();
        let [q, k, v, o] = [
            (form.heads, form.queries, layout.q),
            (form.kv_heads, form.keys, layout.k),
            (form.kv_heads, form.keys, layout.v),
            (form.heads, form.queries, layout.o),
        ]
        .map(|(heads, rows, strides)| ([form.batches, heads, rows, form.head_size], strides));
        let at = |(dims, strides): ([usize; 4], HeadStrides), start: usize| Placed {
            dims,
            strides,
            start: start + form.offset,
        };
        let (q, k, v, o) = (at(q, starts[0]), at(k, starts[1]), at(v, starts[2]), at(o, starts[3]));
        let common = |pass: AttentionPass| {
            let case = kernels.case::<T>(pass, form);
            let case = q.input(case, &inputs.q);
            let case = k.input(case, &inputs.k);
            let case = v.input(case, &inputs.v);
            case.optional_numbers(&form.lengths).optional_numbers(&form.slopes)
        };
        let (args, mask) = (form.args(), form.mask.args);
        let rows = form.batches * form.heads * form.queries;
        let fwd = o.output::<T>(common(AttentionPass::Fwd)).output::<f32>(rows);
        cases.push(fwd.by_value(&args).by_value(&layout).by_value(&mask));
        let given = |case: Case| o.input(case, &inputs.dout).input(lse).input(delta);
        let by_value =
            |case: Case| case.by_value(&args).by_value(&layout).by_value(&layout).by_value(&mask);
        cases.push(by_value(q.output::<T>(given(common(AttentionPass::BwdDq)))));
        let dk = k.output::<T>(given(common(AttentionPass::BwdDkdv)));
        cases.push(by_value(v.output::<T>(dk)));
        places.push((q, k, v, o));
    }
    let cases: Vec<Case> = cases.into_iter().map(|case| case.orders(orders)).collect();
    let outputs = kernels.program.run(&cases).unwrap();
    outputs
        .chunks(3)
        .zip(places)
        .zip(forms)
        .map(|((outputs, (q, k, v, o)), (form, ..))| {
            let read = |place: &Placed, case: usize, buffer: usize| {
                let outputs = &outputs[case];
                place.read(&outputs.get::<T>(buffer), outputs.bytes(buffer), &form.what())
            };
            Computed {
                o: read(&o, 0, 0),
                lse: outputs[0].get(1),
                dq: read(&q, 1, 0),
                dk: read(&k, 2, 0),
                dv: read(&v, 2, 1),
            }
        })
        .collect()
}

fn to_f32(x: &[f64]) -> Vec<f32> {
    x.iter().map(|x| *x as f32).collect()
}

/// The unit of rounding.
fn unit<T: Element>() -> f64 {
    0.5f64.powi(match size_of::<T>() {
        4 => 24,
        _ if T::DTYPE == candle_core::DType::F16 => 11,
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
    let least = if T::DTYPE == candle_core::DType::F16 { LEAST_HALF } else { 0.5f64.powi(134) };
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
            (form, inputs, to_f32(&expected.lse.values), to_f32(&expected.delta))
        })
        .collect();
    for (computed, (expected, form)) in
        compute(kernels, EVERY_ORDER, &runs).iter().zip(expected.iter().zip(forms))
    {
        let what = |result: &str| format!("{result} of {}", form.what());
        assert_within(&computed.o, &expected.o, &what("o"));
        assert_within(&computed.lse, &expected.lse, &what("lse"));
        assert_within(&computed.dq, &expected.dq, &what("dq"));
        assert_within(&computed.dk, &expected.dk, &what("dk"));
        assert_within(&computed.dv, &expected.dv, &what("dv"));
    }
}

/// Sizes around those of tiles, alone and at several head sizes.
pub fn shapes(head_sizes: &[usize]) -> Vec<Form> {
    let mut forms = Vec::new();
    let sizes = [[1, 1], [3, 70], [65, 5], [64, 64], [63, 129], [130, 33]];
    for (at, &[queries, keys]) in sizes.iter().enumerate() {
        for (turn, &head_size) in head_sizes.iter().enumerate() {
            // Each pair of sizes meets several head sizes, each head size several pairs.
            if (at + turn) % 3 == 0 || queries * keys < 300 {
                let drop_p = [0.1, 0., 0.5][(at + turn / 3) % 3];
                forms.push(Form::new([queries, keys, head_size], drop_p));
            }
        }
    }
    forms
}

/// Each feature alone and several at once, with sizes that are no multiples of anything.
pub fn features() -> Vec<Form> {
    let base = |drop_p| Form::with_heads([2, 4, 2], [37, 70, 24], drop_p);
    let tall = |drop_p| Form::with_heads([2, 2, 1], [75, 40, 20], drop_p);
    let lengths = |lengths: &[u32]| Some(lengths.to_vec());
    vec![
        base(0.2),
        base(0.),
        base(1.),
        base(0.2).causal(),
        base(0.).causal(),
        tall(0.2).causal(),
        tall(0.).causal(),
        base(0.2).window(9, 4),
        base(0.2).window(UNBOUNDED, 7),
        base(0.2).window(11, UNBOUNDED),
        tall(0.3).window(5, 0),
        Form { softcap: 1.5, ..base(0.2) },
        Form { softcap: 1.5, ..base(0.) },
        Form { softcap: 0.7, ..tall(0.2).causal().alibi() },
        Form { scale: -0.3, ..base(0.2).causal() },
        Form { scale: 0., ..base(0.2) },
        base(0.2).alibi(),
        tall(0.2).alibi(),
        Form { lengths: lengths(&[70, 33]), ..base(0.2) },
        Form { lengths: lengths(&[0, 65]), ..base(0.2).causal() },
        Form { lengths: lengths(&[7, 99]), ..tall(0.) },
        Form { lengths: lengths(&[64, 1]), softcap: 2., ..base(0.4).window(20, 3).alibi() },
        Form::with_heads([1, 6, 1], [20, 90, 16], 0.2).causal(),
        Form::with_heads([1, 3, 3], [90, 90, 16], 0.2).causal(),
        // Logits that rise from tile to tile, a lot or a little.
        Form::with_heads([1, 4, 2], [40, 200, 24], 0.2).causal().alibi(),
        Form { scale: 3., ..Form::with_heads([1, 2, 2], [40, 200, 72], 0.) },
        // Limits that no key or no query lies within.
        Form { lengths: lengths(&[2, 1]), ..base(0.2).window(3, 2) },
        base(0.1).window(0, 0),
        base(0.1).window(UNBOUNDED - 1, UNBOUNDED - 1),
    ]
}

/// Every order in memory, aligned and not, vectors and not.
pub fn layouts() -> Vec<Form> {
    let mut forms = Vec::new();
    for order in [Order::HeadsFirst, Order::Projection, Order::Packed, Order::Spread, Order::Odd] {
        for (head_size, offset) in [(32, 0), (32, 1), (9, 0), (14, 2), (40, 8)] {
            // 24 rows of odd stride are whole vectors again, so samples begin at 16-byte boundaries.
            let rows = if order == Order::Odd { 24 } else { 21 };
            let form = Form::with_heads([2, 4, 2], [rows, rows, head_size], 0.2);
            forms.push(Form { order, offset, ..form.causal() });
        }
    }
    forms
}

/// Parts of larger masks, that begin at whole Philox calls or within one; extreme rates.
pub fn masks() -> Vec<Form> {
    let mut forms = Vec::new();
    for start in [[0, 0, 0, 8], [1, 2, 3, 64], [0, 0, 0, 3], [2, 1, 0, 13], [1, 0, 7, 31]] {
        let form = Form::with_heads([2, 2, 1], [19, 45, 8], 0.);
        let dims = form.dims();
        let full: Vec<usize> = (0..4).map(|d| start[d] + dims[d] + d % 2).collect();
        let mask = Mask::window(0.4, [&dims, &full, &start]);
        forms.push(Form { mask, ..form });
    }
    // Rows and columns that need more than 32 bits.
    let form = Form::with_heads([1, 2, 2], [5, 20, 8], 0.);
    for start in [(1 << 33) + 8, (1 << 33) + 5] {
        let dims = form.dims();
        let full = [1 << 20, 1 << 10, 1 << 30, 1 << 34];
        let mask = Mask::window(0.5, [&dims, &full, &[1 << 19, 3, 77, start]]);
        forms.push(Form { mask, ..Form::with_heads([1, 2, 2], [5, 20, 8], 0.) });
    }
    for drop_p in [1. / 65536., 65535. / 65536.] {
        forms.push(Form::new([40, 90, 8], drop_p));
    }
    // A draw that equals the threshold is dropped, in either half of a word.
    for element in [0, 1] {
        let form = Form::new([3, 20, 8], 0.);
        let of_threshold = |threshold: u32| {
            Mask::from_start((65536 - threshold) as f32 / 65536., &form.dims(), &[0; 4])
        };
        // The draw is the largest threshold that drops its element.
        let draw = (0..16).rev().map(|bit| 1 << bit).fold(0, |draw, bit| {
            if of_threshold(draw + bit).keep[element] { draw } else { draw + bit }
        });
        forms.push(Form { mask: of_threshold(draw), ..form });
    }
    forms
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
        let lse = vec![(keys as f32).ln(); rows];
        let runs: Vec<_> =
            inputs.iter().map(|inputs| (form, inputs, lse.clone(), vec![0.; rows])).collect();
        // Other tests see to it that the order does not matter.
        let computed = compute(kernels, &[ThreadOrder::Forward], &runs);

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
        let (lse, delta) = (to_f32(&reference.lse.values), to_f32(&reference.delta));
        let computed = compute(kernels, EVERY_ORDER, &[(form, &inputs, lse, delta)]).remove(0);
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

// mutant of kernels/attention.cuh: window begins late|s/queries - left;/queries - left + 1;/
// mutant of kernels/attention.cuh: window ends early|s/queries \+ right \+ 1;/queries + right;/
// mutant of kernels/attention.cuh: first query lost|s/queries - keys - right;/queries - keys - right + 1;/
// mutant of kernels/attention.cuh: last query lost|s/keys \+ left \+ 1;/keys + left;/
// mutant of kernels/attention.cuh: length past the keys|s/min\(key_lengths\[batch\], keys\)/key_lengths[batch]/
// mutant of kernels/attention.cuh: scale above the softcap|s/args\.scale \/ args\.softcap/args.scale/
// mutant of kernels/attention.cuh: slope of the softcap|s/1\.f - tanh \* tanh/1.f/
// mutant of kernels/attention.cuh: one slope for all heads|s/alibi_slopes\[head\]/alibi_slopes[0]/
// mutant of kernels/attention.cuh: distance with a sign|s/fabsf\(float\(int\(own_key - key\)\)\)/float(int(own_key - key))/
// mutant of kernels/attention.cuh: vectors anywhere|s/is_aligned\(tensor\) && //
// mutant of kernels/attention.cuh: strides unchecked|s/\(strides\.batch \| strides\.head \| strides\.row\)/strides.batch/
