//! Weights as Hugging Face publishes them: a folder with `model.safetensors`.

mod checkpoint;

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};

use super::lock;
use checkpoint::{Checkpoint, check_shape};

/// A [`VarBuilder`] that takes weights from a checkpoint's folder and makes each one that is asked
/// for a trainable variable of `vars`: for fine-tuning.
///
/// The folder holds `model.safetensors`, or several files and `model.safetensors.index.json`, as
/// Hugging Face publishes them; one file goes before several. What no model asks for, like GPT-2's
/// `attn.bias`, is not converted and becomes no variable: [`check_pretrained_vars`] tells buffers from
/// weights that the model lacks. `vars.save` writes a file of the same names.
///
/// # Errors
/// A file is missing or no safetensors file, or several do not hold what their index says, each weight
/// once. `get` fails if the checkpoint lacks a weight or holds one of another shape, or of a dtype other
/// than f32, f64, f16 and bf16: nothing is initialised at random, and no quantised weight is read.
///
/// # Example
/// ```no_run
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Result};
/// use candle_dropout::training::{AdamW, Optimizer};
/// use candle_dropout::{MaskGenerator, Transformer, TransformerConfig, check_pretrained_vars, pretrained_var_builder};
/// use candle_nn::VarMap;
///
/// # fn main() -> Result<()> {
/// let dir = "models/gpt2";
/// let config = TransformerConfig::from_pretrained(dir)?.with_dropout(0.2);
/// let vars = VarMap::new();
/// let vb = pretrained_var_builder(&vars, dir, DType::F32, &Device::Cpu)?;
/// let model = Transformer::new(&config, Arc::new(MaskGenerator::new(1)), vb)?;
/// check_pretrained_vars(&vars, dir)?;
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

/// Refuses a checkpoint with weights that are not among `vars`: made for a model from
/// [`pretrained_var_builder`], they hold all that the model has, and what they lack (a bias, a norm,
/// a scale, further layers) it would compute without.
///
/// Buffers that follow from the configuration (GPT-2's `attn.bias`, rotary frequencies,
/// `position_ids`) and a head that repeats the embedding are passed over.
/// [`Transformer::from_pretrained`](crate::Transformer::from_pretrained) checks this itself.
///
/// # Errors
/// There is such a weight: the first is named. Or the files cannot be read; see
/// [`pretrained_var_builder`].
pub fn check_pretrained_vars(vars: &VarMap, dir: impl AsRef<Path>) -> Result<()> {
    let checkpoint = Checkpoint::open(dir.as_ref())?;
    let vars = lock(vars, "checkpoint")?;
    checkpoint.check_all_used(|name| vars.contains_key(name))
}

/// A model whose weights are constants from a checkpoint's folder, every one of which it uses.
///
/// # Errors
/// Those of [`pretrained_var_builder`], [`check_pretrained_vars`] and `build`.
pub(crate) fn from_checkpoint<T>(
    dir: impl AsRef<Path>,
    dtype: DType,
    device: &Device,
    build: impl FnOnce(VarBuilder) -> Result<T>,
) -> Result<T> {
    let checkpoint = Arc::new(Checkpoint::open(dir.as_ref())?);
    let backend = Box::new(Constants(checkpoint.clone()));
    let model = build(VarBuilder::from_backend(backend, dtype, device.clone()))?;
    checkpoint.check_all_asked()?;
    Ok(model)
}

/// The text of a file of a checkpoint's folder.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) => bail!("checkpoint: {}: expected a text file: {error}", path.display()),
    }
}

/// Turns what is asked for into constants.
struct Constants(Arc<Checkpoint>);

impl SimpleBackend for Constants {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        self.0.load(&shape, name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.0.load_any(name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains(name)
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
        _init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let load = || self.checkpoint.load(&shape, name, dtype, device);
        let tensor = self.var(name, load)?;
        check_shape(name, &shape, tensor.dims())?;
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.var(name, || self.checkpoint.load_any(name, dtype, device))
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.checkpoint.contains(name)
    }
}
