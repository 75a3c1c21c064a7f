//! Compiles a kernel file for the host and runs cases on it.
//!
//! A [`Program`] is one `.cu` file, built with AddressSanitizer and UBSan against the headers beside
//! this file. A [`Case`] is one launch of one of its kernels: grid, block, arguments. Each case runs
//! in several orders of its threads, and a result that depends on the order is a failure.

use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

/// Replaces the folder `kernels/`, for the mutation test.
const KERNELS_VARIABLE: &str = "CANDLE_DROPOUT_KERNELS";

/// Every byte of an output, of shared memory, before a kernel writes it: all ones is a NaN.
pub const POISON: u8 = 0xff;

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

/// A `.cu` file as a program on the host; built by the first run that needs it.
pub struct Program {
    source: &'static str,
    executable: OnceLock<Result<PathBuf, String>>,
}

impl Program {
    /// The path is relative to the crate.
    pub const fn new(source: &'static str) -> Self {
        Self { source, executable: OnceLock::new() }
    }

    /// Runs all cases in one process, and returns for each the buffers that it wrote.
    pub fn run(&self, cases: &[Case]) -> Result<Vec<Outputs>, Failure> {
        let built = self.executable.get_or_init(|| build(self.source));
        let executable =
            built.as_ref().map_err(|report| Failure { case: None, report: report.clone() })?;
        run(executable, cases)
    }

    /// Runs one case.
    pub fn run_one(&self, case: Case) -> Result<Outputs, Failure> {
        Ok(self.run(&[case])?.remove(0))
    }
}

/// The order in which the threads of a block, and the blocks of a grid, take their turns.
#[derive(Clone, Copy)]
pub enum Order {
    Forward,
    Reverse,
    /// Another random order each time all threads wait.
    Shuffled {
        seed: u32,
    },
}

/// What cases run in unless they say otherwise.
pub const EVERY_ORDER: &[Order] = &[Order::Forward, Order::Reverse, Order::Shuffled { seed: 1 }];

/// One launch of one kernel. Arguments are given in the order of the kernel's parameters.
pub struct Case {
    kernel: String,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    orders: Vec<Order>,
    arguments: Vec<Argument>,
}

struct Argument {
    kind: Kind,
    offset_bytes: usize,
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Value,
    Input,
    Output,
    InOut,
    Null,
}

impl Case {
    /// `shared_bytes` is the dynamic shared memory of a block.
    pub fn new(kernel: &str, grid: [u32; 3], block: [u32; 3], shared_bytes: u32) -> Self {
        let orders = EVERY_ORDER.to_vec();
        Self { kernel: kernel.into(), grid, block, shared_bytes, orders, arguments: Vec::new() }
    }

    /// Replaces the orders. A single one suits kernels whose result may depend on it, such as sums
    /// of floats by `atomicAdd`.
    pub fn orders(mut self, orders: &[Order]) -> Self {
        self.orders = orders.to_vec();
        self
    }

    fn argument(mut self, kind: Kind, bytes: Vec<u8>) -> Self {
        self.arguments.push(Argument { kind, offset_bytes: 0, bytes });
        self
    }

    /// A number passed by value.
    pub fn value<T: Plain>(self, value: T) -> Self {
        self.argument(Kind::Value, to_bytes(&[value]))
    }

    /// A struct passed by value, as its bytes.
    pub fn value_bytes(self, bytes: &[u8]) -> Self {
        self.argument(Kind::Value, bytes.to_vec())
    }

    /// A buffer that the kernel only reads.
    pub fn input<T: Plain>(self, elements: &[T]) -> Self {
        self.argument(Kind::Input, to_bytes(elements))
    }

    /// A buffer of `len` elements that the kernel writes, poisoned before.
    pub fn output<T: Plain>(self, len: usize) -> Self {
        self.argument(Kind::Output, vec![POISON; len * size_of::<T>()])
    }

    /// A buffer that the kernel reads and writes.
    pub fn in_out<T: Plain>(self, elements: &[T]) -> Self {
        self.argument(Kind::InOut, to_bytes(elements))
    }

