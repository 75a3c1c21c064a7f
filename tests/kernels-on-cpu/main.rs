//! Every CUDA kernel, compiled for the host and run without a GPU.
//!
//! `machine.h` emulates the execution model, `device.h` the device language, and `harness.rs`
//! builds and runs the programs. `selftest` proves that they notice what they are there to notice.

mod harness;
mod selftest;
