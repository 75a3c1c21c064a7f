//! Weights as Hugging Face publishes them: a folder of `config.json` and `model.safetensors`.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail, safetensors};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use serde::Deserialize;

use super::{Transformer, TransformerConfig};
use crate::mask::MaskGenerator;

impl TransformerConfig {
    /// Reads `config.json` of a checkpoint's folder.
    ///
    /// # Errors
    /// The file cannot be read, or see [`from_hf_config`](Self::from_hf_config).
    pub fn from_pretrained(dir: impl AsRef<Path>) -> Result<Self> {
        Self::from_hf_config(&read(&dir.as_ref().join("config.json"))?)
    }
}

impl Transformer {
    /// A published model, for use: its weights are constants. To train it on, see
    /// [`pretrained_var_builder`].
    ///
    /// # Errors
    /// Those of [`TransformerConfig::from_pretrained`] and [`pretrained_var_builder`], and of
    /// [`new`](Self::new): the file lacks a weight, or holds one of another shape.
    pub fn from_pretrained(dir: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        let config = TransformerConfig::from_pretrained(&dir)?;
        let vb = VarBuilder::from_tensors(tensors(dir.as_ref())?, dtype, device);
        Self::new(&config, Arc::new(MaskGenerator::new(0)), vb)
    }
}

/// A [`VarBuilder`] that takes weights from a checkpoint's folder and makes each one that is asked
/// for a trainable variable of `vars`: for fine-tuning.
///
/// The folder holds `model.safetensors`, or several files and `model.safetensors.index.json`, as
/// Hugging Face publishes them. Buffers that no model asks for, like GPT-2's `attn.bias`, become no
/// variables. `vars.save` writes a file of the same names.
///
/// # Errors
/// A file is missing or no safetensors file. `get` fails if the checkpoint lacks a weight or holds one
/// of another shape: nothing is initialised at random.
///
/// # Example
/// ```no_run
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Result};
/// use candle_dropout::{MaskGenerator, Transformer, TransformerConfig, pretrained_var_builder};
/// use candle_nn::{AdamW, Optimizer, VarMap};
///
/// # fn main() -> Result<()> {
/// let dir = "models/gpt2";
/// let config = TransformerConfig::from_pretrained(dir)?.with_dropout(0.2);
/// let vars = VarMap::new();
/// let vb = pretrained_var_builder(&vars, dir, DType::F32, &Device::Cpu)?;
/// let model = Transformer::new(&config, Arc::new(MaskGenerator::new(1)), vb)?;
/// let adamw = AdamW::new_lr(vars.all_vars(), 1e-5)?;
/// # Ok(()) }
/// ```
pub fn pretrained_var_builder(
    vars: &VarMap,
    dir: impl AsRef<Path>,
    dtype: DType,
    device: &Device,
) -> Result<VarBuilder<'static>> {
    let backend = PretrainedVars { vars: vars.clone(), tensors: tensors(dir.as_ref())? };
    Ok(VarBuilder::from_backend(Box::new(backend), dtype, device.clone()))
}

fn read(path: &Path) -> Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) => bail!("checkpoint: {}: expected a text file: {error}", path.display()),
    }
}

/// Every tensor of a checkpoint, on the host and in the dtype of its file.
fn tensors(dir: &Path) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    for file in files(dir)? {
        let path = dir.join(file);
        match safetensors::load(&path, &Device::Cpu) {
            Ok(part) => tensors.extend(part),
            Err(error) => bail!(
                "checkpoint: {}: expected a safetensors file as Hugging Face publishes it: {error}",
                path.display()
            ),
        }
    }
    Ok(tensors)
}

/// The names of the files that hold a checkpoint's weights.
fn files(dir: &Path) -> Result<BTreeSet<String>> {
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(BTreeSet::from(["model.safetensors".to_string()]));
    }
    /// The part of the index that is read.
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    match serde_json::from_str::<Index>(&read(&index)?) {
        Ok(index) => Ok(index.weight_map.into_values().collect()),
        Err(error) => bail!("checkpoint: {}: {error}: download it again", index.display()),
    }
}

/// Turns what is asked for into variables.
struct PretrainedVars {
    vars: VarMap,
    tensors: HashMap<String, Tensor>,
}

impl SimpleBackend for PretrainedVars {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() != &shape {
            bail!(
                "checkpoint: {name}: expected shape {shape:?}, got {:?}: does config.json belong to \
                 these weights?",
                tensor.shape()
            )
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let Ok(mut vars) = self.vars.data().lock() else {
            bail!("checkpoint: the variable map is poisoned: a thread panicked while it held it")
        };
        if let Some(var) = vars.get(name) {
            return Ok(var.as_tensor().clone());
        }
        let Some(tensor) = self.tensors.get(name) else {
            bail!(
                "checkpoint: {name}: expected this weight, got none: does config.json belong to \
                 these weights?"
            )
        };
        let var = Var::from_tensor(&tensor.to_dtype(dtype)?.to_device(device)?)?;
        Ok(vars.entry(name.to_string()).or_insert(var).as_tensor().clone())
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}
