//! Compiles `kernels/*.cu` to PTX, under the `cuda` feature only. No GPU is needed.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    if let Err(error) = kernels::build() {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

#[cfg(feature = "cuda")]
mod kernels {
    use std::path::PathBuf;

    /// The compute capability of the PTX, unless the GPU has an earlier one. The kernels use nothing of
    /// later GPUs, for which their driver compiles it; so one text, which `scripts/ptxas-check.sh` has
    /// assembled for all of them, runs everywhere.
    const COMPUTE_CAP: usize = 80;

    /// Writes `OUT_DIR/kernels.rs`: a constant with the PTX of each `kernels/<op>.cu`.
    pub fn build() -> Result<(), String> {
        println!("cargo:rerun-if-changed=kernels");
        println!("cargo:rerun-if-env-changed=CUDA_COMPUTE_CAP");
        let out = std::env::var("OUT_DIR").map_err(|e| format!("OUT_DIR: {e}"))?;
        let headers = std::fs::read_dir("kernels")
            .map_err(|e| format!("kernels: {e}"))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "cuh"));
        cudaforge::detect_compute_cap()
            .and_then(|gpu| {
                cudaforge::KernelBuilder::new()
                    .source_glob("kernels/*.cu")
                    .watch(headers)
                    .compute_cap(gpu.base().min(COMPUTE_CAP))
                    .arg("-std=c++17")
                    .arg("-O3")
                    .build_ptx()
            })
            .and_then(|ptx| ptx.write(PathBuf::from(out).join("kernels.rs")))
            .map_err(|e| {
                format!(
                    "candle-dropout: could not compile its CUDA kernels: {e}\n\
                     The `cuda` feature needs nvcc (CUDA 12 or later) on PATH or in CUDA_HOME, and on a \
                     machine without a GPU the variable CUDA_COMPUTE_CAP (80, 90, ..)."
                )
            })
    }
}
