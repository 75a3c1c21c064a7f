//! Writes what the examples and the test compile twice: a model's file as it is and with one path changed.
//!
//! - `OUT_DIR/<example>.rs`: the module `before`, an example's own `model.rs` with `candle_nn` in place of
//!   `candle_dropout::nn`; and `CHANGED_LINES`, in how many lines the two differ.
//! - `OUT_DIR/candle_transformers.rs` and, of fewer files, `OUT_DIR/llama2c.rs`, with the feature
//!   `candle-transformers`: the modules `before` and `after`, files of candle-transformers as cargo has fetched them,
//!   and with `candle_dropout::nn` in place of `candle_nn`. `crate::` becomes the module in which a file stands, in
//!   both. `CHANGED_LINES` of the example is what it is above; that of the test has each file's name, the lines in it
//!   that have the path, and those in the files that it needs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const CANDLE: &str = "candle_nn";
const OURS: &str = "candle_dropout::nn";

/// Examples whose model is a file beside their `main.rs`.
const EXAMPLES: [&str; 3] = ["mnist", "nanogpt", "vit_drop_path"];

/// The files of candle-transformers that the test runs, and those that they need.
const FILES: [&str; 17] = [
    "models/bert",
    "models/bigcode",
    "models/convnext",
    "models/dinov2",
    "models/distilbert",
    "models/gemma",
    "models/llama",
    "models/llama2_c",
    "models/llama2_c_weights",
    "models/mistral",
    "models/phi",
    "models/qwen2",
    "models/t5",
    "models/vit",
    "models/with_tracing",
    "quantized_var_builder",
    "utils",
];

/// Those of the example `llama2c`.
const LLAMA2C: [&str; 3] = ["models/llama2_c", "models/llama2_c_weights", "utils"];

fn main() -> Result<()> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    println!("cargo::rerun-if-changed=build.rs");
    for example in EXAMPLES {
        let model = here.join(example).join("model.rs");
        println!("cargo::rerun-if-changed={}", model.display());
        let text = read(&model)?;
        if !text.contains(OURS) {
            return Err(format!("{} names no {OURS}", model.display()).into());
        }
        let before = out.join(format!("{example}_before.rs"));
        let other = text.replace(OURS, CANDLE);
        let constant =
            format!("const CHANGED_LINES: usize = {};\n", differing_lines(&text, &other));
        fs::write(&before, other)?;
        let module = declaration("before", &before);
        fs::write(out.join(format!("{example}.rs")), module + &constant)?;
    }
    if env::var_os("CARGO_FEATURE_CANDLE_TRANSFORMERS").is_some() {
        let sources = candle_transformers(&here)?.join("src");
        println!("cargo::rerun-if-changed={}", sources.display());
        let (before, after) = (out.join("before"), out.join("after"));
        copy(&sources, &before, "crate::before::", CANDLE)?;
        copy(&sources, &after, "crate::after::", OURS)?;
        let changed = changed_lines(&sources)?;
        let constants = [
            format!(
                "const CHANGED_LINES: [(&str, usize, usize); {}] = {changed:?};\n",
                changed.len()
            ),
            format!("const CHANGED_LINES: usize = {};\n", changed_by(&changed, "llama2_c")?),
        ];
        let names = [("candle_transformers", &FILES[..]), ("llama2c", &LLAMA2C)];
        for ((name, files), constant) in names.into_iter().zip(constants) {
            let modules = modules("before", &before, files) + &modules("after", &after, files);
            fs::write(out.join(name).with_extension("rs"), modules + &constant)?;
        }
    }
    Ok(())
}

/// Writes the files with `nn` as their one changed path, for the module `own` of the crate that compiles them.
fn copy(sources: &Path, out: &Path, own: &str, nn: &str) -> Result<()> {
    for file in FILES {
        let text = read(&sources.join(file).with_extension("rs"))?;
        let copy = out.join(file).with_extension("rs");
        fs::create_dir_all(copy.parent().ok_or("a file has no folder")?)?;
        fs::write(&copy, text.replace(CANDLE, nn).replace("crate::", own))?;
    }
    Ok(())
}

/// Of each file of candle-transformers its name, in how many lines the path changes, and in how many lines of the
/// files that it takes something from, by a path that `crate::models` or `super` begins.
fn changed_lines(sources: &Path) -> Result<Vec<(&'static str, usize, usize)>> {
    let mut files = Vec::new();
    for file in FILES {
        let text = read(&sources.join(file).with_extension("rs"))?;
        let name = file.trim_start_matches("models/");
        files.push((name, differing_lines(&text, &text.replace(CANDLE, OURS)), text));
    }
    let changed = files.iter().map(|&(name, own, ref text)| {
        let needed = files.iter().filter(|(other, ..)| {
            ["models", "super"].iter().any(|parent| text.contains(&format!("{parent}::{other}::")))
        });
        (name, own, needed.map(|(_, lines, _)| lines).sum())
    });
    Ok(changed.collect())
}

/// All of them for one file.
fn changed_by(changed: &[(&str, usize, usize)], file: &str) -> Result<usize> {
    let found = changed.iter().find(|(name, ..)| *name == file);
    let (_, own, needed) = found.ok_or_else(|| format!("no file {file}"))?;
    Ok(own + needed)
}

fn differing_lines(a: &str, b: &str) -> usize {
    a.lines().zip(b.lines()).filter(|(a, b)| a != b).count()
}

/// Declares the module `name` that has these files.
fn modules(name: &str, folder: &Path, files: &[&str]) -> String {
    let (mut top, mut models) = (String::new(), String::new());
    for file in files {
        let copy = folder.join(file).with_extension("rs");
        match file.strip_prefix("models/") {
            Some(model) => models += &declaration(model, &copy),
            None => top += &declaration(file, &copy),
        }
    }
    // What these files leave unused or would be written otherwise is not for this crate to say.
    let allow = "#[allow(warnings, clippy::all)]";
    format!("{allow}\nmod {name} {{\n{top}pub mod models {{\n{models}}}\n}}\n")
}

fn declaration(name: &str, path: &Path) -> String {
    format!("#[path = {path:?}]\npub mod {name};\n")
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()).into())
}

/// Where cargo has put the sources of candle-transformers: it fetches them like those of any dependency.
fn candle_transformers(here: &Path) -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--locked", "--format-version", "1"])
        .current_dir(here)
        .output()?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(format!("`cargo metadata --locked` failed: {}", why.trim()).into());
    }
    let metadata = String::from_utf8(output.stdout)?;
    // A package begins so, and a dependency on it does not: read by hand, that no build waits for a JSON parser.
    let manifest = metadata
        .split_once(r#""name":"candle-transformers","version":"#)
        .and_then(|(_, package)| package.split_once(r#""manifest_path":""#))
        .and_then(|(_, path)| path.split('"').next())
        .ok_or("cargo metadata has no candle-transformers")?;
    let manifest = PathBuf::from(manifest.replace(r"\\", r"\"));
    Ok(manifest.parent().ok_or("a manifest has no folder")?.to_path_buf())
}
