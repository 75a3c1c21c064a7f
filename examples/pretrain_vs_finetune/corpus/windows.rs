//! What is cut from the documents to train on and to judge by, and what of it must not be judged by: text
//! that was trained on.

use std::collections::HashSet;

use super::Document;

/// Held-out windows that share this many neighbouring bytes with training text are removed.
pub const GUARD_BYTES: usize = 60;

/// A stretch of `context + 1` bytes: inputs, and the same shifted by one as targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    pub document: usize,
    pub start: usize,
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::read_documents;
    use super::super::tests::{document, numbers};
    use super::*;

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
}
