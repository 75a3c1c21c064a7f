//! The weights of a checkpoint's folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Mutex;

use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use serde::Deserialize;

use super::read_text;

/// The name of the output head in every checkpoint, and those of the token embedding.
const HEAD: &str = "lm_head.weight";
const EMBEDDINGS: [&str; 4] =
    ["transformer.wte.weight", "wte.weight", "model.embed_tokens.weight", "embed_tokens.weight"];

/// What older versions of Hugging Face's models saved beside their weights: causal masks, positions
/// and rotary frequencies, which follow from the configuration.
const BUFFERS: [&str; 4] = ["attn.bias", "attn.masked_bias", "rotary_emb.inv_freq", "position_ids"];

fn is_buffer(name: &str) -> bool {
    BUFFERS.iter().any(|buffer| {
        name.strip_suffix(*buffer).is_some_and(|path| path.is_empty() || path.ends_with('.'))
    })
}

/// The bytes of a checkpoint's files: a tensor is made of a weight that is asked for, so that
/// buffers of dtypes that candle does not have stand in nobody's way.
pub(super) struct Checkpoint {
    files: Vec<BufferedSafetensors>,
    /// The file of each weight.
    weights: BTreeMap<String, usize>,
    asked: Mutex<BTreeSet<String>>,
}

impl Checkpoint {
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let (names, weight_map) = listed(dir)?;
        let files = names.iter().map(|name| read(dir, name)).collect::<Result<Vec<_>>>()?;
        let weights = match weight_map {
            None => files[0].tensors().into_iter().map(|(name, _)| (name, 0)).collect(),
            Some(weight_map) => routed(&files, &names, weight_map)?,
        };
        Ok(Self { files, weights, asked: Mutex::default() })
    }

    /// The file that holds a weight.
    fn file(&self, name: &str) -> Option<&BufferedSafetensors> {
        self.weights.get(name).map(|file| &self.files[*file])
    }

    /// Whether it holds this weight. A head that repeats the embedding is no weight beside it: a
    /// model whose head is tied was saved with both.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.weights.contains_key(name) && !(name == HEAD && self.head_is_embedding())
    }

    /// Bit by bit, but for the sign of zeros.
    fn head_is_embedding(&self) -> bool {
        let view = |name: &str| self.file(name).and_then(|file| file.get(name).ok());
        let Some(head) = view(HEAD) else { return false };
        EMBEDDINGS.iter().filter_map(|name| view(name)).any(|tokens| {
            let is_alike = head.dtype() == tokens.dtype() && head.shape() == tokens.shape();
            let Ok(dtype) = DType::try_from(head.dtype()) else { return false };
            // Little endian: the sign is the first bit of the last byte.
            let is_zero = |element: &[u8]| match element.split_last() {
                Some((last, rest)) => last & 0x7f == 0 && rest.iter().all(|byte| *byte == 0),
                None => true,
            };
            let size = dtype.size_in_bytes().max(1);
            is_alike
                && head.data().len() == tokens.data().len()
                && (head.data() == tokens.data()
                    || head
                        .data()
                        .chunks(size)
                        .zip(tokens.data().chunks(size))
                        .all(|(a, b)| a == b || is_zero(a) && is_zero(b)))
        })
    }

    /// A weight of the shape that is asked for: what does not fit is not converted.
    pub(super) fn load(
        &self,
        shape: &Shape,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        if let Some(file) = self.file(name) {
            check_shape(name, shape, file.get(name)?.shape())?;
        }
        self.load_any(name, dtype, device)
    }

    /// A weight of whatever shape.
    pub(super) fn load_any(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let Some(file) = self.file(name) else {
            bail!(
                "checkpoint: {name}: expected this weight, got none: does config.json belong to \
                 these weights?"
            )
        };
        let stored = file.get(name)?.dtype();
        let is_float = matches!(
            DType::try_from(stored),
            Ok(DType::F32 | DType::F64 | DType::F16 | DType::BF16)
        );
        if !is_float {
            bail!(
                "checkpoint: {name}: expected dtype f32, f64, f16 or bf16, got {stored:?}: quantised \
                 weights are not read; take the unquantised ones"
            )
        }
        self.asked()?.insert(name.to_string());
        file.load(name, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
    }

    fn asked(&self) -> Result<std::sync::MutexGuard<'_, BTreeSet<String>>> {
        match self.asked.lock() {
            Ok(asked) => Ok(asked),
            Err(_) => bail!(
                "checkpoint: the names that were asked for are lost, since a thread panicked over them; \
                 open the checkpoint again"
            ),
        }
    }

    /// Refuses weights that nobody has asked for: the model was not made without them.
    pub(super) fn check_all_asked(&self) -> Result<()> {
        let asked = self.asked()?;
        self.check_all_used(|name| asked.contains(name))
    }

    /// Refuses weights that are not used, but for buffers and a head that repeats the embedding.
    pub(super) fn check_all_used(&self, is_used: impl Fn(&str) -> bool) -> Result<()> {
        let mut unused = self
            .weights
            .keys()
            .filter(|name| !is_used(name) && !is_buffer(name) && self.contains(name));
        if let Some(first) = unused.next() {
            let others = match unused.count() {
                0 => String::new(),
                count => format!(" and {count} more"),
            };
            bail!(
                "checkpoint: {first}: expected only weights that the model of config.json has, got \
                 this{others}: without them it would compute something else"
            )
        }
        Ok(())
    }
}

