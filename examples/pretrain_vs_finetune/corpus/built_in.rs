//! The built-in text: sources of packages that the lock file pins, so that everybody has the same.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::files::read_text;
use super::{Document, Splits};

/// Source code of crates that this crate's lock file pins and every platform builds: (name, version
/// prefix).
const CODE: [(&str, &str); 8] = [
    ("candle-core", ""),
    ("candle-nn", ""),
    ("half", ""),
    ("num-traits", ""),
    ("rand", "0.9."),
    ("rayon", ""),
    ("rayon-core", ""),
    ("serde_json", ""),
];

/// Prose of such crates, what changed from release to release: (crate, file).
const PROSE_TRAIN: [(&str, &str); 2] = [("rayon", "RELEASES.md"), ("num-traits", "RELEASES.md")];
const PROSE_DEV: [(&str, &str); 2] = [("bytemuck", "changelog.md"), ("rand_distr", "CHANGELOG.md")];
const PROSE_TEST: [(&str, &str); 4] = [
    ("criterion", "CHANGELOG.md"),
    ("half", "CHANGELOG.md"),
    ("proptest", "CHANGELOG.md"),
    ("rand", "CHANGELOG.md"),
];

/// The built-in text: code to pretrain on, prose to fine-tune on, split by file.
pub fn built_in() -> Result<(Splits, Splits)> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    built_in_from(Sources::locate(&cargo, Path::new(env!("CARGO_MANIFEST_DIR"))))
}

/// Whatever is missing, text of one's own is the remedy.
fn built_in_from(sources: Result<Sources>) -> Result<(Splits, Splits)> {
    sources.and_then(|sources| texts(&sources)).context(
        "the built-in text is the source of this crate's dependencies, which is not at hand; pass \
         your own with --pretrain PATH.. --finetune PATH..",
    )
}

fn texts(sources: &Sources) -> Result<(Splits, Splits)> {
    let mut code = Vec::new();
    for (name, version) in CODE {
        code.extend(sources.rust_files(name, version)?);
    }
    let prose = |files: &[(&str, &str)]| -> Result<Vec<Document>> {
        files.iter().map(|(name, file)| sources.file(name, file)).collect()
    };
    let prose =
        Splits { train: prose(&PROSE_TRAIN)?, dev: prose(&PROSE_DEV)?, test: prose(&PROSE_TEST)? };
    Ok((Splits::by_document(code), prose))
}

/// Where the dependencies' sources lie.
struct Sources(Vec<Package>);

struct Package {
    name: String,
    version: String,
    folder: PathBuf,
}

