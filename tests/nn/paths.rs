//! Every public path of candle-nn: complete, there, and what `nn` makes of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_dropout::nn;

use crate::listed::{VERSION, listed};

/// The sources of the candle-nn that is compiled here, as cargo finds them.
fn sources() -> PathBuf {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let run = |args: &[&str]| {
        let output =
            Command::new(&cargo).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output();
        let output = output.unwrap_or_else(|error| {
            panic!("cannot run {cargo} to find candle-nn's sources: {error}")
        });
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{cargo} {args:?}, for candle-nn's sources: {stderr}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    // Without the filter, cargo asks for the sources of other platforms, which no build here ever fetched.
    let version = run(&["--version", "--verbose"]);
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).expect("a host");
    let metadata = run(&[
        "metadata",
        "--format-version",
        "1",
        "--offline",
        "--locked",
        "--filter-platform",
        host,
    ]);
    let metadata: serde_json::Value = serde_json::from_str(&metadata).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let candle_nn: Vec<_> =
        packages.iter().filter(|package| package["name"] == "candle-nn").collect();
    let [candle_nn] = candle_nn[..] else {
        panic!("expected one candle-nn in the workspace, got {}", candle_nn.len())
    };
    assert_eq!(
        candle_nn["version"], VERSION,
        "listed.rs is for candle-nn {VERSION}: compare it with the new one, then change VERSION"
    );
    let manifest = Path::new(candle_nn["manifest_path"].as_str().expect("a path"));
    let sources = manifest.with_file_name("src");
    assert!(sources.join("lib.rs").is_file(), "no candle-nn sources at {}", sources.display());
    sources
}

/// What a module has, by name; a module and a function may share one.
type Items = BTreeSet<(String, &'static str)>;

/// Modules by their paths ("" for the root), and what `pub use` brings into each.
#[derive(Default)]
struct Found {
    items: BTreeMap<String, Items>,
    uses: Vec<(String, String)>,
}

impl Found {
    /// Reads a file of a module: what is public stands at the beginning of a line.
    fn file(&mut self, sources: &Path, module: &str) {
        let path = sources.join(module.replace("::", "/"));
        let candidates = [path.join("lib.rs"), path.join("mod.rs"), path.with_extension("rs")];
        let file = candidates.iter().find(|file| file.is_file());
        let file = file.unwrap_or_else(|| panic!("no source of {module:?} in {}", path.display()));
        let text = fs::read_to_string(file).expect("a readable source");
        let lines: Vec<_> = text.lines().collect();
        self.block(sources, module, &lines);
    }

    fn block(&mut self, sources: &Path, module: &str, lines: &[&str]) {
        self.items.entry(module.into()).or_default();
        let mut at = 0;
        let mut is_for_a_feature = false;
        while at < lines.len() {
            let line = lines[at];
            at += 1;
            if line.starts_with("#[cfg(feature") {
                is_for_a_feature = true;
                continue;
            }
            let Some(item) = line.strip_prefix("pub ") else {
                // Attributes and comments stand between a cfg and its item.
                is_for_a_feature &= line.starts_with(['#', '/', ' ']);
                continue;
            };
            let skipped = std::mem::take(&mut is_for_a_feature);
            if let Some(first) = item.strip_prefix("use ") {
                let mut text = first.to_string();
                while !text.ends_with(';') {
                    text.push_str(lines[at].trim());
                    at += 1;
                }
                self.uses.push((module.into(), text.trim_end_matches(';').into()));
                continue;
            }
            let word = |text: &str| -> String {
                text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
            };
            let kinds = [
                ("mod ", "module"),
                ("fn ", "function"),
                ("struct ", "type"),
                ("enum ", "type"),
                ("type ", "type"),
                ("trait ", "trait"),
                ("const ", "constant"),
            ];
            let kind =
                kinds.iter().find_map(|(word, kind)| Some((item.strip_prefix(word)?, *kind)));
            let (rest, kind) = kind.unwrap_or_else(|| panic!("what is this in {module:?}: {line}"));
            if skipped {
                continue;
            }
            let name = word(rest);
            self.items.get_mut(module).expect("made above").insert((name.clone(), kind));
            if kind != "module" {
                continue;
            }
            let inner = if module.is_empty() { name } else { format!("{module}::{name}") };
            if line.ends_with(';') {
                self.file(sources, &inner);
            } else {
                let len = lines[at..].iter().position(|line| *line == "}").expect("an end");
                let body: Vec<_> =
                    lines[at..at + len].iter().map(|line| line.trim_start()).collect();
                self.block(sources, &inner, &body);
            }
        }
    }

    /// Every path with its kind, re-exports followed until there is nothing new.
    fn paths(mut self) -> Items {
        loop {
            let before = self.items.values().map(BTreeSet::len).sum::<usize>();
            for (module, text) in self.uses.clone() {
                let (target, names) = imported(&module, &text);
                let imported: Items = match self.items.get(&target) {
                    Some(items) => {
                        let wanted = |name: &String| names.contains(name) || names == ["*"];
                        items.iter().filter(|(name, _)| wanted(name)).cloned().collect()
                    }
                    // Of another crate: candle's `Module` and `ModuleT`.
                    None => names.into_iter().map(|name| (name, "trait")).collect(),
                };
                self.items.get_mut(&module).expect("read").extend(imported);
            }
            if before == self.items.values().map(BTreeSet::len).sum::<usize>() {
                break;
            }
        }
        let paths = self.items.into_iter().flat_map(|(module, items)| {
            items.into_iter().map(move |(name, kind)| match module.as_str() {
                "" => (name, kind),
                module => (format!("{module}::{name}"), kind),
            })
        });
        paths.collect()
    }
}

/// `a::b::{c, d}` in a module: the module that names come from, and the names.
fn imported(module: &str, text: &str) -> (String, Vec<String>) {
    let (path, names) = text.rsplit_once("::").expect("a path of several words");
    let target = match path.strip_prefix("crate::") {
        Some(absolute) => absolute.to_string(),
        None if module.is_empty() => path.into(),
        None => format!("{module}::{path}"),
    };
    let names = names.trim_matches(['{', '}']).split(',').map(str::trim);
    (target, names.filter(|name| !name.is_empty()).map(String::from).collect())
}

#[test]
fn every_public_path_of_candle_nn_is_listed_and_none_that_is_gone() {
    let mut found = Found::default();
    found.file(&sources(), "");
    let found = found.paths();
    let entries = listed();
    let listed: Items = entries.iter().map(|entry| (entry.path.clone(), entry.kind)).collect();
    assert_eq!(listed.len(), entries.len(), "a path is listed twice");
    let missing: Vec<_> = found.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&found).collect();
    assert!(missing.is_empty() && gone.is_empty(), "to list: {missing:#?}; to strike: {gone:#?}");
    assert!(found.len() > 200, "only {} paths: candle-nn was not read", found.len());
}

