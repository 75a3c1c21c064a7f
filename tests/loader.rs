//! Checkpoints that are not as they should be, or not as usual: each computes what Hugging Face's code
//! computes with it, or is refused by name. They are edits of those in `tests/golden/`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Result, Tensor, safetensors};
use candle_dropout::{
    MaskGenerator, Transformer, TransformerConfig, check_pretrained_vars, pretrained_var_builder,
};
use candle_nn::VarMap;
use serde_json::{Value, json};

const CHECKPOINTS: [&str; 7] =
    ["gpt2", "gpt2_bare", "llama", "llama3", "mistral", "qwen2_bare", "qwen3"];

/// A folder for a checkpoint, gone with its owner.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left behind in the folder of temporary files is no failure.
        std::fs::remove_dir_all(&self.0).ok();
    }
}

type Weights = HashMap<String, Tensor>;

fn golden(checkpoint: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(checkpoint)
}

fn config(checkpoint: &str) -> Value {
    let text = std::fs::read_to_string(golden(checkpoint).join("config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn weights(checkpoint: &str) -> Weights {
    safetensors::load(golden(checkpoint).join("model.safetensors"), &Device::Cpu).unwrap()
}

fn write(config: &Value, weights: &Weights) -> Folder {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let (process, next) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let dir = std::env::temp_dir().join(format!("candle-dropout-loader-{process}-{next}"));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    safetensors::save(weights, dir.join("model.safetensors")).unwrap();
    Folder(dir)
}

fn ids() -> Tensor {
    Tensor::new(&[[5u32, 3, 8, 1, 20, 7, 7, 2]], &Device::Cpu).unwrap()
}

fn load(folder: &Folder) -> Result<Vec<f32>> {
    let model = Transformer::from_pretrained(&folder.0, DType::F32, &Device::Cpu)?;
    model.forward(&ids(), false)?.flatten_all()?.to_vec1()
}

/// The names of the variables of a model to be trained on, once none of the checkpoint's is left out.
fn trainable(folder: &Folder) -> Result<Vec<String>> {
    let vars = VarMap::new();
    let vb = pretrained_var_builder(&vars, &folder.0, DType::F32, &Device::Cpu)?;
    let config = TransformerConfig::from_pretrained(&folder.0)?;
    Transformer::new(&config, Arc::new(MaskGenerator::new(1)), vb)?;
    check_pretrained_vars(&vars, &folder.0)?;
    let names = vars.data().lock().unwrap().keys().cloned().collect();
    Ok(names)
}

#[track_caller]
fn refused(folder: &Folder, expected: &str) {
    for error in [load(folder).err(), trainable(folder).err()] {
        let error = error.unwrap_or_else(|| panic!("not refused: {expected}")).to_string();
        assert!(error.contains(expected), "{expected:?} is missing from: {error}");
    }
}

/// A matrix of each checkpoint, and the norm before its head.
fn some_names(checkpoint: &str) -> [&'static str; 2] {
    match checkpoint {
        "gpt2" => ["transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.weight"],
        "gpt2_bare" => ["h.0.mlp.c_fc.weight", "ln_f.weight"],
        "qwen2_bare" => ["layers.0.mlp.up_proj.weight", "norm.weight"],
        _ => ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"],
    }
}

#[test]
fn quantised_weights_are_refused() {
    for checkpoint in CHECKPOINTS {
        let [matrix, _] = some_names(checkpoint);
        for dtype in [DType::U8, DType::U32, DType::I64, DType::F8E4M3] {
            let mut weights = weights(checkpoint);
            let quantised = weights[matrix].to_dtype(dtype).unwrap();
            weights.insert(matrix.to_string(), quantised);
            let expected =
                format!("checkpoint: {matrix}: expected dtype f32, f64, f16 or bf16, got");
            refused(&write(&config(checkpoint), &weights), &expected);
        }
        let mut config = config(checkpoint);
        config["quantization_config"] = json!({ "quant_method": "fp8" });
        let expected = "config.json: quantization_config: expected none, got quantised weights";
        refused(&write(&config, &weights(checkpoint)), expected);
    }
}

#[test]
fn weights_of_every_float_dtype_are_read() -> Result<()> {
    for checkpoint in CHECKPOINTS {
        for dtype in [DType::F16, DType::BF16, DType::F64] {
            let rounded = |x: &Tensor| x.to_dtype(dtype);
            let stored: Result<Weights> = weights(checkpoint)
                .iter()
                .map(|(name, x)| Ok((name.clone(), rounded(x)?)))
                .collect();
            let back: Result<Weights> = stored
                .as_ref()
                .unwrap()
                .iter()
                .map(|(name, x)| Ok((name.clone(), x.to_dtype(DType::F32)?)))
                .collect();
            let config = config(checkpoint);
            assert_eq!(load(&write(&config, &stored?))?, load(&write(&config, &back?))?);
        }
    }
    Ok(())
}

/// The name of the embedding, where it is the head too.
fn tied() -> [(&'static str, &'static str); 4] {
    [
        ("gpt2", "transformer.wte.weight"),
        ("gpt2_bare", "wte.weight"),
        ("llama3", "model.embed_tokens.weight"),
        ("qwen2_bare", "embed_tokens.weight"),
    ]
}

#[test]
fn a_tied_head_is_that_of_the_file() -> Result<()> {
    const HEAD: &str = "lm_head.weight";
    for (checkpoint, tokens) in tied() {
        let (config, mut weights) = (config(checkpoint), weights(checkpoint));
        let plain = write(&config, &weights);
        let (expected, mut names) = (load(&plain)?, trainable(&plain)?);
        names.sort();
        let of = |folder: &Folder| -> Result<Vec<String>> {
            let mut names = trainable(folder)?;
            names.sort();
            Ok(names)
        };

        // The same values once more: no weight of its own.
        weights.insert(HEAD.to_string(), weights[tokens].clone());
        let folder = write(&config, &weights);
        assert_eq!(load(&folder)?, expected);
        assert_eq!(of(&folder)?, names);

        // Alone, it is the embedding.
        let embedding = weights.remove(tokens).unwrap();
        let folder = write(&config, &weights);
        assert_eq!(load(&folder)?, expected);
        let mut renamed: Vec<String> = names
            .iter()
            .map(|name| if name == tokens { HEAD.into() } else { name.clone() })
            .collect();
        renamed.sort();
        assert_eq!(of(&folder)?, renamed);

        // Other values: a head of its own, as if nothing tied the two.
        weights.insert(tokens.to_string(), embedding.clone());
        weights.insert(HEAD.to_string(), (embedding * 1.5)?);
        let folder = write(&config, &weights);
        let mut untied = config.clone();
        untied["tie_word_embeddings"] = json!(false);
        let logits = load(&folder)?;
        assert_eq!(logits, load(&write(&untied, &weights))?);
        assert_ne!(logits, expected);
        for (ours, tied) in logits.iter().zip(&expected) {
            assert!((ours - 1.5 * tied).abs() < 1e-5 * (1. + tied.abs()));
        }
        let mut both = names.clone();
        both.push(HEAD.into());
        both.sort();
        assert_eq!(of(&folder)?, both);

        // Neither, or not tied and no head.
        weights.remove(HEAD);
        refused(
            &write(&untied, &weights),
            "checkpoint: lm_head.weight: expected this weight, got none",
        );
        weights.remove(tokens);
        let expected = format!("checkpoint: {tokens}: expected this weight, got none");
        refused(&write(&config, &weights), &expected);
    }
    Ok(())
}

#[test]
fn the_body_of_a_model_loads_without_its_prefix() -> Result<()> {
    for (checkpoint, prefix) in
        [("gpt2", "transformer."), ("llama3", "model."), ("qwen3", "model.")]
    {
        let expected = load(&write(&config(checkpoint), &weights(checkpoint)))?;
        let strip = |name: String| name.strip_prefix(prefix).map_or(name.clone(), str::to_string);
        let mut bare: Weights =
            weights(checkpoint).into_iter().map(|(name, x)| (strip(name), x)).collect();
        assert_eq!(load(&write(&config(checkpoint), &bare))?, expected, "{checkpoint}");
        if bare.remove("lm_head.weight").is_some() {
            let expected = "checkpoint: lm_head.weight: expected this weight, got none";
            refused(&write(&config(checkpoint), &bare), expected);
        }
    }
    Ok(())
}

#[test]
fn weights_that_the_model_lacks_are_refused_and_buffers_are_not() -> Result<()> {
    let vector = Tensor::ones(16, DType::F32, &Device::Cpu)?;
    for (checkpoint, names) in [
        ("gpt2", ["transformer.h.2.ln_1.weight", "transformer.h.0.attn.c_attn.weight_scale"]),
        ("gpt2", ["lm_head.bias", "wte.weight"]),
        ("gpt2_bare", ["h.0.crossattention.c_proj.bias", "transformer.h.0.ln_1.weight"]),
        ("llama", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.bias"]),
        ("llama", ["model.layers.1.self_attn.q_norm.weight", "embed_tokens.weight"]),
        ("mistral", ["model.layers.0.mlp.up_proj.bias", "score.weight"]),
        ("qwen2_bare", ["layers.0.self_attn.o_proj.bias", "layers.2.input_layernorm.weight"]),
        ("qwen3", ["model.layers.0.self_attn.q_proj.weight_scale_inv", "model.norm.bias"]),
    ] {
        for name in names {
            let mut weights = weights(checkpoint);
            weights.insert(name.to_string(), vector.clone());
            let expected = format!("checkpoint: {name}: expected only weights that the model of");
            refused(&write(&config(checkpoint), &weights), &expected);
        }
    }
    let buffer = vector.to_dtype(DType::I64)?;
    for (checkpoint, names) in [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("gpt2_bare", ["position_ids", "h.0.attn.bias"]),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.position_ids"]),
        ("qwen2_bare", ["rotary_emb.inv_freq", "layers.0.self_attn.rotary_emb.inv_freq"]),
    ] {
        let mut weights = weights(checkpoint);
        let plain = write(&config(checkpoint), &weights);
        weights.extend(names.map(|name| (name.to_string(), buffer.clone())));
        let folder = write(&config(checkpoint), &weights);
        assert_eq!(load(&folder)?, load(&plain)?);
        assert_eq!(trainable(&folder)?.len(), trainable(&plain)?.len());
    }
    Ok(())
}

/// Writes the weights into two files and an index that says which holds which; the edit sees the
/// files, and the map.
fn sharded(checkpoint: &str, edit: impl FnOnce(&mut [Weights; 2], &mut Value)) -> Folder {
    let folder = write(&config(checkpoint), &HashMap::new());
    std::fs::remove_file(folder.0.join("model.safetensors")).unwrap();
    let mut shards = [HashMap::new(), HashMap::new()];
    let mut map = json!({});
    let mut weights: Vec<_> = weights(checkpoint).into_iter().collect();
    weights.sort_by(|a, b| a.0.cmp(&b.0));
    for (at, (name, tensor)) in weights.into_iter().enumerate() {
        map[&name] = json!(format!("{}.safetensors", at % 2));
        shards[at % 2].insert(name, tensor);
    }
    edit(&mut shards, &mut map);
    for (at, shard) in shards.iter().enumerate() {
        safetensors::save(shard, folder.0.join(format!("{at}.safetensors"))).unwrap();
    }
    let index = json!({ "metadata": {}, "weight_map": map });
    std::fs::write(folder.0.join("model.safetensors.index.json"), index.to_string()).unwrap();
    folder
}

#[test]
fn several_files_hold_what_their_index_says() -> Result<()> {
    for checkpoint in CHECKPOINTS {
        let plain = write(&config(checkpoint), &weights(checkpoint));
        assert_eq!(load(&sharded(checkpoint, |_, _| {}))?, load(&plain)?);
        let [_, norm] = some_names(checkpoint);
        let other = |map: &Value| usize::from(map[norm] == "0.safetensors");
        let twice = sharded(checkpoint, |shards, map| {
            let (at, own) = (other(map), 1 - other(map));
            let scaled = (&shards[own][norm] * 2.).unwrap();
            shards[at].insert(norm.into(), scaled);
        });
        refused(&twice, &format!("checkpoint: {norm}: expected it in"));
        let unlisted = sharded(checkpoint, |_, map| {
            map.as_object_mut().unwrap().remove(norm);
        });
        refused(
            &unlisted,
            &format!("checkpoint: {norm}: expected a place in model.safetensors.index"),
        );
        let elsewhere = sharded(checkpoint, |_, map| {
            map[norm] = json!(format!("{}.safetensors", other(map)));
        });
        refused(&elsewhere, &format!("checkpoint: {norm}: expected it in"));
        let gone = sharded(checkpoint, |shards, map| {
            let own = 1 - other(map);
            shards[own].remove(norm);
        });
        refused(&gone, &format!("checkpoint: {norm}: expected it in"));
        let no_file = sharded(checkpoint, |_, map| {
            map["more"] = json!("2.safetensors");
        });
        refused(&no_file, "2.safetensors: expected a safetensors file");
        let buffer = sharded(checkpoint, |shards, _| {
            shards[0].insert("position_ids".into(), Tensor::new(&[0i64], &Device::Cpu).unwrap());
        });
        assert_eq!(load(&buffer)?, load(&plain)?);
    }
    Ok(())
}

/// None is too large to be told apart from the weights, and none is allocated.
#[test]
fn sizes_are_checked_against_the_weights() -> Result<()> {
    let fields = [
        "vocab_size",
        "max_position_embeddings",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "n_inner",
    ];
    for checkpoint in CHECKPOINTS {
        let (config, weights) = (config(checkpoint), weights(checkpoint));
        let expected = load(&write(&config, &weights))?;
        for field in fields {
            for size in [0, 1_000_000_000, 1 << 40, 1 << 60, 1 << 62, 1 << 63, u64::MAX] {
                let mut config = config.clone();
                config[field] = json!(size);
                let what = format!("{checkpoint} with {field} = {size}");
                let is_gpt2 = checkpoint.starts_with("gpt2");
                // GPT-2 has no such field, and rotary positions have no weights; a window that nothing
                // fills, and a text that is longer than the limit, are no misfit.
                let is_ignored = is_gpt2
                    && ["intermediate_size", "num_key_value_heads", "head_dim"].contains(&field)
                    || !is_gpt2 && field == "n_inner";
                let is_limit = !is_gpt2 && field == "max_position_embeddings" && size > 0;
                match load(&write(&config, &weights)) {
                    Ok(logits) => {
                        assert!(is_ignored || is_limit, "{what}: not refused");
                        assert_eq!(logits, expected, "{what}");
                    }
                    Err(error) => {
                        let error = error.to_string();
                        assert!(!is_ignored && !is_limit, "{what}: {error}");
                        let named = ["checkpoint: ", "transformer: ", "config.json: "];
                        assert!(
                            named.iter().any(|name| error.starts_with(name)),
                            "{what}: {error}"
                        );
                    }
                }
            }
        }
    }
    Ok(())
}
