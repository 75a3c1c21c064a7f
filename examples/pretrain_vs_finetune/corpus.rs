//! Text in, training and held-out windows out.
//!
//! Bytes are the tokens, all 256 of them: a vocabulary made from the bytes in use would have to be
//! read off some text, held-out text included, and losses over different vocabularies could not be
//! compared.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Number of different tokens.
pub const VOCAB_SIZE: usize = 256;

/// Held-out windows that share this many neighbouring bytes with training text are removed.
pub const GUARD_BYTES: usize = 60;

/// One file, or one part of a file between form feeds.
#[derive(Debug, Clone)]
pub struct Document {
    pub name: String,
    pub text: Vec<u8>,
}

/// Text to train on, to choose by, and to read once at the end.
#[derive(Debug, Clone, Default)]
pub struct Splits {
    pub train: Vec<Document>,
    pub dev: Vec<Document>,
    pub test: Vec<Document>,
}

/// A stretch of `context + 1` bytes: inputs, and the same shifted by one as targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    pub document: usize,
    pub start: usize,
}

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
    /// Asks `cargo` for the dependencies of the package in `folder`.
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

/// Reads a file that must hold UTF-8 text.
fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(!bytes.is_empty(), "{} is empty: expected text", path.display());
    ensure!(!bytes.contains(&0), "{} is not text: it holds zero bytes", path.display());
    String::from_utf8(bytes).ok().with_context(|| {
        format!(
            "{} is not text in UTF-8: convert it, for instance with `iconv -f latin1 -t utf-8`",
            path.display()
        )
    })
}

/// Reads documents: files, or the parts of a file that form feeds separate.
pub fn read_documents(paths: &[PathBuf]) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for path in paths {
        ensure!(!path.is_dir(), "{} is a folder: name the files in it", path.display());
        let text = read_text(path)?;
        let parts: Vec<&str> = text.split('\u{c}').map(|part| part.trim_matches('\n')).collect();
        for (i, part) in parts.iter().enumerate().filter(|(_, part)| !part.trim().is_empty()) {
            let name = if parts.len() == 1 {
                path.display().to_string()
            } else {
                format!("{}#{i}", path.display())
            };
            documents.push(Document { name, text: part.as_bytes().to_vec() });
        }
    }
    ensure!(!documents.is_empty(), "{paths:?} hold nothing but white space: expected text");
    Ok(documents)
}

impl Splits {
    /// By document where there are ten or more, else every document is cut in three with gaps of
    /// `gap` bytes.
    pub fn of(documents: Vec<Document>, gap: usize) -> Self {
        if documents.len() >= 10 {
            Self::by_document(documents)
        } else {
            Self::contiguous(documents, gap)
        }
    }

    /// Of every ten documents in their order, eight to train, one dev, one test.
    pub fn by_document(documents: Vec<Document>) -> Self {
        let mut splits = Self::default();
        for (i, document) in documents.into_iter().enumerate() {
            match i % 10 {
                8 => splits.dev.push(document),
                9 => splits.test.push(document),
                _ => splits.train.push(document),
            }
        }
        splits
    }

    fn contiguous(documents: Vec<Document>, gap: usize) -> Self {
        let mut splits = Self::default();
        for Document { name, text } in documents {
            let (dev, test) = (text.len() * 8 / 10, text.len() * 9 / 10);
            let part = |from: usize, to: usize, split: &str| Document {
                name: format!("{name} ({split})"),
                text: text[from.min(to)..to].to_vec(),
            };
            splits.train.push(part(0, dev, "train"));
            splits.dev.push(part(dev + gap, test, "dev"));
            splits.test.push(part(test + gap, text.len(), "test"));
        }
        splits
    }

    /// Bytes in train, dev and test.
    pub fn bytes(&self) -> [usize; 3] {
        [&self.train, &self.dev, &self.test]
            .map(|documents| documents.iter().map(|d| d.text.len()).sum())
    }
}

/// The first `bytes` bytes.
pub fn truncate(documents: &mut Vec<Document>, mut bytes: usize) {
    documents.retain_mut(|document| {
        document.text.truncate(bytes);
        bytes -= document.text.len();
        !document.text.is_empty()
    });
}

