//! The tensors of a pass as rows of their heads.

use std::mem::MaybeUninit;

use candle_core::Result;

use super::super::args::{AttentionArgs, HeadStrides};
use super::super::shape::{Attention, Inputs};
use super::{KEYS, MIN_PRODUCTS, QUERIES};
use crate::cpu::{Element, Real, Scattered, optional_slice, panel};
use crate::input::Input;
use crate::mask::MaskArgs;

/// The rows of a tensor `[B, H, S, D]`.
pub(super) struct Rows<'a, E> {
    pub(super) elements: &'a [E],
    pub(super) strides: HeadStrides,
    pub(super) cols: usize,
}

impl<'a, E: Element> Rows<'a, E> {
    /// The rows from `start` elements behind the first one of the tensor on.
    pub(super) fn new(
        x: &'a Input<'_>,
        start: usize,
        strides: HeadStrides,
        cols: usize,
    ) -> Result<Self> {
        Ok(Self { elements: &x.strided_slice()?[start..], strides, cols })
    }

    #[inline(always)]
    pub(super) fn row(&self, batch: usize, head: usize, row: usize) -> &'a [E] {
        &self.elements[self.strides.at(batch, head, row)..][..self.cols]
    }
}

/// The rows of a tensor `[B, H, S, D]` that tasks write, each once.
pub(super) struct Output<'a, E> {
    pub(super) part: &'a Scattered<E>,
    pub(super) start: usize,
    pub(super) strides: HeadStrides,
    pub(super) cols: usize,
}

impl<E: Element> Output<'_, E> {
    /// Writes `scale * x` to a row.
    ///
    /// # Safety
    /// No other task writes this row at the same time.
    #[inline(always)]
    pub(super) unsafe fn write(
        &self,
        (batch, head, row): (usize, usize, usize),
        x: &[E::Real],
        scale: E::Real,
    ) {
        let start = self.start + self.strides.at(batch, head, row);
        // SAFETY: rows do not overlap, and the caller has this one to itself.
        let out: &mut [MaybeUninit<E>] = unsafe { self.part.part(start, self.cols) };
        for (out, x) in out.iter_mut().zip(x) {
            out.write(E::store(*x * scale));
        }
    }
}

/// The arguments of a pass, as rows of its heads.
pub(super) struct Heads<'a, E: Element> {
    pub(super) args: &'a AttentionArgs,
    pub(super) drop: &'a MaskArgs,
    pub(super) q: Rows<'a, E>,
    pub(super) k: Rows<'a, E>,
    pub(super) v: Rows<'a, E>,
    pub(super) key_lengths: Option<&'a [u32]>,
    pub(super) alibi_slopes: Option<&'a [f32]>,
    pub(super) scale: E::Real,
    pub(super) drop_scale: E::Real,
    /// 0 for none.
    pub(super) softcap: E::Real,
    pub(super) queries: usize,
    pub(super) head_size: usize,
    /// Columns of a widened row: the head size in whole panels.
    pub(super) width: usize,
    /// Heads that share keys and values.
    pub(super) group: usize,
}

/// What of its arguments is the same for all scores of a head.
pub(super) struct Head<R> {
    pub(super) batch: usize,
    pub(super) head: usize,
    pub(super) kv_head: usize,
    /// Keys of the sample.
    pub(super) keys: usize,
    /// 0 for none.
    pub(super) slope: R,
    /// The row of its first query in the mask.
    pub(super) mask_row: usize,
}

impl<'a, E: Element> Heads<'a, E> {
    pub(super) fn new(attention: &'a Attention, inputs: &'a Inputs<'_>) -> Result<Self> {
        let Attention { args, layout, drop, starts, .. } = attention;
        let head_size = args.head_size as usize;
        let rows = |x, start, strides| Rows::<E>::new(x, start, strides, head_size);
        Ok(Self {
            args,
            drop,
            q: rows(&inputs.q, starts[0], layout.q)?,
            k: rows(&inputs.k, starts[1], layout.k)?,
            v: rows(&inputs.v, starts[2], layout.v)?,
            key_lengths: optional_slice(&inputs.key_lengths)?,
            alibi_slopes: optional_slice(&inputs.alibi_slopes)?,
            scale: E::Real::from_f64(args.scale),
            drop_scale: E::Real::from_f32(drop.scale()),
            softcap: E::Real::from_f64(args.softcap),
            queries: args.queries as usize,
            head_size,
            width: head_size.next_multiple_of(panel::<E::Real>()),
            group: args.heads as usize / args.kv_heads as usize,
        })
    }

    /// Whether there is enough to do for several threads.
    pub(super) fn in_parallel(&self) -> bool {
        let scores = self.queries.saturating_mul(self.args.keys as usize);
        let heads = self.args.batches as usize * self.args.heads as usize;
        scores.saturating_mul(heads * self.head_size) >= MIN_PRODUCTS
    }

    /// Rows of the scratch memory for a block of keys and for a tile of queries.
    pub(super) fn tile_rows(&self) -> (usize, usize) {
        let keys = (self.args.keys as usize).next_multiple_of(panel::<E::Real>());
        (keys.min(KEYS), self.queries.min(QUERIES))
    }

    /// The head of this index in `[B, H]`.
    pub(super) fn head(&self, index: usize) -> Head<E::Real> {
        let heads = self.args.heads as usize;
        let (batch, head) = (index / heads, index % heads);
        let keys = self.args.keys as usize;
        let slope = self.alibi_slopes.map_or(0., |slopes| slopes[head]);
        Head {
            batch,
            head,
            kv_head: head / self.group,
            keys: self.key_lengths.map_or(keys, |lengths| keys.min(lengths[batch] as usize)),
            slope: E::Real::from_f32(slope),
            mask_row: index * self.queries,
        }
    }

    /// The keys from `start` to `end` that the queries of a tile see, if any.
    pub(super) fn seen(
        &self,
        head: &Head<E::Real>,
        (first, last): (usize, usize),
        (start, end): (usize, usize),
    ) -> Option<(usize, usize)> {
        let begin = self.args.visible(first, head.keys).0.max(start);
        let end = self.args.visible(last, head.keys).1.min(end).min(head.keys);
        (begin < end).then_some((begin, end))
    }
}