pub(super) fn check_shape(name: &str, expected: &Shape, got: &[usize]) -> Result<()> {
    if expected.dims() != got {
        bail!(
            "checkpoint: {name}: expected shape {expected:?}, got {got:?}: does config.json belong \
             to these weights?"
        )
    }
    Ok(())
}

fn read(dir: &Path, name: &str) -> Result<BufferedSafetensors> {
    let path = dir.join(name);
    let read = || BufferedSafetensors::new(std::fs::read(&path)?);
    match read() {
        Ok(file) => Ok(file),
        Err(error) => bail!(
            "checkpoint: {}: expected a safetensors file as Hugging Face publishes it: {error}",
            path.display()
        ),
    }
}

type WeightMap = BTreeMap<String, String>;

const INDEX: &str = "model.safetensors.index.json";

/// The names of the files that hold a checkpoint's weights, and which of several holds which. One
/// file goes before several, as for Hugging Face: a model saved beside the published files is the one
/// that loads.
fn listed(dir: &Path) -> Result<(Vec<String>, Option<WeightMap>)> {
    let (one, index) = ("model.safetensors", dir.join(INDEX));
    if dir.join(one).exists() || !index.exists() {
        return Ok((vec![one.to_string()], None));
    }
    /// The part of the index that is read.
    #[derive(Deserialize)]
    struct Index {
        weight_map: WeightMap,
    }
    match serde_json::from_str::<Index>(&read_text(&index)?) {
        Ok(Index { weight_map }) => {
            let names: BTreeSet<_> = weight_map.values().cloned().collect();
            Ok((names.into_iter().collect(), Some(weight_map)))
        }
        Err(error) => bail!("checkpoint: {}: {error}: download it again", index.display()),
    }
}

/// The file of each weight, by the index, with which the files have to agree: Hugging Face reads
/// whatever they hold.
fn routed(
    files: &[BufferedSafetensors],
    names: &[String],
    weight_map: WeightMap,
) -> Result<BTreeMap<String, usize>> {
    let mut weights = BTreeMap::new();
    for (file, name) in files.iter().zip(names) {
        for (weight, _) in file.tensors() {
            match weight_map.get(&weight) {
                Some(mapped) if mapped == name => {}
                Some(mapped) => bail!(
                    "checkpoint: {weight}: expected it in {mapped} alone, as {INDEX} says, got it in \
                     {name} too: download both again"
                ),
                None if is_buffer(&weight) => {}
                None => bail!(
                    "checkpoint: {weight}: expected a place in {INDEX}, got none, and the weight in \
                     {name}: download both again"
                ),
            }
        }
    }
    for (weight, mapped) in weight_map {
        match names.iter().position(|name| *name == mapped) {
            Some(file) if files[file].get(&weight).is_ok() => weights.insert(weight, file),
            _ => bail!(
                "checkpoint: {weight}: expected it in {mapped}, as {INDEX} says, got a file without \
                 it: download both again"
            ),
        };
    }
    Ok(weights)
}
