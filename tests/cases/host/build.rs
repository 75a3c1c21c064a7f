//! Compiles a kernel file for the host, with AddressSanitizer and UBSan against the headers beside this file; and
//! says whether there is a compiler that can.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::host_source::host_source;

/// Replaces the folder `kernels/`, for the mutation test.
const KERNELS_VARIABLE: &str = "CANDLE_DROPOUT_KERNELS";

/// Where this is set, tests fail that would be skipped.
pub(super) const REQUIRE_VARIABLE: &str = "CANDLE_DROPOUT_REQUIRE_CXX";

/// How the line begins that says so; `scripts/mutation-test.sh` looks for it.
pub(super) const MISSING: &str = "no C++ compiler for the kernels";

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
    // Apple's <ucontext.h> is deprecated, and demands the first of these, which hides what the second shows.
    #[cfg(target_vendor = "apple")]
    "-D_XOPEN_SOURCE=700",
    #[cfg(target_vendor = "apple")]
    "-D_DARWIN_C_SOURCE",
    #[cfg(target_vendor = "apple")]
    "-Wno-deprecated-declarations",
];

/// What the headers beside this file ask of a compiler and a system: sanitizers, and memory with a guard page.
const PROBE: &str = "#include <sanitizer/common_interface_defs.h>\n\
                     #include <sys/mman.h>\n\
                     #include <unistd.h>\n\
                     int main() { return sysconf(_SC_PAGESIZE) > 0 ? 0 : 1; }\n";

/// Ends a test of kernels that finds no compiler, before it has begun.
macro_rules! skip_without_compiler {
    () => {
        if !$crate::host::has_compiler() {
            return;
        }
    };
}
pub(crate) use skip_without_compiler;

/// Whether kernels can be compiled. Where not, the first test that asks says what is missing, in one line that
/// no test runner holds back; and where they must be, this panics.
pub(crate) fn has_compiler() -> bool {
    static SAID: OnceLock<()> = OnceLock::new();
    let Err(missing) = compiler() else { return true };
    let required = std::env::var(REQUIRE_VARIABLE).unwrap_or_default();
    assert!(required.is_empty(), "{missing}; {REQUIRE_VARIABLE}={required} demands one");
    SAID.get_or_init(|| {
        // Only what is printed by a macro is captured. If it cannot be written, nobody is there to read.
        let _ = writeln!(std::io::stderr(), "skipped: {missing}");
    });
    false
}

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
    let mut preprocess = Command::new(compiler);
    preprocess
        .current_dir(root)
        .args(FLAGS)
        .args(["-E", "-I.", "-I", &format!("{here}/shadow")])
        .arg(&main);
    let preprocessed = succeed(preprocess)?;
    let host_source = host_source(&preprocessed).map_err(|e| format!("{kernel_file}: {e}"))?;

    let executable = folder.join(format!("{:016x}", hash(&(&host_source, compiler, FLAGS))));
    if !executable.exists() {
        // Compiled under a name of its own, then renamed: two test binaries may do this at once.
        let unique = format!("building-{}", std::process::id());
        let rewritten = write(&format!("{unique}.ii"), &host_source)?;
        let partial = folder.join(&unique);
        let mut compile = Command::new(compiler);
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

/// The first that works, asked for once.
fn compiler() -> Result<&'static str, &'static str> {
    static FOUND: OnceLock<Result<String, String>> = OnceLock::new();
    FOUND.get_or_init(find_compiler).as_deref().map_err(String::as_str)
}

fn find_compiler() -> Result<String, String> {
    let named = std::env::var("CXX").ok().filter(|name| !name.is_empty());
    // One that is named is meant: no other takes its place.
    let candidates = match &named {
        Some(name) => vec![name.as_str()],
        None => vec!["g++", "clang++", "c++"],
    };
    let failures: Vec<_> = candidates.iter().map_while(|name| probe(name).err()).collect();
    match candidates.get(failures.len()) {
        Some(name) => Ok(name.to_string()),
        None => Err(format!(
            "{MISSING}, whose tests run them on the CPU: {}; install g++ or clang++ with its sanitizers \
             (Debian: apt install g++; macOS: xcode-select --install; Windows: within WSL), or name one in CXX",
            failures.join(", ")
        )),
    }
}

/// That a compiler is there, and that what it makes with our flags runs. What once did is not tried again.
fn probe(compiler: &str) -> Result<(), String> {
    let is_there = Command::new(compiler).arg("--version").output();
    if !is_there.is_ok_and(|output| output.status.success()) {
        return Err(format!("{compiler} is not there"));
    }
    let cannot = |e: String| {
        // Behind the command, what the compiler said; without such a line, all of it.
        let mut lines = e.lines().skip(1);
        let reason = lines.find(|line| line.contains("error")).unwrap_or(&e).trim().to_owned();
        format!("{compiler} cannot build with sanitizers ({reason})")
    };
    let io = |e: std::io::Error| cannot(e.to_string());
    let folder = beside_the_tests().map_err(cannot)?;
    let proof = folder.join(format!("probe-{:016x}", hash(&(compiler, FLAGS, PROBE))));
    if proof.exists() {
        return Ok(());
    }
    fs::create_dir_all(&folder).map_err(io)?;
    let unique = proof.with_extension(std::process::id().to_string());
    let source = unique.with_extension(format!("{}.cpp", std::process::id()));
    fs::write(&source, PROBE).map_err(io)?;
    let mut compile = Command::new(compiler);
    compile.args(FLAGS).arg(&source).arg("-o").arg(&unique);
    let compiled = succeed(compile).and_then(|_| succeed(Command::new(&unique)));
    fs::remove_file(&source).map_err(io)?;
    compiled.map_err(cannot)?;
    fs::rename(&unique, &proof).map_err(io)
}

/// Runs a compiler, or what it made, and returns the standard output.
fn succeed(mut command: Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("could not compile: {command:?}: {}\n{errors}", output.status));
    }
    eprint!("{errors}");
    String::from_utf8(output.stdout).map_err(|e| format!("{command:?}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tests of kernels in a process of their own, under this environment: whether they pass, and all they
    /// print.
    fn run(filters: &[&str], variables: &[(&str, &str)]) -> (bool, String) {
        let mut tests = Command::new(std::env::current_exe().unwrap());
        tests.args(filters).env_remove("CXX").env_remove(REQUIRE_VARIABLE);
        let output = tests.envs(variables.iter().copied()).output().unwrap();
        let text = [output.stderr, output.stdout].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    }

    const NO_PATH: (&str, &str) = ("PATH", "/no/such/folder");
    const NO_CXX: (&str, &str) = ("CXX", "/no/such/compiler");

    #[test]
    fn without_a_compiler_the_tests_of_kernels_are_skipped_and_say_so_once() {
        for missing in [NO_PATH, NO_CXX] {
            let (passed, text) = run(&["kernel::", "selftest::"], &[missing]);
            assert!(passed && text.contains("; 0 failed"), "{text}");
            let skipped = format!("skipped: {MISSING}, ");
            assert_eq!(text.matches(&skipped).count(), 1, "{text}");
            assert!(text.contains("; install g++ or clang++"), "{text}");
        }
    }

    #[test]
    fn where_a_compiler_is_required_no_test_is_skipped() {
        for missing in [NO_PATH, NO_CXX] {
            let (passed, text) = run(&["selftest::"], &[missing, (REQUIRE_VARIABLE, "1")]);
            assert!(!passed && text.contains(". 0 passed; "), "{text}");
            assert!(text.contains(MISSING) && !text.contains("skipped: "), "{text}");
        }
    }
}
