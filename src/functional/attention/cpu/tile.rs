//! A tile of scores and its products, in memory that is used again.

use super::super::args::AttentionArgs;
use super::KEYS;
use super::heads::Rows;
use crate::cpu::{Element, Left, Product, Real, Right, multiply, panel, slice_sum, vectorized};

/// A tile of scores: its queries and the keys that any of them sees.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) query: usize,
    pub(super) queries: usize,
    /// First key of its block.
    pub(super) block: usize,
    pub(super) begin: usize,
    pub(super) end: usize,
}

impl Tile {
    /// Keys of the block before `begin`.
    #[inline(always)]
    pub(super) fn skipped(&self) -> usize {
        self.begin - self.block
    }

    /// The columns that hold them, from and to whole panels.
    #[inline(always)]
    pub(super) fn columns<R>(&self) -> (usize, usize) {
        let panel = panel::<R>();
        let end = (self.end - self.block).next_multiple_of(panel);
        (self.skipped() / panel * panel, end)
    }

    /// The columns that one of its queries sees.
    #[inline(always)]
    pub(super) fn seen(&self, args: &AttentionArgs, query: usize, keys: usize) -> (usize, usize) {
        let (begin, end) = args.visible(query, keys);
        let begin = begin.clamp(self.begin, self.end);
        (begin - self.block, end.clamp(begin, self.end) - self.block)
    }

    /// `scores = left · keys`, in whole panels.
    pub(super) fn scores<R: Real>(
        &self,
        left: &[R],
        width: usize,
        keys: &[R],
        cols: usize,
        scores: &mut [R],
    ) {
        let (panel, (from, to)) = (panel::<R>(), self.columns::<R>());
        multiply(
            Product { m: self.queries, n: to - from, k: cols, add: false },
            Left { elements: left, row: width, col: 1 },
            // A key that is no number spoils its own scores alone.
            Right { elements: &keys[from * cols..], row: panel, panel: panel * cols, finite: true },
            &mut scores[from..],
            KEYS,
        );
    }

    /// `out += weights · rows`, over the keys.
    pub(super) fn over_keys<R: Real>(&self, weights: &[R], rows: &Widened<R>, out: &mut [R]) {
        multiply(
            Product { m: self.queries, n: rows.width, k: self.end - self.begin, add: true },
            Left { elements: &weights[self.skipped()..], row: KEYS, col: 1 },
            rows.right(self.skipped()),
            out,
            rows.width,
        );
    }

    /// `out += weightsᵀ · rows`, over the queries.
    pub(super) fn over_queries<R: Real>(&self, weights: &[R], rows: &Widened<R>, out: &mut [R]) {
        multiply(
            Product { m: self.end - self.begin, n: rows.width, k: self.queries, add: true },
            Left { elements: &weights[self.skipped()..], row: 1, col: KEYS },
            rows.right(0),
            &mut out[self.skipped() * rows.width..],
            rows.width,
        );
    }
}

/// Rows in the type of the arithmetic, each in whole panels, the rest zeros.
pub(super) struct Widened<R> {
    pub(super) elements: Vec<R>,
    pub(super) width: usize,
    pub(super) finite: bool,
}

impl<R: Real> Widened<R> {
    pub(super) fn zeros(rows: usize, width: usize) -> Self {
        Self { elements: vec![R::ZERO; rows * width], width, finite: true }
    }

    /// The rows from `row` on, as an operand.
    pub(super) fn right(&self, row: usize) -> Right<'_, R> {
        let elements = &self.elements[row * self.width..];
        Right { elements, row: self.width, panel: panel::<R>(), finite: self.finite }
    }

    /// Takes `scale` times the rows from `first` to `end`.
    pub(super) fn load<E: Element<Real = R>>(
        &mut self,
        rows: &Rows<'_, E>,
        (batch, head): (usize, usize),
        (first, end): (usize, usize),
        scale: R,
    ) {
        self.finite = widen(rows, batch, head, first, end, scale, self.width, &mut self.elements);
    }
}

vectorized! {
    /// Loads rows, `width` elements apart, and tells whether all are finite.
    fn widen<E: Element>(
        rows: &Rows<'_, E>,
        batch: usize,
        head: usize,
        first: usize,
        end: usize,
        scale: E::Real,
        width: usize,
        out: &mut [E::Real],
    ) -> bool {
        let mut spoiled = E::Real::ZERO;
        for (row, out) in (first..end).zip(out.chunks_exact_mut(width)) {
            let row = rows.row(batch, head, row);
            for (out, x) in out.iter_mut().zip(row) {
                *out = x.load() * scale;
            }
            spoiled += slice_sum(&out[..row.len()], |x| x * E::Real::ZERO);
        }
        spoiled == E::Real::ZERO
    }
}

vectorized! {
    /// Loads rows as columns of panels: element `d` of row `r` at `(r / panel * cols + d) * panel + r % panel`.
    pub(super) fn transpose<E: Element>(
        rows: &Rows<'_, E>,
        batch: usize,
        head: usize,
        first: usize,
        end: usize,
        out: &mut [E::Real],
    ) {
        let panel = panel::<E::Real>();
        for row in first..end {
            let (at, column) = ((row - first) / panel, (row - first) % panel);
            let out = out[at * panel * rows.cols..][..panel * rows.cols].chunks_exact_mut(panel);
            for (out, x) in out.zip(rows.row(batch, head, row)) {
                out[column] = x.load();
            }
        }
    }
}
