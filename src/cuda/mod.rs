//! What passes on CUDA are made of: kernels and how they are found, loaded and launched, outputs, grids.
//!
//! Grids are pure functions that every build has, so that the kernels can be run on the host with the very
//! sizes that they get on a GPU; all else exists with the `cuda` feature only.

#[cfg(feature = "cuda")]
mod kernel;
#[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code))]
mod ptx_text;
pub mod sizes;

#[cfg(feature = "cuda")]
pub(crate) use kernel::{
    Kernel, Module, for_cuda_dtype, has_capability, launch, multiprocessors, optional_view, output,
    ptx, push_optional, storage,
};
