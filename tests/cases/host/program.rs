//! A kernel file as a program on the host, and its runs.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::build::{build, hash};
use super::case::{Case, Outputs};

/// A `.cu` file as a program on the host; built by the first run that needs it.
pub struct Program {
    source: &'static str,
    executable: OnceLock<Result<PathBuf, String>>,
}

impl Program {
    /// The path is relative to the repository.
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
        let buffers = case.written().map(|bytes| {
            let (buffer, after) = rest.split_at(bytes);
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
