//! Which variables share a rate and a decay.

use candle_core::{Result, Var};
use candle_nn::VarMap;

use crate::training::{NamedVars, named_vars};

/// Variables by name that share a weight decay and a share of the learning rate.
#[derive(Clone, Debug)]
pub struct ParamGroup {
    /// The variables and their names, under which [`AdamW::state`](super::AdamW::state) keeps what belongs
    /// to them.
    pub vars: Vec<(String, Var)>,
    /// Their weight decay; `None` for that of the optimiser's parameters.
    pub weight_decay: Option<f64>,
    /// What the learning rate is multiplied by for them.
    pub lr_scale: f64,
}

impl ParamGroup {
    /// These variables, with the decay of the optimiser's parameters and its whole learning rate.
    pub fn new(vars: &NamedVars) -> Self {
        let vars = vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
        Self { vars, weight_decay: None, lr_scale: 1. }
    }
}

/// The variables of a map in two groups, each in the order of their names: those that decay, and those
/// that do not.
///
/// A variable decays if it has two dimensions or more, so no bias and no weight of a norm does, and if no
/// part of its name, between full stops, says otherwise: what contains `embed`, or one of the words `wte`, `wpe`,
/// `emb` and `embd` between underscores, is an embedding; what contains `norm` or ends in `bias` is what it
/// says. So an embedding that is also the head of a model does not decay.
///
/// # Errors
/// A thread panicked while it held the map.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Result};
/// use candle_dropout::training::decay_groups;
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// candle_nn::linear(3, 2, vb.pp("head"))?;
/// candle_nn::embedding(5, 3, vb.pp("wte"))?;
/// let groups = decay_groups(&vars)?;
/// let names = |at: usize| groups[at].vars.iter().map(|(name, _)| name.as_str());
/// assert!(names(0).eq(["head.weight"]));
/// assert!(names(1).eq(["head.bias", "wte.weight"]));
/// # Ok(()) }
/// ```
pub fn decay_groups(vars: &VarMap) -> Result<Vec<ParamGroup>> {
    let (decay, stay) =
        named_vars(vars)?.into_iter().partition(|(name, var)| decays(name, var.rank()));
    let group = |vars, weight_decay| ParamGroup { vars, weight_decay, lr_scale: 1. };
    Ok(vec![group(decay, None), group(stay, Some(0.))])
}

fn decays(name: &str, rank: usize) -> bool {
    let says_otherwise = |part: &str| {
        let part = part.to_lowercase();
        // As a word: "ensemble" and "assembly" are none.
        part.split('_').any(|word| ["wte", "wpe", "emb", "embd"].contains(&word))
            || ["embed", "norm"].iter().any(|word| part.contains(word))
            || part.ends_with("bias")
    };
    rank >= 2 && !name.split('.').any(says_otherwise)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_biases_and_embeddings_do_not_decay() {
        for (name, rank, expected) in [
            ("h.0.attn.c_attn.weight", 2, true),
            ("h.0.attn.c_attn.bias", 1, false),
            ("h.0.ln_1.weight", 1, false),
            ("wte.weight", 2, false),
            ("transformer.wpe.weight", 2, false),
            ("model.embed_tokens.weight", 2, false),
            ("bert.embeddings.word_embeddings.weight", 2, false),
            ("tok_emb.weight", 2, false),
            ("pos_emb", 3, false),
            ("Emb.weight", 2, false),
            ("token_embd.weight", 2, false),
            ("decoder_wte.weight", 2, false),
            ("ensemble.0.weight", 2, true),
            ("assembly_head.weight", 2, true),
            ("rewte.weight", 2, true),
            ("model.layers.0.self_attn.q_proj.weight", 2, true),
            ("model.layers.0.input_layernorm.weight", 1, false),
            ("model.layers.0.self_attn.q_norm.weight", 2, false),
            ("lm_head.weight", 2, true),
            ("conv.weight", 4, true),
            ("conv.bias", 3, false),
            ("scale", 0, false),
            ("weight", 2, true),
        ] {
            assert_eq!(decays(name, rank), expected, "{name}, {rank} dimensions");
        }
    }
}
