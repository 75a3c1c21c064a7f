use candle_core::{CudaStorage, Result, bail};

use super::config::{AttentionArgs, AttentionLayout};
use super::{GradLayout, NAME, Operands};
use crate::mask::MaskArgs;

/// `o` in the strides `layout.o`, and `lse`.
pub(super) fn fwd(
    _args: &AttentionArgs,
    _layout: &AttentionLayout,
    _drop: &MaskArgs,
    _operands: &Operands<CudaStorage>,
) -> Result<(CudaStorage, CudaStorage)> {
    bail!("{NAME}: q: expected the CPU, got CUDA; move it with to_device")
}

/// `[dq, dk, dv]`, or one tensor that holds them all if `grads.packed`.
#[expect(clippy::too_many_arguments)]
pub(super) fn bwd(
    _args: &AttentionArgs,
    _layout: &AttentionLayout,
    _grads: &GradLayout,
    _drop: &MaskArgs,
    _operands: &Operands<CudaStorage>,
    _lse: &CudaStorage,
    _o: (&CudaStorage, usize),
    _dout: (&CudaStorage, usize),
) -> Result<Vec<CudaStorage>> {
    bail!("{NAME}: q: expected the CPU, got CUDA; move it with to_device")
}
