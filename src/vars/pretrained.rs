//! Weights as Hugging Face publishes them: a folder with `model.safetensors`.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use serde::Deserialize;

use super::lock;

/// A [`VarBuilder`] that takes weights from a checkpoint's folder and makes each one that is asked
/// for a trainable variable of `vars`: for fine-tuning.
///
/// The folder holds `model.safetensors`, or several files and `model.safetensors.index.json`, as
/// Hugging Face publishes them; one file goes before several. Buffers that no model asks for, like
/// GPT-2's `attn.bias`, are not converted and become no variables. `vars.save` writes a file of the
/// same names.
///
/// # Errors
/// A file is missing or no safetensors file. `get` fails if the checkpoint lacks a weight or holds
/// one of another shape: nothing is initialised at random.
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
    let backend =
        PretrainedVars { vars: vars.clone(), checkpoint: Checkpoint::open(dir.as_ref())? };
    Ok(VarBuilder::from_backend(Box::new(backend), dtype, device.clone()))
}

/// A [`VarBuilder`] that takes weights from a checkpoint's folder as constants: for use.
///
/// # Errors
/// Those of [`pretrained_var_builder`].
pub(crate) fn checkpoint_var_builder(
    dir: impl AsRef<Path>,
    dtype: DType,
    device: &Device,
) -> Result<VarBuilder<'static>> {
    let checkpoint = Checkpoint::open(dir.as_ref())?;
    Ok(VarBuilder::from_backend(Box::new(checkpoint), dtype, device.clone()))
}

/// The text of a file of a checkpoint's folder.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) => bail!("checkpoint: {}: expected a text file: {error}", path.display()),
    }
}

/// The weights of a checkpoint as the bytes of its files: a tensor is made of one that is asked
/// for, so that buffers of dtypes that candle does not have stand in nobody's way.
struct Checkpoint(Vec<BufferedSafetensors>);

impl Checkpoint {
    fn open(dir: &Path) -> Result<Self> {
        let open = |file: String| -> Result<BufferedSafetensors> {
            let path = dir.join(file);
            let read = || BufferedSafetensors::new(std::fs::read(&path)?);
            match read() {
                Ok(file) => Ok(file),
                Err(error) => bail!(
                    "checkpoint: {}: expected a safetensors file as Hugging Face publishes it: \
                     {error}",
                    path.display()
                ),
            }
        };
        Ok(Self(files(dir)?.into_iter().map(open).collect::<Result<_>>()?))
    }

    /// The file that holds a weight.
    fn file(&self, name: &str) -> Option<&BufferedSafetensors> {
        self.0.iter().find(|file| file.get(name).is_ok())
    }
}

impl SimpleBackend for Checkpoint {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        // The shape first: what does not fit is not converted.
        if let Some(file) = self.file(name) {
            check_shape(name, &shape, file.get(name)?.shape())?;
        }
        self.get_unchecked(name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let Some(file) = self.file(name) else {
            bail!(
                "checkpoint: {name}: expected this weight, got none: does config.json belong to \
                 these weights?"
            )
        };
        match file.load(name, &Device::Cpu) {
            Ok(tensor) => tensor.to_dtype(dtype)?.to_device(device),
            Err(error) => bail!("checkpoint: {name}: expected a dtype of candle's: {error}"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.file(name).is_some()
    }
}

fn check_shape(name: &str, expected: &Shape, got: &[usize]) -> Result<()> {
    if expected.dims() != got {
        bail!(
            "checkpoint: {name}: expected shape {expected:?}, got {got:?}: does config.json belong \
             to these weights?"
        )
    }
    Ok(())
}

/// The names of the files that hold a checkpoint's weights. One file goes before several, as for
/// Hugging Face: a model saved beside the published files is the one that loads.
fn files(dir: &Path) -> Result<BTreeSet<String>> {
    let (one, index) = ("model.safetensors", dir.join("model.safetensors.index.json"));
    if dir.join(one).exists() || !index.exists() {
        return Ok(BTreeSet::from([one.to_string()]));
    }
    /// The part of the index that is read.
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    match serde_json::from_str::<Index>(&read_text(&index)?) {
        Ok(index) => Ok(index.weight_map.into_values().collect()),
        Err(error) => bail!("checkpoint: {}: {error}: download it again", index.display()),
    }
}

/// Turns what is asked for into variables.
struct PretrainedVars {
    vars: VarMap,
    checkpoint: Checkpoint,
}

impl PretrainedVars {
    /// The variable of this name, made by `load` if there is none.
    fn var(&self, name: &str, load: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let mut vars = lock(&self.vars, "checkpoint")?;
        if let Some(var) = vars.get(name) {
            return Ok(var.as_tensor().clone());
        }
        let var = Var::from_tensor(&load()?)?;
        Ok(vars.entry(name.to_string()).or_insert(var).as_tensor().clone())
    }
}

impl SimpleBackend for PretrainedVars {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let load = || self.checkpoint.get(shape.clone(), name, init, dtype, device);
        let tensor = self.var(name, load)?;
        check_shape(name, &shape, tensor.dims())?;
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.var(name, || self.checkpoint.get_unchecked(name, dtype, device))
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.checkpoint.contains_tensor(name)
    }
}
