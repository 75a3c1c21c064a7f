//! Documents read from files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::Document;

/// Reads a file that must hold UTF-8 text.
pub fn read_text(path: &Path) -> Result<String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, bytes: &[u8]) -> PathBuf {
        let path = std::env::temp_dir()
            .join(format!("candle-dropout-corpus-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        path
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
    }
}
