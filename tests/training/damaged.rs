//! A file that is not, byte for byte, what was saved is refused by name, whatever became of it, and neither
//! training nor file has changed.

use std::cell::RefCell;

use candle_dropout::training::Progress;
use proptest::prelude::*;

use super::*;

/// What happens to a file.
#[derive(Clone, Debug)]
enum Damage {
    /// Cut off after this part of it.
    Cut(f64),
    /// A bit flipped, at this part of it.
    Flip(f64, u8),
    /// A bit flipped in the header.
    FlipHeader(f64, u8),
    /// Some bytes, from this part on, overwritten by others.
    Overwrite(f64, Vec<u8>),
    /// Bytes at its end, or at its beginning.
    Append(Vec<u8>),
    Prepend(Vec<u8>),
    /// Some bytes, from this part on, taken out.
    Remove(f64, usize),
    /// A file of any bytes.
    Foreign(Vec<u8>),
    /// A header of any JSON-like text, with its right length.
    Header(String),
}

fn damage() -> impl Strategy<Value = Damage> {
    let (part, bytes) = (0f64..1., proptest::collection::vec(any::<u8>(), 1..40));
    prop_oneof![
        part.clone().prop_map(Damage::Cut),
        (part.clone(), 0..8u8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        (part.clone(), 0..8u8).prop_map(|(at, bit)| Damage::FlipHeader(at, bit)),
        (part.clone(), bytes.clone()).prop_map(|(at, bytes)| Damage::Overwrite(at, bytes)),
        bytes.clone().prop_map(Damage::Append),
        bytes.clone().prop_map(Damage::Prepend),
        (part, 1..40usize).prop_map(|(at, count)| Damage::Remove(at, count)),
        proptest::collection::vec(any::<u8>(), 0..200).prop_map(Damage::Foreign),
        r#"\{("(__metadata__|weights\.a|format)":(\{[a-z":,0-9\[\]]{0,40}\}|[0-9]{1,22}|"[a-z]*"),?){0,4}\}?"#
            .prop_map(Damage::Header),
    ]
}

impl Damage {
    fn applied(&self, file: &[u8]) -> Vec<u8> {
        let mut bytes = file.to_vec();
        let at = |part: f64| (part * file.len() as f64) as usize;
        match self {
            Self::Cut(part) => bytes.truncate(at(*part)),
            Self::Flip(part, bit) => bytes[at(*part)] ^= 1 << bit,
            Self::FlipHeader(part, bit) => {
                let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
                bytes[(part * header as f64) as usize] ^= 1 << bit;
            }
            Self::Overwrite(part, with) => {
                bytes.iter_mut().skip(at(*part)).zip(with).for_each(|(byte, with)| *byte = *with);
            }
            Self::Append(more) => bytes.extend(more),
            Self::Prepend(more) => bytes.splice(0..0, more.iter().copied()).for_each(drop),
            Self::Remove(part, count) => {
                let end = bytes.len().min(at(*part) + count);
                bytes.drain(at(*part)..end);
            }
            Self::Foreign(other) => bytes = other.clone(),
            Self::Header(text) => {
                bytes = (text.len() as u64).to_le_bytes().to_vec();
                bytes.extend(text.as_bytes());
            }
        }
        bytes
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..Default::default() })]

    #[test]
    fn any_damage_is_named_and_changes_nothing(damage in damage()) {
        thread_local! {
            // Made once: what is to be loaded into, what it is, the file, and its path.
            static CASE: RefCell<Option<(Training, Vec<u8>, Folder)>> = const { RefCell::new(None) };
        }
        let check = |case: &mut Option<(Training, Vec<u8>, Folder)>| -> Result<()> {
            if case.is_none() {
                let folder = Folder::new("damaged")?;
                let mut saved = Training::new(8, 10, 1)?;
                saved.step(0)?;
                let path = folder.file("saved.safetensors");
                let progress = Progress { step: 1, text: "epoch 3".into() };
                saved.state.save(&path, &saved.adamw, &progress)?;
                *case = Some((Training::new(8, 10, 2)?, std::fs::read(path)?, folder));
            }
            let Some((training, file, folder)) = case else { return Ok(()) };
            let bytes = damage.applied(file);
            if bytes == *file {
                return Ok(()); // overwritten by itself
            }
            let path = folder.file("damaged.safetensors");
            std::fs::write(&path, &bytes)?;
            let before = training.bits()?;
            let Err(error) = training.state.load(&path, &mut training.adamw) else {
                candle_core::bail!("it was taken")
            };
            let message = error.to_string();
            assert!(message.starts_with("training state: "), "{message}");
            assert!(message.contains("damaged.safetensors: expected "), "{message}");
            assert_eq!(training.bits()?, before);
            assert_eq!(std::fs::read(&path)?, bytes);
            Ok(())
        };
        CASE.with_borrow_mut(check).map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}

#[test]
fn what_is_wrong_with_a_file_is_said() -> Result<()> {
    let folder = Folder::new("said")?;
    let path = folder.file("state.safetensors");
    let mut training = Training::new(8, 10, 1)?;
    training.state.save(&path, &training.adamw, &Progress::default())?;
    let file = std::fs::read(&path)?;
    let mut check = |bytes: Option<Vec<u8>>, part: &str| -> Result<()> {
        match bytes {
            Some(bytes) => std::fs::write(&path, bytes)?,
            None => std::fs::remove_file(&path)?,
        }
        let before = training.bits()?;
        let error = training.state.load(&path, &mut training.adamw);
        let message = error.expect_err("it is refused").to_string();
        assert!(message.contains(&format!("state.safetensors: {part}")), "{message}");
        assert_eq!(training.bits()?, before);
        Ok(())
    };
    let mut flipped = file.clone();
    flipped[file.len() - 100] ^= 1;
    check(
        Some(flipped),
        "expected a training state, got bytes that do not match their checksum: ",
    )?;
    let text = String::from_utf8_lossy(&file).replace("\"version\":\"1\"", "\"version\":\"2\"");
    let later = [&file[..8], &text.as_bytes()[8..500], &file[500..]].concat();
    check(
        Some(later),
        "expected version 1 of the format, got 2; load it with the version of this",
    )?;
    check(Some(file[..100].to_vec()), "expected a training state, got no whole header of safe")?;
    check(Some(Vec::new()), "expected a training state, got no whole header of safetensors")?;
    check(Some(vec![0; 64]), "expected a training state, got a header that is no JSON of safe")?;
    check(None, "expected a training state, got: No such file")?;
    // The weights of the very model, without the rest.
    let weights: std::collections::HashMap<_, _> =
        training.vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    candle_core::safetensors::save(&weights, &path)?;
    let weights = std::fs::read(&path)?;
    let mut check = |bytes: Vec<u8>, part: &str| -> Result<()> {
        std::fs::write(&path, bytes)?;
        let error = training.state.load(&path, &mut training.adamw);
        let message = error.expect_err("it is refused").to_string();
        assert!(message.contains(part), "{message}");
        Ok(())
    };
    check(
        weights,
        "expected a file that TrainingState::save has written, got another safetensors file",
    )
}
