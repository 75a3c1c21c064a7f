//! The file of a training state: safetensors, written whole or not at all, and read only if every byte is
//! what was written.
//!
//! `__metadata__` holds the format, its version, and what is no tensor. The last tensor, `checksum`, is the
//! checksum of all bytes before it, header included. Any reader of safetensors reads the rest.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device, Result, Tensor, bail};
use serde::Deserialize;
use serde_json::json;

use super::NAME;
use super::checksum::{Checksum, Summed};

const FORMAT: &str = "candle-dropout training state";
const VERSION: &str = "1";

/// The name of the tensor that ends the file.
const CHECKSUM: &str = "checksum";
const CHECKSUM_BYTES: usize = 8;

/// The length of the header, before it.
const LENGTH_BYTES: usize = 8;

/// The longest header that readers of safetensors take.
const MOST_HEADER_BYTES: usize = 100_000_000;

/// Writes `tensors` and `metadata` to a file beside `path`, flushes it to the disk and renames it, so that
/// `path` is at every moment what it was or what it shall be.
pub(super) fn write(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
) -> Result<()> {
    let (header, in_order) = header(path, tensors, metadata)?;
    let beside = beside(path)?;
    let write = || -> Result<()> {
        let file = File::create(&beside)?;
        let summed = Summed { to: file, checksum: Checksum::new() };
        let mut out = BufWriter::with_capacity(1 << 20, summed);
        out.write_all(&header)?;
        for tensor in in_order {
            tensor.write_bytes(&mut out)?;
        }
        let Summed { to: mut file, checksum } = out.into_inner().map_err(|e| e.into_error())?;
        file.write_all(&checksum.finish())?;
        // On the disk before the name is: after a loss of power a name without its data would be the loss
        // of both states.
        if let Err(error) = file.sync_all()
            && !has_no_flush(&error)
        {
            return Err(error.into());
        }
        // Closed first, since Windows renames an open file only if nobody objects.
        drop(file);
        Ok(fs::rename(&beside, path)?)
    };
    if let Err(error) = write() {
        // What cannot be removed is written over by the next call.
        let _ = fs::remove_file(&beside);
        bail!(
            "{NAME}: {}: expected to write it, got: {error}; what was there is kept",
            path.display()
        )
    }
    flush_name(path)
}

/// Flushes the folder, where the new name stands.
fn flush_name(path: &Path) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // Windows opens no folder as a file.
    if cfg!(windows) {
        return Ok(());
    }
    flushed(path, File::open(folder).and_then(|folder| folder.sync_all()))
}

/// Some file systems, mounted over a network, have no flush of folders; on macOS none of files either, where it is
/// asked of the disk itself, and the refusal is one of two numbers that have no `ErrorKind`.
fn has_no_flush(error: &io::Error) -> bool {
    const ENOTTY: i32 = 25;
    const ENOTSUP: i32 = 45;
    let refusal = error.raw_os_error().unwrap_or_default();
    matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput)
        || cfg!(target_vendor = "apple") && [ENOTTY, ENOTSUP].contains(&refusal)
}

/// What became of the flush of a folder.
fn flushed(path: &Path, result: io::Result<()>) -> Result<()> {
    match result {
        Err(error) if has_no_flush(&error) => Ok(()),
        Ok(()) => Ok(()),
        Err(error) => bail!(
            "{NAME}: {}: expected to flush its folder, got: {error}; the new state is in place, but a loss \
             of power now may bring back what was there before: save again",
            path.display()
        ),
    }
}

/// `<path>.tmp`: in the same folder, since a rename does not cross file systems, and always the same, so that
/// a run that is killed again and again leaves one at most.
fn beside(path: &Path) -> Result<PathBuf> {
    match path.file_name() {
        Some(name) => {
            let mut name = name.to_os_string();
            name.push(".tmp");
            Ok(path.with_file_name(name))
        }
        None => bail!(
            "{NAME}: {}: expected the name of a file, got a folder; add a name",
            path.display()
        ),
    }
}

/// The length and the text of the header, and the tensors in the order of their bytes.
fn header<'a>(
    path: &Path,
    tensors: &'a BTreeMap<String, Tensor>,
    mut metadata: BTreeMap<String, String>,
) -> Result<(Vec<u8>, Vec<&'a Tensor>)> {
    metadata.insert("format".to_string(), FORMAT.to_string());
    metadata.insert("version".to_string(), VERSION.to_string());
    // Wide elements first, so that each tensor begins at a multiple of its element's size.
    let mut in_order: Vec<_> = tensors.iter().collect();
    in_order.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype().size_in_bytes()));
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_string(), json!(metadata));
    let mut end = 0;
    for (name, tensor) in &in_order {
        let Some(dtype) = safetensors_dtype(tensor.dtype()) else {
            bail!(
                "{NAME}: {}: {name}: expected a dtype of floats of 16 bits and more or of integers, got {:?}; \
                 convert it with to_dtype",
                path.display(),
                tensor.dtype()
            )
        };
        let start = end;
        end += tensor.elem_count() * tensor.dtype().size_in_bytes();
        let entry = json!({"dtype": dtype, "shape": tensor.dims(), "data_offsets": [start, end]});
        header.insert((*name).clone(), entry);
    }
    let offsets = [end, end + CHECKSUM_BYTES];
    let entry = json!({"dtype": "U8", "shape": [CHECKSUM_BYTES], "data_offsets": offsets});
    header.insert(CHECKSUM.to_string(), entry);
    let mut text = serde_json::Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    if text.len() > MOST_HEADER_BYTES {
        bail!(
            "{NAME}: {}: expected names and Progress::text that make a header of at most {MOST_HEADER_BYTES} \
             bytes, got {}; keep a long text in a file of its own",
            path.display(),
            text.len()
        )
    }
    let length = (text.len() as u64).to_le_bytes();
    Ok(([&length, text.as_slice()].concat(), in_order.into_iter().map(|(_, t)| t).collect()))
}