    /// A null pointer: an optional buffer that is absent.
    pub fn null(self) -> Self {
        self.argument(Kind::Null, Vec::new())
    }

    /// Moves the buffer just added by some bytes from its 16-byte alignment, as a view does.
    pub fn misaligned_by(mut self, offset_bytes: usize) -> Self {
        if let Some(last) = self.arguments.last_mut() {
            last.offset_bytes = offset_bytes;
        }
        self
    }

    /// The format that `runner.h` reads: little-endian, u32 but for the u64 lengths and offsets.
    fn write(&self, file: &mut Vec<u8>) {
        let mut word = |value: u32| file.extend(value.to_le_bytes());
        let kernel = self.kernel.as_bytes();
        word(kernel.len() as u32);
        word(0);
        file.extend(kernel);
        let mut word = |value: u32| file.extend(value.to_le_bytes());
        self.grid.into_iter().chain(self.block).for_each(&mut word);
        word(self.shared_bytes);
        word(self.orders.len() as u32);
        for order in &self.orders {
            let (kind, seed) = match *order {
                Order::Forward => (0, 0),
                Order::Reverse => (1, 0),
                Order::Shuffled { seed } => (2, seed),
            };
            word(kind);
            word(seed);
        }
        word(self.arguments.len() as u32);
        for Argument { kind, offset_bytes, bytes } in &self.arguments {
            file.extend((*kind as u32).to_le_bytes());
            file.extend((*offset_bytes as u64).to_le_bytes());
            file.extend((bytes.len() as u64).to_le_bytes());
            file.extend(bytes);
        }
    }

    fn written(&self) -> impl Iterator<Item = &Argument> {
        self.arguments.iter().filter(|argument| matches!(argument.kind, Kind::Output | Kind::InOut))
    }
}

/// The buffers a case wrote, in the order of its arguments.
pub struct Outputs(Vec<Vec<u8>>);

impl Outputs {
    pub fn bytes(&self, index: usize) -> &[u8] {
        &self.0[index]
    }

    pub fn get<T: Plain>(&self, index: usize) -> Vec<T> {
        from_bytes(&self.0[index])
    }
}

/// What went wrong, and in which case; none if the program could not be built.
pub struct Failure {
    pub case: Option<usize>,
    pub report: String,
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(case) = self.case {
            writeln!(f, "case {case}:")?;
        }
        f.write_str(&self.report)
    }
}

/// The numbers that buffers hold.
pub trait Plain: Copy {
    fn append(self, bytes: &mut Vec<u8>);
    fn parse(bytes: &[u8]) -> Self;
}

/// `plain!(f32)` is `impl Plain for f32 { .. to_le_bytes .. from_le_bytes .. }`.
macro_rules! plain {
    ($($t:ty)*) => {$(
        impl Plain for $t {
            fn append(self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }
            fn parse(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("one element"))
            }
        }
    )*};
}
plain!(u8 u16 u32 u64 i32 i64 f16 bf16 f32 f64);

pub fn to_bytes<T: Plain>(elements: &[T]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of_val(elements));
    elements.iter().for_each(|element| element.append(&mut bytes));
    bytes
}

pub fn from_bytes<T: Plain>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(T::parse).collect()
}

