//! One description of each op: its arguments, the fused call, the naive formula, candle's chain, the bytes
//! it moves.
//!
//! Tests, the kernels on the host, the GPU bundle and the benches iterate over these; nothing else lists ops.
//! A formula is a chain of candle operations, written as it reads, so it works in every float dtype: in f64
//! it is the reference, in the dtype of an op it shows which error the op may have. Its gradients are
//! candle's own. It takes `keep`, 1 where an element is kept and 0 where it is dropped (u8, as
//! [`DropMask::to_tensor`](candle_dropout::DropMask::to_tensor) gives it), and `drop_scale`, which is
//! [`Rate::scale`](candle_dropout::Rate::scale).

mod case;
mod chain;
mod composed;
pub mod device;
#[cfg(test)]
mod host;
pub mod runner;
mod tensors;
mod view;

pub use case::{Case, Exact, Op, Results};
pub use chain::check_chain;
pub use composed::Composed;
pub use tensors::{DTYPES, bits, drop_scale, epsilon, error, largest, mask, random};
pub use view::View;

/// `ops!(then)` is `then! { dropout, zoneout, .. }`: the one list of ops, in the order of results.
#[macro_export]
macro_rules! ops {
    ($then:ident) => {
        $then! {
            dropout,
            dropout_add,
            broadcast_dropout,
            column_sums,
            dropout_add_norm,
            activation_dropout,
            softmax_dropout,
            drop_path_add,
            drop_path_kept,
            gaussian,
            norm,
            rope,
            cross_entropy,
            attention,
            linear,
            concrete_dropout,
            drop_connect_conv2d,
            drop_block,
            zoneout,
        }
    };
}

/// For each op `pub mod <op>;`, and all of them in [`OPS`].
macro_rules! declare {
    ($($op:ident),* $(,)?) => {
        $(pub mod $op;)*

        /// Every op with its cases.
        pub const OPS: &[Op] = &[$(Op { name: stringify!($op), cases: $op::CASES }),*];
    };
}
ops!(declare);

/// The cases of all ops.
pub fn cases() -> impl Iterator<Item = &'static dyn Case> {
    OPS.iter().flat_map(|op| op.cases.iter().copied())
}

/// The kernels of what is no op.
#[cfg(test)]
mod adamw {
    mod kernel;
}