fn safetensors_dtype(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::U8 => Some("U8"),
        DType::U32 => Some("U32"),
        DType::I16 => Some("I16"),
        DType::I32 => Some("I32"),
        DType::I64 => Some("I64"),
        DType::F16 => Some("F16"),
        DType::BF16 => Some("BF16"),
        DType::F32 => Some("F32"),
        DType::F64 => Some("F64"),
        _ => None,
    }
}

/// A file that was read and found whole.
pub(super) struct Whole {
    tensors: BufferedSafetensors,
    pub(super) metadata: BTreeMap<String, String>,
}

/// The part of a header that is read here.
#[derive(Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    metadata: Option<BTreeMap<String, String>>,
}

/// Reads a file that [`write()`] has written. Others, and damaged ones, are errors that say so.
pub(super) fn read(path: &Path) -> Result<Whole> {
    let shown = path.display();
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            bail!("{NAME}: {shown}: expected a training state, got: {error}; give the path of one")
        }
    };
    let damaged = |what: &str| -> Result<Whole> {
        bail!(
            "{NAME}: {shown}: expected a training state, got {what}: it is another file, or was cut \
             short or changed; take an older copy, or train from the start"
        )
    };
    let Some(text) = header_text(&bytes) else {
        return damaged("no whole header of safetensors");
    };
    let metadata = match serde_json::from_slice::<Header>(text) {
        Ok(header) => header.metadata.unwrap_or_default(),
        Err(error) => {
            return damaged(&format!("a header that is no JSON of safetensors ({error})"));
        }
    };
    match metadata.get("format").map(String::as_str) {
        Some(FORMAT) => {}
        _ => {
            bail!(
                "{NAME}: {shown}: expected a file that TrainingState::save has written, got another \
                 safetensors file; weights alone load with VarMap::load or pretrained_var_builder"
            )
        }
    }
    // The version before the checksum, which another version may take otherwise.
    match metadata.get("version").map(String::as_str) {
        Some(VERSION) => {}
        other => bail!(
            "{NAME}: {shown}: expected version {VERSION} of the format, got {}; load it with the \
             version of this crate that saved it",
            other.unwrap_or("none")
        ),
    }
    match bytes.split_last_chunk::<CHECKSUM_BYTES>() {
        Some((before, checksum)) if Checksum::of(before) == *checksum => {}
        _ => return damaged("bytes that do not match their checksum"),
    }
    match BufferedSafetensors::new(bytes) {
        Ok(tensors) => Ok(Whole { tensors, metadata }),
        Err(error) => damaged(&format!("no safetensors file ({error})")),
    }
}

fn header_text(bytes: &[u8]) -> Option<&[u8]> {
    let (length, rest) = bytes.split_first_chunk::<LENGTH_BYTES>()?;
    rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)
}

impl Whole {
    /// Shape and dtype of each tensor, by name.
    pub(super) fn outlines(&self) -> Result<BTreeMap<String, Outline>> {
        let tensors = self.tensors.tensors().into_iter().filter(|(name, _)| name != CHECKSUM);
        let outlines = tensors.map(|(name, view)| {
            Ok((name, Outline { dtype: view.dtype().try_into()?, dims: view.shape().to_vec() }))
        });
        outlines.collect()
    }

    pub(super) fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.tensors.load(name, device)
    }
}

/// What must agree before a tensor is taken over.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Outline {
    pub(super) dtype: DType,
    pub(super) dims: Vec<usize>,
}

impl From<&Tensor> for Outline {
    fn from(tensor: &Tensor) -> Self {
        Self { dtype: tensor.dtype(), dims: tensor.dims().to_vec() }
    }
}

impl std::fmt::Display for Outline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {:?}", self.dtype, self.dims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_cannot_be_flushed_is_an_error_where_folders_can_be() -> Result<()> {
        let path = Path::new("a/state");
        flushed(path, Ok(()))?;
        for kind in [ErrorKind::Unsupported, ErrorKind::InvalidInput] {
            flushed(path, Err(kind.into()))?;
        }
        let message = match flushed(path, Err(ErrorKind::StorageFull.into())) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        assert!(
            message.starts_with("training state: a/state: expected to flush its folder, got: ")
                && message.contains("; the new state is in place, "),
            "{message}"
        );
        Ok(())
    }
}