#[test]
fn what_is_listed_as_ours_is_and_the_rest_is_candles() {
    for entry in listed() {
        let (path, verdict) = (entry.path, entry.verdict);
        let Some((name, of_candle)) = entry.names else { continue };
        let is_ours = name.starts_with("candle_dropout::");
        assert_eq!(is_ours, verdict != "same", "{path} is listed as {verdict}, and is {name}");
        assert_eq!(!is_ours, name == of_candle, "{path}: {name} and {of_candle}");
        if is_ours {
            println!("{verdict:<8} {path}: {name}");
        }
    }
}

#[test]
fn what_refuses_is_tested_to() {
    let listed = listed();
    let refusing = listed.iter().filter(|entry| entry.verdict == "refuses");
    let names: BTreeSet<_> = refusing.filter_map(|entry| entry.path.rsplit("::").next()).collect();
    assert_eq!(names, BTreeSet::from(crate::refused::TESTED));
}

/// A trait has no name at run time: an optimiser for one is an optimiser for the other.
#[test]
fn traits_are_candles() {
    fn ours<T: nn::Optimizer + nn::optim::Optimizer>() {}
    fn candles<T: candle_nn::Optimizer>() {
        ours::<T>();
    }
    candles::<nn::AdamW>();
    candles::<nn::SGD>();
    fn rnn<T: nn::RNN + nn::rnn::RNN>() {}
    fn candles_rnn<T: candle_nn::RNN>() {
        rnn::<T>();
    }
    candles_rnn::<nn::LSTM>();
    fn backend<T: nn::var_builder::SimpleBackend>() {}
    fn candles_backend<T: candle_nn::var_builder::SimpleBackend>() {
        backend::<T>();
    }
    candles_backend::<nn::VarMap>();
}
