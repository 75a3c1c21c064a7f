//! What the passes read.

use candle_core::{Result, Tensor};

use super::Activation;
use crate::check::rows_cols;

/// The input of the function and, of a gated form, the values that it scales: rows of so many elements at equal
/// distances.
#[derive(Debug)]
pub(super) struct Rows {
    /// `[.., C]`; `[.., 2 C]` where the values lie behind the gate's input in each row.
    pub(super) x: Tensor,
    /// The values, `[.., C]`, where they are a tensor of their own.
    pub(super) up: Option<Tensor>,
    /// One row of `x`.
    pub(super) bias: Option<Tensor>,
    /// Elements from one row to the next, of `x` as of `up`.
    pub(super) stride: usize,
}

impl Rows {
    /// They are read where they lie if their rows are equally far apart, and otherwise copied.
    pub(super) fn new(x: &Tensor, up: Option<&Tensor>, bias: Option<&Tensor>) -> Result<Self> {
        let bias = bias.map(|bias| bias.detach().contiguous()).transpose()?;
        let (x, up) = (x.detach(), up.map(Tensor::detach));
        let stride = row_stride(&x);
        match stride.filter(|_| up.as_ref().is_none_or(|up| row_stride(up) == stride)) {
            Some(stride) => Ok(Self { x, up, bias, stride }),
            None => {
                let (x, up) = (x.contiguous()?, up.as_ref().map(Tensor::contiguous).transpose()?);
                let stride = x.dims().last().copied().unwrap_or(1);
                Ok(Self { x, up, bias, stride })
            }
        }
    }

    /// Rows, columns of the output, and columns of `x`.
    pub(super) fn sizes(&self, activation: Activation) -> [usize; 3] {
        let (rows, x_cols) = rows_cols(self.x.dims());
        match self.up {
            Some(_) => [rows, x_cols, x_cols],
            None => [rows, activation.cols(x_cols), x_cols],
        }
    }
}

/// Elements from one row to the next, if the elements of a row are neighbours and all rows equally far apart.
fn row_stride(x: &Tensor) -> Option<usize> {
    if x.is_contiguous() {
        return Some(x.dims().last().copied().unwrap_or(1));
    }
    let (_, outer) = x.dims().split_last()?;
    let (step, strides) = x.stride().split_last()?;
    let mut outer = outer.iter().zip(strides).rev().filter(|(rows, _)| **rows > 1);
    let (rows, stride) = outer.next()?;
    let mut following = rows * stride;
    let is_even = outer.all(|(rows, stride)| {
        let continues = *stride == following;
        following *= rows;
        continues
    });
    (*step == 1 && is_even).then_some(*stride)
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device};

    use super::*;

    #[test]
    fn rows_are_equally_far_apart_or_not() -> Result<()> {
        let x = Tensor::arange(0f32, 240., &Device::Cpu)?.reshape((4, 3, 20))?;
        assert_eq!(row_stride(&x), Some(20));
        assert_eq!(row_stride(&x.narrow(D::Minus1, 5, 7)?), Some(20));
        assert_eq!(row_stride(&x.narrow(D::Minus1, 5, 7)?.narrow(0, 1, 2)?), Some(20));
        assert_eq!(row_stride(&x.narrow(1, 0, 1)?), Some(60));
        assert_eq!(row_stride(&x.narrow(1, 0, 2)?), None);
        assert_eq!(row_stride(&x.transpose(0, 1)?), None);
        assert_eq!(row_stride(&x.transpose(1, 2)?), None);
        assert_eq!(row_stride(&x.narrow(0, 0, 1)?.broadcast_as((4, 3, 20))?), None);
        let row = x.narrow(0, 0, 1)?.narrow(1, 0, 1)?;
        assert_eq!(row_stride(&row.broadcast_as((4, 3, 20))?), Some(0));
        assert_eq!(row_stride(&Tensor::new(1f32, &Device::Cpu)?), Some(1));
        Ok(())
    }

    #[test]
    fn rows_at_different_distances_are_copied() -> Result<()> {
        let x = Tensor::arange(0f32, 60., &Device::Cpu)?.reshape((3, 20))?;
        let [gate, up] = [x.narrow(1, 0, 10)?, x.narrow(1, 10, 10)?];
        let rows = Rows::new(&gate, Some(&up), None)?;
        assert_eq!((rows.stride, rows.x.is_contiguous()), (20, false));
        let rows = Rows::new(&gate, Some(&up.contiguous()?), None)?;
        assert_eq!((rows.stride, rows.x.is_contiguous()), (10, true));
        Ok(())
    }
}
