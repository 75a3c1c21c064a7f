//! Every CUDA kernel, compiled for the host and run without a GPU.
//!
//! A [`Program`] is one `.cu` file, built with AddressSanitizer and UBSan: `machine.h` emulates the execution
//! model, `device.h` the device language. A [`Case`] is one launch of one of its kernels. Each case runs in
//! several orders of its threads, and a result that depends on the order is a failure. `selftest` proves that
//! all this notices what it is there to notice.
//!
//! The tests of an op's kernels are in `<op>/kernel.rs`. They launch them with the grids and blocks of the
//! library, and with the very structs that it passes by value. Each begins with `skip_without_compiler!()`.

mod build;
mod case;
mod common;
mod host_source;
mod mask;
mod program;
mod selftest;

pub(crate) use build::{has_compiler, skip_without_compiler};
pub use case::{Case, EVERY_ORDER, Order, Outputs, POISON, Plain};
pub(crate) use common::*;
pub use mask::{Mask, assert_keeps_the_vectors};
pub use program::Program;
