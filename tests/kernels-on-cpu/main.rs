//! Every CUDA kernel, compiled for the host and run without a GPU.
//!
//! `machine.h` emulates the execution model, `device.h` the device language, and `harness.rs` builds
//! and runs the programs. `selftest` proves that they notice what they are there to notice. Each op has
//! a module of its name, whose tests launch its kernels with the grids and blocks of `src/launch/` and with
//! the very structs that `src/` passes by value.

mod activation_dropout;
mod attention;
#[path = "../../src/ops/attention/config.rs"]
#[allow(dead_code)]
mod attention_args;
mod attention_delta;
mod attention_f32;
mod attention_half;
mod common;
mod cross_entropy;
#[path = "../../src/ops/cross_entropy/args.rs"]
#[allow(dead_code)]
mod cross_entropy_args;
mod drop_path_add;
mod drop_path_kept;
mod dropout;
mod dropout_add;
mod dropout_add_norm;
mod harness;
#[path = "../../src/launch/config.rs"]
mod launch;
#[path = "../../src/mask/mod.rs"]
#[allow(dead_code, unused_imports)]
mod mask;
mod norm;
mod rope;
#[path = "../../src/ops/rope/args.rs"]
#[allow(dead_code)]
mod rope_args;
#[path = "../../src/rows.rs"]
mod rows;
#[path = "../../src/ops/softmax_dropout/mask.rs"]
#[allow(dead_code)]
mod score_args;
mod selftest;
#[path = "../../src/simd.rs"]
mod simd;
mod softmax_dropout;
