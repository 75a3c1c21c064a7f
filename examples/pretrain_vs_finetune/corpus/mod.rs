//! Text in, training and held-out windows out.
//!
//! Bytes are the tokens, all 256 of them: a vocabulary made from the bytes in use would have to be
//! read off some text, held-out text included, and losses over different vocabularies could not be
//! compared.

mod built_in;
mod files;
mod windows;

use anyhow::{Result, bail};

pub use built_in::built_in;
pub use files::read_documents;
pub use windows::{GUARD_BYTES, Window, all_windows, remove_seen, spread, windows};

/// Number of different tokens.
pub const VOCAB_SIZE: usize = 256;

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

    pub fn document(text: &str) -> Document {
        Document { name: "a".into(), text: text.as_bytes().to_vec() }
    }

    /// Text without repetition.
    pub fn numbers(from: usize, count: usize) -> String {
        (from..from + count).map(|i| format!("{i:07} ")).collect()
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
    fn too_little_text_is_refused_with_numbers() {
        assert_eq!(
            require("text", 5, 9, "give more").unwrap_err().to_string(),
            "text: 9 bytes are needed, there are 5: give more"
        );
    }
}
