//! From shapes to kernel launches.
//!
//! The launch sizes are pure functions that every build has, so that the kernels can be run on the host
//! with the very sizes they get on a GPU; arguments and launches exist with the `cuda` feature only.

#[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code))]
pub(crate) mod config;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code))]
pub(crate) mod ptx_text;
