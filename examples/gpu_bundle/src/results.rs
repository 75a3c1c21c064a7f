//! What a run measured: `<device>-<date>.json` and `.md`, to which every subcommand adds its section.
//! `benches/peers/torch_peers.py` reads and writes the same files.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use candle_core::Device;
use cases::device;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::timing::Timing;

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub library: String,
    pub variant: String,
    pub op: String,
    /// `forward`, `backward`, `forward_backward` or `training_step`.
    pub pass: String,
    pub dtype: String,
    pub drop_p: f32,
    pub shape: Vec<usize>,
    pub ms: f64,
    pub ms_low: f64,
    pub ms_high: f64,
    pub samples: usize,
    pub launches: usize,
    /// The same, timed again.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub again_ms: Option<f64>,
    /// Bytes that have to move, as the description of the op counts them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub bytes: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub gb_s: Option<f64>,
    /// `gb_s` as a part of a plain copy's of the same size.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub of_copy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub flop: Option<f64>,
    /// The most memory in use at a time, beyond the arguments.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub peak_bytes: Option<f64>,
}

impl Record {
    pub fn new(what: [&str; 5], drop_p: f32, shape: &[usize], timing: Timing) -> Self {
        let [library, variant, op, pass, dtype] = what.map(str::to_string);
        let Timing { ms, ms_low, ms_high, samples, launches } = timing;
        let shape = shape.to_vec();
        Self {
            library,
            variant,
            op,
            pass,
            dtype,
            drop_p,
            shape,
            ms,
            ms_low,
            ms_high,
            samples,
            launches,
            again_ms: None,
            bytes: None,
            gb_s: None,
            of_copy: None,
            flop: None,
            peak_bytes: None,
        }
    }

    pub fn with_bytes(self, bytes: f64, copy_gb_s: Option<f64>) -> Self {
        let gb_s = bytes / self.ms / 1e6;
        let of_copy = copy_gb_s.map(|copy| gb_s / copy);
        Self { bytes: Some(bytes), gb_s: Some(gb_s), of_copy, ..self }
    }
}

/// Part of a run: one subcommand.
#[derive(Debug, Serialize, Deserialize)]
pub struct Section {
    pub command: String,
    pub commit: String,
    pub seconds: f64,
    /// Running threads over the last 1, 5 and 15 minutes: above the number of cores, times on the CPU
    /// say little.
    #[serde(default)]
    pub load_average: String,
    /// For people.
    pub markdown: String,
    pub data: Value,
}

/// A whole run on one device.
#[derive(Debug, Serialize, Deserialize)]
pub struct Results {
    pub schema: u32,
    pub device: String,
    pub cpu: String,
    pub threads: usize,
    pub date: String,
    pub sections: BTreeMap<String, Section>,
}

const SCHEMA: u32 = 1;

/// Where the results of a device lie, without the extension.
pub fn stem(out: &Path, device: &Device) -> Result<PathBuf> {
    let name = device::name(device)?.unwrap_or_else(cpu_model).to_lowercase();
    let words: Vec<_> =
        name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
    Ok(out.join(format!("{}-{}", words.join("-"), today())))
}

/// Adds or replaces a section in the results of a device. Returns the path of their JSON file.
pub fn write_section(
    out: &Path,
    device: &Device,
    name: &str,
    seconds: f64,
    markdown: &str,
    data: Value,
) -> Result<PathBuf> {
    std::fs::create_dir_all(out)
        .with_context(|| format!("--out: cannot create {}", out.display()))?;
    let stem = stem(out, device)?;
    let (json, md) = (with_extension(&stem, "json"), with_extension(&stem, "md"));
    let mut results = match std::fs::read_to_string(&json) {
        Ok(text) => serde_json::from_str(&text)
            .with_context(|| format!("cannot read {}", json.display()))?,
        Err(_) => Results {
            schema: SCHEMA,
            device: device::name(device)?.unwrap_or_else(|| "cpu".into()),
            cpu: cpu_model(),
            threads: std::thread::available_parallelism()?.get(),
            date: today(),
            sections: BTreeMap::new(),
        },
    };
    let section = Section {
        command: command(),
        commit: commit(),
        seconds,
        load_average: load_average(),
        markdown: markdown.into(),
        data,
    };
    results.sections.insert(name.into(), section);
    replace(&json, &(serde_json::to_string_pretty(&results)? + "\n"))?;
    replace(&md, &results.markdown()?)?;
    Ok(json)
}

/// Tells people what was written, and where.
pub fn print_section(json: &Path, markdown: &str) {
    println!("{markdown}\nwritten to {} and .md", json.display());
}

/// Writes a file as a whole: who is stopped on the way leaves the one before.
fn replace(path: &Path, text: &str) -> Result<()> {
    let new = with_extension(path, "new");
    std::fs::write(&new, text).with_context(|| format!("cannot write {}", new.display()))?;
    std::fs::rename(&new, path).with_context(|| format!("cannot write {}", path.display()))
}

/// `Path::with_extension` would replace what follows a dot in the name.
pub fn with_extension(stem: &Path, extension: &str) -> PathBuf {
    PathBuf::from(format!("{}.{extension}", stem.display()))
}

impl Results {
    fn markdown(&self) -> Result<String> {
        let mut md = format!("# {} on {}\n\n", self.device, self.date);
        writeln!(md, "CPU: {}, {} threads.", self.cpu, self.threads)?;
        for (name, section) in &self.sections {
            let Section { command, commit, seconds, load_average, markdown, .. } = section;
            writeln!(
                md,
                "\n## {name}\n\n`{command}`, commit {commit}, {seconds:.0} s, load average \
                 {load_average}.\n\n{markdown}"
            )?;
        }
        Ok(md.trim_end().to_string() + "\n")
    }
}

/// The program without its folder, and its arguments.
fn command() -> String {
    let mut args = std::env::args();
    let program = args.next().unwrap_or_default();
    let program =
        Path::new(&program).file_name().map_or("gpu_bundle".into(), |s| s.to_string_lossy());
    std::iter::once(program.into_owned()).chain(args).collect::<Vec<_>>().join(" ")
}

/// As the bundle was built from, or as the checkout is.
fn commit() -> String {
    let checkout = || {
        let git = Command::new("git").args(["describe", "--always", "--dirty"]).output().ok()?;
        git.status.success().then(|| String::from_utf8_lossy(&git.stdout).trim().to_string())
    };
    let built_from = option_env!("CANDLE_DROPOUT_COMMIT").map(str::to_string);
    built_from.or_else(checkout).unwrap_or_else(|| "unknown".into())
}

fn cpu_model() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or("cpu".into(), |(_, model)| model.trim().to_string())
}

fn load_average() -> String {
    let all = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    all.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// Year-month-day, UTC.
fn today() -> String {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    date_of_day((since_1970.as_secs() / 86_400) as i64)
}

/// The date of a day since 1970, from eras of 400 years that begin in March.
fn date_of_day(day: i64) -> String {
    let day = day + 719_468;
    let (era, of_era) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    format!("{}-{month:02}-{day:02}", era * 400 + year + i64::from(month <= 2))
}
