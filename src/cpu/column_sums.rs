//! Sums over rows.

use super::{Element, Real};

/// Rows that are summed in the type that passes compute in. Rounding errors grow with the length of a chain and with
/// what has been summed up, so all of them are summed in f64.
const BLOCK_ROWS: usize = 8;

/// A sum for each column.
pub(crate) struct ColumnSums<R> {
    of_block: Vec<R>,
    rows: usize,
    totals: Vec<f64>,
}

impl<R: Real> ColumnSums<R> {
    pub(crate) fn new(cols: usize) -> Self {
        Self { of_block: vec![R::ZERO; cols], rows: 0, totals: vec![0.; cols] }
    }

    /// Where the elements of the next row are added, each to its column; [`end_row`](Self::end_row) follows.
    #[inline(always)]
    pub(crate) fn row(&mut self) -> &mut [R] {
        &mut self.of_block
    }

    #[inline(always)]
    pub(crate) fn end_row(&mut self) {
        self.rows += 1;
        if self.rows == BLOCK_ROWS {
            self.end_block();
        }
    }

    #[inline(always)]
    fn end_block(&mut self) {
        self.rows = 0;
        for (total, sum) in self.totals.iter_mut().zip(&mut self.of_block) {
            *total += sum.to_f64();
            *sum = R::ZERO;
        }
    }

    /// Those of several parts, added up in their order.
    pub(crate) fn of_parts<E: Element<Real = R>>(
        cols: usize,
        parts: impl IntoIterator<Item = Self>,
    ) -> Vec<E> {
        let mut totals = vec![0.; cols];
        for mut part in parts {
            part.end_block();
            totals.iter_mut().zip(&part.totals).for_each(|(total, sum)| *total += sum);
        }
        totals.into_iter().map(|total| E::store(R::from_f64(total))).collect()
    }
}
