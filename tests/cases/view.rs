//! How the arguments of an op lie in memory.

use candle_core::{Result, Tensor};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum View {
    Contiguous,
    /// The last two dimensions swapped.
    Transposed,
    /// The second dimension behind the third, as a projection leaves heads: `[B, S, H, D]`.
    RowsBeforeHeads,
    /// The middle of something larger along the first dimension.
    Offset,
    /// The same along the last two.
    Inset,
    /// One entry of the first dimension, repeated; a bias stays as it is, since candle would sum its
    /// gradient in the dtype.
    Broadcast,
}

impl View {
    pub const ALL: [Self; 6] = [
        Self::Contiguous,
        Self::Transposed,
        Self::RowsBeforeHeads,
        Self::Offset,
        Self::Inset,
        Self::Broadcast,
    ];

    /// The shape of what is viewed as `dims`.
    pub fn base(self, dims: &[usize]) -> Vec<usize> {
        let (mut base, rank) = (dims.to_vec(), dims.len());
        match self {
            Self::Transposed if rank >= 2 => base.swap(rank - 2, rank - 1),
            Self::RowsBeforeHeads if rank >= 3 => base.swap(1, 2),
            Self::Offset if rank >= 1 => base[0] += 3,
            Self::Inset if rank >= 2 => {
                base[rank - 2] += 3;
                base[rank - 1] += 5;
            }
            Self::Broadcast if rank >= 2 => base[0] = 1,
            _ => {}
        }
        base
    }

    pub fn of(self, base: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let rank = dims.len();
        match self {
            Self::Transposed if rank >= 2 => base.transpose(rank - 2, rank - 1),
            Self::RowsBeforeHeads if rank >= 3 => base.transpose(1, 2),
            Self::Offset if rank >= 1 => base.narrow(0, 2, dims[0]),
            Self::Inset if rank >= 2 => {
                base.narrow(rank - 2, 2, dims[rank - 2])?.narrow(rank - 1, 1, dims[rank - 1])
            }
            Self::Broadcast => base.broadcast_as(dims),
            _ => Ok(base.clone()),
        }
    }
}
