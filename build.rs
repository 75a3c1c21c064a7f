//! Compiles `kernels/*.cu` to PTX, under the `cuda` feature only. No GPU is needed.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Outputs that passes fail to write show as NaN in the tests: see `src/cpu/filled.rs`.
    println!("cargo:rustc-check-cfg=cfg(poison_outputs)");
    println!("cargo:rerun-if-env-changed=CANDLE_DROPOUT_POISON_OUTPUTS");
    if std::env::var_os("CANDLE_DROPOUT_POISON_OUTPUTS").is_some() {
        println!("cargo:rustc-cfg=poison_outputs");
    }
    #[cfg(feature = "cuda")]
    if let Err(error) = kernels::build() {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

#[cfg(feature = "cuda")]
mod kernels {
    use std::io::Write;
    use std::path::PathBuf;

    /// The compute capability of the PTX, unless the GPU has an earlier one. The kernels use nothing of
    /// later GPUs, for which their driver compiles it; so one text, which `scripts/ptxas-check.sh` has
    /// assembled for all of them, runs everywhere.
    const COMPUTE_CAP: usize = 80;

    /// Writes `OUT_DIR/kernels.rs`: a constant with the PTX of each `kernels/<file>.cu`, and one of them all.
    pub fn build() -> Result<(), String> {
        println!("cargo:rerun-if-changed=kernels");
        println!("cargo:rerun-if-env-changed=CUDA_COMPUTE_CAP");
        let out = std::env::var("OUT_DIR").map_err(|e| format!("OUT_DIR: {e}"))?;
        let files = std::fs::read_dir("kernels").map_err(|e| format!("kernels: {e}"))?;
        let files: Vec<_> = files.filter_map(|entry| Some(entry.ok()?.path())).collect();
        let of_kind = |kind: &'static str| {
            files.iter().filter(move |path| path.extension().is_some_and(|found| found == kind))
        };
        let names: Vec<_> = of_kind("cu")
            .filter_map(|path| Some(path.file_stem()?.to_str()?.to_uppercase()))
            .collect();
        let written = PathBuf::from(out).join("kernels.rs");
        cudaforge::detect_compute_cap()
            .and_then(|gpu| {
                cudaforge::KernelBuilder::new()
                    .source_glob("kernels/*.cu")
                    .watch(of_kind("cuh"))
                    .compute_cap(gpu.base().min(COMPUTE_CAP))
                    .arg("-std=c++17")
                    .arg("-O3")
                    .build_ptx()
            })
            .and_then(|ptx| ptx.write(&written))
            .map_err(|e| {
                format!(
                    "candle-dropout: could not compile its CUDA kernels: {e}\n\
                     The `cuda` feature needs nvcc (CUDA 12 or later) on PATH or in CUDA_HOME, and on a \
                     machine without a GPU the variable CUDA_COMPUTE_CAP (80, 90, ..)."
                )
            })?;
        let all = format!("\n#[cfg(test)]\npub const ALL: &[&str] = &[{}];\n", names.join(", "));
        std::fs::OpenOptions::new()
            .append(true)
            .open(&written)
            .and_then(|mut file| file.write_all(all.as_bytes()))
            .map_err(|e| format!("{}: {e}", written.display()))
    }
}
