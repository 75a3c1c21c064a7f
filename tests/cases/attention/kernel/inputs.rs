//! What the kernels are given.

use super::form::Form;
use crate::host::{Element, poison, random};

/// What the kernels are given, `[B, H, S, D]` each.
pub struct Inputs<T> {
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub dout: Vec<T>,
}

impl<T: Element> Inputs<T> {
    /// Random numbers, whole ones where scores are far from 0, and NaN or infinities in every key that is
    /// padding and every query that sees nothing.
    pub fn random(form: &Form) -> Self {
        let Form { batches, heads, kv_heads, queries, keys, head_size, .. } = *form;
        let of = |seed: u64, len: usize| random::<T>(seed, len);
        let mut inputs = Self {
            q: of(1, batches * heads * queries * head_size),
            k: of(2, batches * kv_heads * keys * head_size),
            v: of(3, batches * kv_heads * keys * head_size),
            dout: of(4, batches * heads * queries * head_size),
        };
        if form.far != 0. {
            for (i, x) in inputs.q.iter_mut().chain(&mut inputs.k).enumerate() {
                let whole = if i % head_size == 0 { form.far } else { x.to_f64().round() };
                *x = T::from_f64(whole);
            }
        }
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
