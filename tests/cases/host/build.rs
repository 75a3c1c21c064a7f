//! Compiles a kernel file for the host, with AddressSanitizer and UBSan against the headers beside this file.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::host_source::host_source;

/// Replaces the folder `kernels/`, for the mutation test.
const KERNELS_VARIABLE: &str = "CANDLE_DROPOUT_KERNELS";

const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O1",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    // Products and sums round one by one, as in kernels compiled with -fmad=false.
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
];

/// Preprocesses, rewrites and compiles one kernel file, unless the very same program exists.
pub(super) fn build(source: &str) -> Result<PathBuf, String> {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let here = "tests/cases/host";
    // A replaced folder keeps its builds to itself, and takes them along when it is deleted.
    let (kernel_file, builds) =
        match (source.strip_prefix("kernels/"), std::env::var(KERNELS_VARIABLE)) {
            (Some(name), Ok(replaced)) => {
                (format!("{replaced}/{name}"), Path::new(&replaced).join("build"))
            }
            _ => (source.to_owned(), beside_the_tests()?),
        };
    // One folder for each kernel file, so that tests of different files can run side by side.
    let folder = builds.join(format!("{:016x}", hash(&kernel_file)));
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok::<_, String>(path)
    };

    let compiler = compiler()?;
    let main =
        write("main.cpp", &format!("#include \"{here}/runner.h\"\n#include \"{kernel_file}\"\n"))?;
    let mut preprocess = Command::new(&compiler);
    preprocess
        .current_dir(root)
        .args(FLAGS)
        .args(["-E", "-I.", "-I", &format!("{here}/shadow")])
        .arg(&main);
    let preprocessed = succeed(preprocess)?;
    let host_source = host_source(&preprocessed).map_err(|e| format!("{kernel_file}: {e}"))?;

    let executable = folder.join(format!("{:016x}", hash(&(&host_source, &compiler, FLAGS))));
    if !executable.exists() {
        // Compiled under a name of its own, then renamed: two test binaries may do this at once.
        let unique = format!("building-{}", std::process::id());
        let rewritten = write(&format!("{unique}.ii"), &host_source)?;
        let partial = folder.join(&unique);
        let mut compile = Command::new(&compiler);
        compile.current_dir(root).args(FLAGS).arg(&rewritten).arg("-o").arg(&partial);
        succeed(compile)?;
        fs::rename(&partial, &executable).map_err(|e| format!("{}: {e}", executable.display()))?;
        fs::remove_file(&rewritten).map_err(|e| format!("{}: {e}", rewritten.display()))?;
    }
    Ok(executable)
}

pub(super) fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// `target/<profile>/kernels-on-host`; the tests are in `target/<profile>/deps`.
fn beside_the_tests() -> Result<PathBuf, String> {
    let executable = std::env::current_exe().map_err(|e| format!("the test executable: {e}"))?;
    let profile = executable.ancestors().nth(2).unwrap_or(&executable);
    Ok(profile.join("kernels-on-host"))
}

fn compiler() -> Result<String, String> {
    let works = |name: &String| {
        Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success())
    };
    let candidates =
        std::env::var("CXX").into_iter().chain(["g++", "clang++", "c++"].map(String::from));
    candidates.filter(|name| !name.is_empty()).find(works).ok_or_else(|| {
        "no C++ compiler: the kernels are tested by running them on the host; install g++ or clang++ \
         (Debian: apt install g++), or name one in CXX"
            .into()
    })
}

/// Runs a compiler and returns its standard output.
fn succeed(mut command: Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("could not compile: {command:?}: {}\n{errors}", output.status));
    }
    eprint!("{errors}");
    String::from_utf8(output.stdout).map_err(|e| format!("{command:?}: {e}"))
}