/// FNV-1a (64 bits) over every document's split, name, length and text: two runs with one hash read
/// the same text.
pub fn fnv1a(corpora: &[&Splits]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut eat = |bytes: &[u8]| {
        for &byte in bytes {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for splits in corpora {
        for (split, documents) in [(0u8, &splits.train), (1, &splits.dev), (2, &splits.test)] {
            for document in documents {
                eat(&[split]);
                eat(document.name.as_bytes());
                eat(&(document.text.len() as u64).to_le_bytes());
                eat(&document.text);
            }
        }
    }
    hash
}

/// Non-overlapping windows: every byte is a target at most once, and no window crosses documents.
pub fn windows(documents: &[Document], context: usize) -> Vec<Window> {
    let of = |(document, d): (usize, &Document)| {
        (0..d.text.len().saturating_sub(1) / context)
            .map(move |i| Window { document, start: i * context })
    };
    documents.iter().enumerate().flat_map(of).collect()
}

/// Every window there is, overlapping.
pub fn all_windows(documents: &[Document], context: usize) -> Vec<Window> {
    let of = |(document, d): (usize, &Document)| {
        (0..d.text.len().saturating_sub(context)).map(move |start| Window { document, start })
    };
    documents.iter().enumerate().flat_map(of).collect()
}

/// At most `limit` windows, evenly spaced.
pub fn spread(windows: &[Window], limit: usize) -> Vec<Window> {
    let kept = windows.len().min(limit);
    (0..kept).map(|i| windows[i * windows.len() / kept]).collect()
}

/// Drops the windows that share [`GUARD_BYTES`] neighbouring bytes with any of `train`; returns how
/// many it dropped.
pub fn remove_seen(
    windows: &mut Vec<Window>,
    documents: &[Document],
    context: usize,
    train: &[&[Document]],
) -> usize {
    // A window shorter than what is compared is judged with its surroundings.
    let around = |window: &Window| {
        let text = &documents[window.document].text;
        let end = (window.start + (context + 1).max(GUARD_BYTES)).min(text.len());
        &text[window.start.min(end.saturating_sub(GUARD_BYTES))..end]
    };
    let held_out: HashSet<u64> =
        windows.iter().flat_map(|window| rolling_hashes(around(window))).collect();
    let training = train.iter().flat_map(|documents| documents.iter());
    let seen: HashSet<u64> = training
        .flat_map(|document| rolling_hashes(&document.text))
        .filter(|hash| held_out.contains(hash))
        .collect();
    let before = windows.len();
    windows.retain(|window| !rolling_hashes(around(window)).any(|hash| seen.contains(&hash)));
    before - windows.len()
}

/// Polynomial hashes of every `GUARD_BYTES` neighbouring bytes.
fn rolling_hashes(text: &[u8]) -> impl Iterator<Item = u64> + '_ {
    const BASE: u64 = 0x9e37_79b9_7f4a_7c15;
    let oldest = BASE.wrapping_pow(GUARD_BYTES as u32);
    let mut hash = 0u64;
    text.iter().enumerate().filter_map(move |(i, &byte)| {
        hash = hash.wrapping_mul(BASE).wrapping_add(u64::from(byte) + 1);
        if i >= GUARD_BYTES {
            hash = hash.wrapping_sub(oldest.wrapping_mul(u64::from(text[i - GUARD_BYTES]) + 1));
        }
        (i + 1 >= GUARD_BYTES).then_some(hash)
    })
}

/// Says how many bytes are needed where there are too few.
pub fn require(what: &str, have: usize, need: usize, remedy: &str) -> Result<()> {
    if have < need {
        bail!("{what}: {need} bytes are needed, there are {have}: {remedy}")
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Document {
        Document { name: "a".into(), text: text.as_bytes().to_vec() }
    }

    /// Text without repetition.
    fn numbers(from: usize, count: usize) -> String {
        (from..from + count).map(|i| format!("{i:07} ")).collect()
    }

    fn file(name: &str, bytes: &[u8]) -> PathBuf {
        let path = std::env::temp_dir()
            .join(format!("candle-dropout-corpus-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        path
    }

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
        for (sources, cause) in [
            (Sources::locate("no-such-cargo".as_ref(), here), "cannot run `no-such-cargo"),
            (Sources::locate("false".as_ref(), here), "`false --version --verbose` failed"),
            (Sources::locate(&cargo, Path::new("no/such/folder")), "no/such/folder no longer"),
            (Sources::locate(&cargo, &std::env::temp_dir()), "failed: "),
            (moved("candle-nn"), "cannot list no/such/folder"),
            (moved("proptest"), "cannot read no/such/folder/CHANGELOG.md"),
            (without("half"), "half is not among the dependencies"),
        ] {
            let error = format!("{:#}", built_in_from(sources).map(drop).unwrap_err());
            assert!(error.contains("with --pretrain PATH.. --finetune PATH.."), "{error}");
            assert!(error.contains(cause), "{cause}: {error}");
        }
    }

    #[test]
    fn the_measurement_texts_are_split_without_leaks() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/lm");
        let read = |name: &str| read_documents(&[folder.join(name)]).unwrap();
        if !folder.exists() {
            eprintln!("skipped: {} does not exist", folder.display());
            return;
        }
        let train = read("pretrain_train.txt");
        assert_eq!(train.len(), 31);
        for name in ["pretrain_dev.txt", "pretrain_test.txt", "ft_holmes_test.txt"] {
            let held_out = read(name);
            let mut windows = spread(&windows(&held_out, 64), 2000);
            assert_eq!(remove_seen(&mut windows, &held_out, 64, &[&train]), 0, "{name}");
        }
    }

    #[test]
    fn splits_of_a_single_document_share_no_byte() {
        let text = numbers(0, 1000);
        let splits = Splits::of(vec![document(&text)], 64);
        let [train, dev, test] = splits.bytes();
        assert_eq!((train, dev, test), (6400, 736, 736));
        for (held_out, bytes) in [(&splits.dev, dev), (&splits.test, test)] {
            let mut held_out_windows = windows(held_out, 16);
            assert_eq!(remove_seen(&mut held_out_windows, held_out, 16, &[&splits.train]), 0);
            assert_eq!(held_out_windows.len(), (bytes - 1) / 16);
        }
    }

    #[test]
    fn ten_documents_are_split_by_document() {
        let documents: Vec<Document> = (0..20).map(|i| document(&numbers(i * 100, 100))).collect();
        let splits = Splits::of(documents, 64);
        assert_eq!((splits.train.len(), splits.dev.len(), splits.test.len()), (16, 2, 2));
        assert_eq!(splits.test[1].text, numbers(1900, 100).into_bytes());
    }

    #[test]
    fn windows_do_not_overlap_and_stay_inside_their_document() {
        let documents =
            [document(&"x".repeat(65)), document(&"y".repeat(64)), document(&"z".repeat(200))];
        let starts: Vec<_> =
            windows(&documents, 64).iter().map(|w| (w.document, w.start)).collect();
        assert_eq!(starts, [(0, 0), (2, 0), (2, 64), (2, 128)]);
        assert_eq!(all_windows(&documents, 64).len(), 1 + 136);
        assert_eq!(
            spread(&windows(&documents, 64), 2).iter().map(|w| w.start).collect::<Vec<_>>(),
            [0, 64]
        );
    }

    #[test]
    fn held_out_windows_that_occur_in_training_are_removed() {
        let copied = numbers(500, 10);
        let train = [document(&format!("{}{copied}{}", numbers(0, 50), numbers(100, 50)))];
        let held_out = [document(&format!("{}{copied}{}", numbers(1000, 40), numbers(2000, 40)))];
        for context in [16, 64] {
            let mut kept = windows(&held_out, context);
            let removed = remove_seen(&mut kept, &held_out, context, &[&train]);
            assert!(
                removed > 0 && !kept.is_empty(),
                "context {context}: {removed} removed, {} kept",
                kept.len()
            );
            for window in kept {
                let text = &held_out[0].text[window.start..window.start + context + 1];
                let copied = copied.as_bytes().windows(GUARD_BYTES);
                assert!(
                    !copied.into_iter().any(|c| text.windows(GUARD_BYTES).any(|t| t == c)),
                    "context {context}"
                );
            }
        }
    }

    #[test]
    fn form_feeds_separate_documents() {
        let path = file("parts", b"one\n\x0c\ntwo\n\x0c\n\x0cthree");
        let texts: Vec<_> = read_documents(&[path]).unwrap().into_iter().map(|d| d.text).collect();
        assert_eq!(texts, [b"one".to_vec(), b"two".to_vec(), b"three".to_vec()]);
    }

    #[test]
    fn bad_files_are_refused_with_a_reason() {
        let error = |path: PathBuf| format!("{:#}", read_documents(&[path]).unwrap_err());
        assert!(error("no/such/file".into()).contains("cannot read no/such/file"));
        assert!(error(std::env::temp_dir()).contains("is a folder"));
        assert!(error(file("empty", b"")).contains("is empty"));
        assert!(error(file("blank", b" \n\n")).contains("nothing but white space"));
        assert!(error(file("zero", b"a\0b")).contains("is not text: it holds zero bytes"));
        assert!(error(file("latin1", b"caf\xe9")).contains("iconv -f latin1"));
        assert_eq!(
            require("text", 5, 9, "give more").unwrap_err().to_string(),
            "text: 9 bytes are needed, there are 5: give more"
        );
    }
}