impl Sources {
    /// Asks `cargo` for the dependencies of the workspace of the package in `folder`: tests and
    /// benches, members of their own, have some of the prose.
    fn locate(cargo: &OsStr, folder: &Path) -> Result<Self> {
        ensure!(folder.is_dir(), "the folder {} no longer exists", folder.display());
        let run = |args: &[&str]| -> Result<String> {
            let command = || format!("`{} {}`", Path::new(cargo).display(), args.join(" "));
            let output = Command::new(cargo).args(args).current_dir(folder).output();
            let output = output.with_context(|| format!("cannot run {}", command()))?;
            ensure!(
                output.status.success(),
                "{} failed: {}",
                command(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
            Ok(String::from_utf8(output.stdout)?)
        };
        // Without the filter, cargo asks for the sources of other platforms, which no build here
        // ever fetched.
        let version = run(&["--version", "--verbose"])?;
        let host = version.lines().find_map(|line| line.strip_prefix("host: "));
        let host = host.context("`cargo --version --verbose` names no host")?;
        let metadata = run(&[
            "metadata",
            "--locked",
            "--offline",
            "--format-version",
            "1",
            "--filter-platform",
            host,
        ])?;
        let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
        let packages =
            metadata["packages"].as_array().context("cargo metadata lists no packages")?;
        let package = |package: &serde_json::Value| -> Option<Package> {
            let field = |key: &str| package[key].as_str().map(str::to_string);
            let folder = Path::new(&field("manifest_path")?).parent()?.to_path_buf();
            Some(Package { name: field("name")?, version: field("version")?, folder })
        };
        Ok(Self(packages.iter().filter_map(package).collect()))
    }

    fn package(&self, name: &str, version: &str) -> Result<&Package> {
        let found = self
            .0
            .iter()
            .find(|package| package.name == name && package.version.starts_with(version));
        let wanted = || format!("{name} {version}");
        found.with_context(|| format!("{} is not among the dependencies", wanted().trim_end()))
    }

    fn file(&self, name: &str, file: &str) -> Result<Document> {
        let version =
            CODE.iter().find(|(known, _)| *known == name).map_or("", |(_, version)| version);
        let path = self.package(name, version)?.folder.join(file);
        Ok(Document { name: format!("{name}/{file}"), text: read_text(&path)?.into_bytes() })
    }

    /// Every `src/**/*.rs`, in the order of their names, which is the same on every platform.
    fn rust_files(&self, name: &str, version: &str) -> Result<Vec<Document>> {
        let folder = &self.package(name, version)?.folder;
        let mut files = Vec::new();
        let mut folders = vec![folder.join("src")];
        while let Some(folder) = folders.pop() {
            let entries = std::fs::read_dir(&folder)
                .with_context(|| format!("cannot list {}", folder.display()))?;
            for entry in entries {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    files.push(path);
                }
            }
        }
        let mut names: Vec<String> = Vec::new();
        for file in &files {
            let parts: Vec<_> =
                file.strip_prefix(folder)?.iter().map(|part| part.to_string_lossy()).collect();
            names.push(parts.join("/"));
        }
        names.sort();
        let nonempty =
            |document: &Result<Document>| !document.as_ref().is_ok_and(|d| d.text.is_empty());
        let read = |file: &String| {
            let path = folder.join(file);
            let text =
                std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            Ok(Document { name: format!("{name}/{file}"), text })
        };
        names.iter().map(read).filter(nonempty).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::fnv1a;
    use super::*;

    #[test]
    fn the_built_in_text_is_the_one_that_was_measured() {
        let (code, prose) = built_in().unwrap();
        let hash = fnv1a(&[&code, &prose]);
        assert_eq!(
            hash, 0xa700_11e5_1c4e_3427,
            "the text has changed (hash {hash:#018x}): figures in the documentation need a new run"
        );
        assert!(code.bytes().iter().all(|&bytes| bytes > 100_000), "{:?}", code.bytes());
    }

    #[test]
    fn whatever_the_built_in_text_lacks_the_remedy_is_named() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let moved = |name: &str| {
            let mut sources = Sources::locate(&cargo, here).unwrap();
            let package = sources.0.iter_mut().find(|package| package.name == name).unwrap();
            package.folder = "no/such/folder".into();
            Ok(sources)
        };
        let without = |name: &str| {
            let mut sources = Sources::locate(&cargo, here).unwrap();
            sources.0.retain(|package| package.name != name);
            Ok(sources)
        };
        // Any program that knows no such options, on any system: this one.
        let no_cargo = std::env::current_exe().unwrap();
        let file = Path::new("no/such/folder").join("CHANGELOG.md");
        let cannot_read = format!("cannot read {}", file.display());
        for (sources, cause) in [
            (Sources::locate("no-such-cargo".as_ref(), here), "cannot run `no-such-cargo"),
            (Sources::locate(no_cargo.as_ref(), here), "--version --verbose` failed"),
            (Sources::locate(&cargo, Path::new("no/such/folder")), "no/such/folder no longer"),
            (Sources::locate(&cargo, &std::env::temp_dir()), "failed: "),
            (moved("candle-nn"), "cannot list no/such/folder"),
            (moved("proptest"), &cannot_read),
            (without("half"), "half is not among the dependencies"),
        ] {
            let error = format!("{:#}", built_in_from(sources).map(drop).unwrap_err());
            assert!(error.contains("with --pretrain PATH.. --finetune PATH.."), "{error}");
            assert!(error.contains(cause), "{cause}: {error}");
        }
    }
}
