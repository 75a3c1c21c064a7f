//! Runs of the three kernels that walk over tiles of scores.

use candle_dropout::functional::{AttentionPass, HeadStrides};
use candle_dropout::sizes::Launch;

use super::form::Form;
use super::inputs::Inputs;
use crate::host::{Case, Element, Order, POISON, Program, case, poison};

/// The attention kernels of one file.
pub struct Kernels {
    pub program: &'static Program,
    /// Head sizes that there are instances for.
    pub head_sizes: &'static [usize],
    /// Of an instance: pass, its head size, heads of all samples, rows.
    pub launch: fn(AttentionPass, usize, usize, usize) -> Launch,
    /// What the reference of a row with a logit of 1 is, in their base.
    pub unit_logit: f64,
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
        let nodrop = if form.mask.drop.is_none() { "_nodrop" } else { "" };
        case::<T>(&format!("{}{nodrop}_d{instance}", pass.kernel()), launch)
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
        self.strides.at(batch, head, row) + col
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

/// What the kernels made of a form.
pub struct Computed<T> {
    pub o: Vec<T>,
    /// Reference and normaliser of each row.
    pub softmax: Vec<f32>,
    pub dq: Vec<T>,
    pub dk: Vec<T>,
    pub dv: Vec<T>,
}

/// A form, its inputs, and the softmax and delta of rows that backward gets.
pub type Run<'a, T> = (&'a Form, &'a Inputs<T>, Vec<f32>, Vec<f32>);

/// Runs forward and both backward kernels, in each of the orders of their threads.
pub fn compute<T: Element>(
    kernels: &Kernels,
    orders: &[Order],
    forms: &[Run<T>],
) -> Vec<Computed<T>> {
    let mut cases = Vec::new();
    let mut places = Vec::new();
    for (form, inputs, softmax, delta) in forms {
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
        let (args, mask) = (form.args(), form.mask_args());
        let rows = form.batches * form.heads * form.queries;
        let fwd = o.output::<T>(common(AttentionPass::Fwd)).output::<f32>(2 * rows);
        cases.push(fwd.by_value(&args).by_value(&layout).by_value(&mask));
        let given = |case: Case| o.input(case, &inputs.dout).input(softmax).input(delta);
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
                softmax: outputs[0].get(1),
                dq: read(&q, 1, 0),
                dk: read(&k, 2, 0),
                dv: read(&v, 2, 1),
            }
        })
        .collect()
}
