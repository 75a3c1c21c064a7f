//! Every CUDA kernel, compiled for the host and run without a GPU.
//!
//! `machine.h` emulates the execution model, `device.h` the device language, and `harness.rs` builds
//! and runs the programs. `selftest` proves that they notice what they are there to notice. Each op has
//! a module of its name, whose tests launch its kernels with the grids and blocks of `src/launch/`.

mod common;
mod drop_path_add;
mod dropout;
mod dropout_add;
mod dropout_add_norm;
mod harness;
#[path = "../../src/launch/config.rs"]
mod launch;
mod selftest;
mod softmax_dropout;