/// Calls the program on a case file and reads what it finished of it.
fn run(executable: &Path, cases: &[Case]) -> Result<Vec<Outputs>, Failure> {
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    let run = format!("{}-{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed));
    let case_file = executable.with_extension(format!("cases-{run}"));
    let result_file = executable.with_extension(format!("results-{run}"));
    let io_error = |e: std::io::Error| Failure {
        case: None,
        report: format!("{}: {e}", executable.display()),
    };

    let mut bytes = Vec::new();
    cases.iter().for_each(|case| case.write(&mut bytes));
    fs::write(&case_file, &bytes).map_err(io_error)?;
    let output = Command::new(executable)
        .args([&case_file, &result_file])
        .env("UBSAN_OPTIONS", "print_stacktrace=1")
        .output()
        .map_err(io_error)?;
    let results = fs::read(&result_file).map_err(io_error)?;
    fs::remove_file(&result_file).map_err(io_error)?;

    let mut rest = results.as_slice();
    let mut finished = Vec::new();
    while let Some(case) = cases.get(finished.len())
        && !rest.is_empty()
    {
        let buffers = case.written().map(|argument| {
            let (buffer, after) = rest.split_at(argument.bytes.len());
            rest = after;
            buffer.to_vec()
        });
        finished.push(Outputs(buffers.collect()));
        rest = &rest[1..]; // the full stop behind a finished case
    }

    if output.status.success() && finished.len() == cases.len() {
        fs::remove_file(&case_file).map_err(io_error)?;
        return Ok(finished);
    }
    // The cases are kept, to run again under a debugger; the same failure overwrites its own.
    let kept = executable.with_extension(format!("{:016x}.cases", hash(&bytes)));
    fs::rename(&case_file, &kept).map_err(io_error)?;
    let report = format!(
        "{}kernel {}, {}\nagain: {} {} /dev/null",
        String::from_utf8_lossy(&output.stderr),
        cases.get(finished.len()).map_or("none", |case| &case.kernel),
        output.status,
        executable.display(),
        kept.display(),
    );
    Err(Failure { case: Some(finished.len()), report })
}

/// Preprocesses, rewrites and compiles one kernel file, unless the very same program exists.
fn build(source: &str) -> Result<PathBuf, String> {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let here = "tests/kernels-on-cpu";
    // A replaced folder keeps its builds to itself, and takes them along when it is deleted.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (kernel_file, builds) =
        match (source.strip_prefix("kernels/"), std::env::var(KERNELS_VARIABLE)) {
            (Some(name), Ok(replaced)) => {
                (format!("{replaced}/{name}"), Path::new(&replaced).join("build"))
            }
            _ => (source.to_owned(), target.join("kernels-on-cpu")),
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

/// Turns preprocessed CUDA into C++. Only two words need more than a macro:
///
/// - `__global__` goes, and the kernel's name is noted, to be registered at the end of the file;
/// - `__shared__ T name[n];` becomes a static variable, followed by a registration that has it
///   poisoned for every block; `extern __shared__ T name[];` a pointer to the memory of the launch.
///
/// So kernels stay ordinary CUDA, and no list of them has to be kept.
fn host_source(cuda: &str) -> Result<String, String> {
    let mut host = String::with_capacity(cuda.len());
    let mut kernels = Vec::new();
    let mut rest = cuda;
    while let Some(at) = rest.find("__global__").into_iter().chain(rest.find("__shared__")).min() {
        let (before, found) = rest.split_at(at);
        let (word, after) = found.split_at("__global__".len());
        host.push_str(before);
        if word == "__global__" {
            let (signature, _) = after.split_once('(').ok_or("a kernel without parameters")?;
            kernels.push(last_identifier(signature)?);
            rest = after;
            continue;
        }
        let (declaration, after) =
            after.split_once(';').ok_or("a __shared__ declaration without an end")?;
        let (declarator, _) = declaration.split_once('[').unwrap_or((declaration, ""));
        let name = last_identifier(declarator)?;
        if let Some(kept) = host.trim_end().strip_suffix("extern") {
            host.truncate(kept.len());
            // Attributes of alignment go: the buffer is aligned, and its elements need not be.
            let element = declarator.rsplit(')').next().unwrap_or(declarator).replacen(name, "", 1);
            host.push_str(&format!(
                "{element} *const {name} = machine::dynamic_shared<{element}>();"
            ));
        } else if declaration.contains(',') {
            return Err(format!("`__shared__{declaration}`: write one declaration a variable"));
        } else {
            host.push_str(&format!(
                "static {declaration}; static machine::SharedVariable shared_{name}({name});"
            ));
        }
        rest = after;
    }
    host.push_str(rest);
    for kernel in kernels {
        host.push_str(&format!(
            "static const runner::Registration registration_of_{kernel}(\"{kernel}\", &{kernel});\n"
        ));
    }
    Ok(host)
}

fn last_identifier(text: &str) -> Result<&str, String> {
    let mut identifiers = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    identifiers.rfind(|word| !word.is_empty()).ok_or_else(|| format!("no name in `{text}`"))
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
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
