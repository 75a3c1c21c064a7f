//! The files of an edited checkpoint, from its line of data: what `checkpoint.py` writes.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Result;
use half::{bf16, f16};
use serde::Deserialize;
use serde_json::{Map, Value, json};

const ONE_FILE: &str = "model.safetensors";

/// A checkpoint as `save_pretrained` writes it.
#[derive(Deserialize)]
pub struct Base {
    pub family: String,
    pub config: Map<String, Value>,
    pub tensors: Vec<(String, Vec<usize>)>,
    pub ids: Vec<u32>,
}

/// What makes an edited checkpoint of a base; the fields are those of `Change` in `checkpoint.py`.
#[derive(Deserialize)]
#[serde(default)]
pub struct Change {
    config: BTreeMap<String, Option<String>>,
    config_text: Option<String>,
    dtype: String,
    prefix: (String, String),
    shards: usize,
    tensors: BTreeMap<String, Option<Other>>,
    also: Vec<Tensor>,
    weight_map: BTreeMap<String, Option<String>>,
    index_text: Option<String>,
    lost: Vec<String>,
}

impl Default for Change {
    fn default() -> Self {
        Self {
            config: BTreeMap::new(),
            config_text: None,
            dtype: "F32".into(),
            prefix: Default::default(),
            shards: 0,
            tensors: BTreeMap::new(),
            also: Vec::new(),
            weight_map: BTreeMap::new(),
            index_text: None,
            lost: Vec::new(),
        }
    }
}

/// What a tensor has that the one of the base does not have.
#[derive(Deserialize, Default, Clone)]
struct Other {
    name: Option<String>,
    dtype: Option<String>,
    shape: Option<Vec<usize>>,
    key: Option<String>,
}

#[derive(Deserialize, Clone)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    key: String,
    file: String,
}

fn shard(at: usize, shards: usize) -> String {
    match shards {
        0 => ONE_FILE.into(),
        shards => format!("model-{:05}-of-{shards:05}.safetensors", at + 1),
    }
}

/// The tensors of all files, in the order in which they are written.
fn tensors(base: &Base, change: &Change) -> Vec<Tensor> {
    let (begin, instead) = &change.prefix;
    let of_base = |(at, (name, shape)): (usize, &(String, Vec<usize>))| {
        let other = change.tensors.get(name).cloned().unwrap_or_else(|| Some(Other::default()))?;
        let renamed = match name.strip_prefix(begin.as_str()) {
            Some(rest) => format!("{instead}{rest}"),
            None => name.clone(),
        };
        Some(Tensor {
            name: other.name.unwrap_or(renamed),
            dtype: other.dtype.unwrap_or(change.dtype.clone()),
            shape: other.shape.unwrap_or(shape.clone()),
            key: other.key.unwrap_or(name.clone()),
            file: shard(at % change.shards.max(1), change.shards),
        })
    };
    base.tensors.iter().enumerate().filter_map(of_base).chain(change.also.iter().cloned()).collect()
}

fn config_text(base: &Base, change: &Change) -> String {
    if let Some(text) = &change.config_text {
        return text.clone();
    }
    let mut fields: BTreeMap<String, Option<String>> =
        base.config.iter().map(|(name, value)| (name.clone(), Some(value.to_string()))).collect();
    fields.extend(change.config.clone());
    let fields: Vec<String> = fields
        .into_iter()
        .filter_map(|(name, text)| Some(format!("{}: {}", json!(name), text?)))
        .collect();
    format!("{{{}}}", fields.join(", "))
}

/// Writes the files into an empty folder.
pub fn write(dir: &Path, base: &Base, change: &Change) -> Result<()> {
    std::fs::write(dir.join("config.json"), config_text(base, change))?;
    let tensors = tensors(base, change);
    let mut files: BTreeMap<&str, Vec<&Tensor>> = BTreeMap::new();
    for tensor in &tensors {
        files.entry(&tensor.file).or_default().push(tensor);
    }
    for (name, inside) in files {
        if !change.lost.iter().any(|lost| lost == name) {
            std::fs::write(dir.join(name), safetensors(&inside))?;
        }
    }
    if change.shards > 0 {
        let held = tensors.iter().map(|tensor| (tensor.name.clone(), Some(tensor.file.clone())));
        let mut weight_map: BTreeMap<String, Option<String>> = held.collect();
        weight_map.extend(change.weight_map.clone());
        weight_map.retain(|_, file| file.is_some());
        let text = json!({ "metadata": {}, "weight_map": weight_map }).to_string();
        let text = change.index_text.clone().unwrap_or(text);
        std::fs::write(dir.join("model.safetensors.index.json"), text)?;
    }
    Ok(())
}

/// The bytes of a file; of a name that stands in it twice, the first.
fn safetensors(inside: &[&Tensor]) -> Vec<u8> {
    let mut header = Map::from_iter([("__metadata__".into(), json!({ "format": "pt" }))]);
    let mut data = Vec::new();
    for tensor in inside {
        if header.contains_key(&tensor.name) {
            continue;
        }
        let begin = data.len();
        encode(tensor, &mut data);
        let Tensor { name, dtype, shape, .. } = tensor;
        let offsets = [begin, data.len()];
        let value = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
        header.insert(name.clone(), value);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let len = (header.len() as u64).to_le_bytes();
    [&len[..], &header, &data].concat()
}

/// 64 random bits for each element: SplitMix64, begun at the FNV-1a hash of the key.
fn draws(key: &str) -> impl Iterator<Item = u64> {
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100000001b3);
    let begin = key.bytes().fold(0xcbf29ce484222325, hash);
    (1u64..).map(move |at| {
        let z = begin.wrapping_add(at.wrapping_mul(0x9e3779b97f4a7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
        z ^ (z >> 31)
    })
}

/// Appends the bytes of a tensor.
fn encode(tensor: &Tensor, data: &mut Vec<u8>) {
    let count = tensor.shape.iter().product();
    let embedding = ["wte", "wpe", "embed_tokens"].iter().any(|part| tensor.key.contains(part));
    for bits in draws(&tensor.key).take(count) {
        let x = (2. * (bits >> 57) as f64 - 127.) / 256. / if embedding { 32. } else { 1. };
        let small = (bits >> 61) as u8;
        match tensor.dtype.as_str() {
            "F64" => data.extend(x.to_le_bytes()),
            "F32" => data.extend((x as f32).to_le_bytes()),
            "F16" => data.extend(f16::from_f64(x).to_le_bytes()),
            "BF16" => data.extend(bf16::from_f64(x).to_le_bytes()),
            "F8_E4M3" | "F8_E5M2" => data.push((bits >> 56) as u8 & 0x9f | 0x20),
            "U8" | "I8" | "BOOL" => data.push(small & 1),
            "I64" => data.extend(i64::from(small).to_le_bytes()),
            "I32" => data.extend(i32::from(small).to_le_bytes()),
            other => panic!("{other}: no dtype of the data"),
        }
    }
}
