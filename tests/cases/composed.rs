//! A case as it is where there are no kernels: composed of candle's ops.

use candle_core::{DType, Device, Result, Tensor};
use candle_dropout::{DropMask, compose};

use crate::{Case, Exact};

/// The same op with its call composed, on whatever device.
#[derive(Clone, Copy, Debug)]
pub struct Composed(pub &'static dyn Case);

impl Case for Composed {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn arguments(&self, size: &[usize]) -> Vec<Vec<usize>> {
        self.0.arguments(size)
    }

    /// No long ones: a composition has neither chunks nor tiles of its own.
    fn takes(&self, size: &[usize]) -> bool {
        const MOST: usize = 1 << 16;
        let elements = |dims: &Vec<usize>| dims.iter().product::<usize>();
        self.0.takes(size) && self.arguments(size).iter().map(elements).sum::<usize>() <= MOST
    }

    fn fitting(&self, size: &[usize]) -> Vec<usize> {
        self.0.fitting(size)
    }

    fn drop_ps(&self) -> &'static [f32] {
        self.0.drop_ps()
    }

    fn awkward(&self) -> &'static [&'static [usize]] {
        self.0.awkward()
    }

    fn largest_argument(&self) -> f64 {
        self.0.largest_argument()
    }

    fn output(&self, arguments: &[Vec<usize>]) -> Vec<usize> {
        self.0.output(arguments)
    }

    fn is_loss(&self) -> bool {
        self.0.is_loss()
    }

    fn mask_dims(&self, size: &[usize]) -> Option<Vec<usize>> {
        self.0.mask_dims(size)
    }

    fn keep(&self, size: &[usize], drop: &DropMask) -> Result<Tensor> {
        self.0.keep(size, drop)
    }

    fn window(&self, drop: &DropMask, size: &[usize], start: &[usize]) -> DropMask {
        self.0.window(drop, size, start)
    }

    fn constants(&self, size: &[usize], dtype: DType, device: &Device) -> Result<Vec<Tensor>> {
        self.0.constants(size, dtype, device)
    }

    fn fused(&self, args: &[Tensor], constants: &[Tensor], drop: &DropMask) -> Result<Vec<Tensor>> {
        let _composed = compose();
        self.0.fused(args, constants, drop)
    }

    fn formula(
        &self,
        args: &[Tensor],
        constants: &[Tensor],
        keep: &Tensor,
        drop_scale: f64,
    ) -> Result<Vec<Tensor>> {
        self.0.formula(args, constants, keep, drop_scale)
    }

    fn terms(&self, exact: &Exact<'_>) -> Result<Vec<f64>> {
        self.0.terms(exact)
    }

    /// Each of candle's ops rounds what it gives, in f32 for halves, and no composition has more than 16 in a row.
    fn epsilon(&self, size: &[usize], dtype: DType) -> f64 {
        const OPS: f64 = 16.;
        let rounded_between = match dtype {
            DType::F16 | DType::BF16 => DType::F32,
            dtype => dtype,
        };
        self.0.epsilon(size, dtype) + OPS * self.0.epsilon(size, rounded_between)
    }

    fn is_on_cuda(&self, size: &[usize], dtype: DType) -> bool {
        self.0.is_on_cuda(size, dtype)
    }
}
