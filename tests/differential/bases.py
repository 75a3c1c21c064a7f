"""Random tiny checkpoints of the families that the crate reads."""

import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from safetensors import safe_open
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from checkpoint import ONE_FILE, Base

FAMILIES = (
    "gpt2",
    "gpt2_bare",
    "llama",
    "llama_linear",
    "llama_llama3",
    "llama_dynamic",
    "llama_yarn",
    "mistral",
    "qwen2",
    "qwen3",
)


def draw_base(rng: Random, family: str) -> Base:
    if family.startswith("gpt2"):
        model = gpt2(rng, bare=family == "gpt2_bare")
    else:
        model = rotary(rng, family)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        with safe_open(Path(folder) / ONE_FILE, "pt") as file:
            tensors = [(name, file.get_slice(name).get_shape()) for name in sorted(file.keys())]
    if rng.random() < 0.5:
        config = as_before_version_5(config)
    length = rng.randint(7, 11)
    return Base(family, config, tensors, [rng.randrange(config["vocab_size"]) for _ in range(length)])


def gpt2(rng: Random, bare: bool) -> GPT2LMHeadModel | GPT2Model:
    heads = rng.randint(1, 4)
    config = GPT2Config(
        vocab_size=rng.randint(11, 23),
        n_positions=rng.randint(12, 20),
        n_embd=heads * rng.randint(3, 8),
        n_layer=rng.randint(1, 2),
        n_head=heads,
        n_inner=rng.choice([None, rng.randint(5, 24)]),
        activation_function=rng.choice(["gelu_new", "gelu", "relu", "silu"]),
        layer_norm_epsilon=rng.choice([1e-5, 1e-4]),
        tie_word_embeddings=bare or rng.random() < 0.7,
        bos_token_id=0,
        eos_token_id=1,
    )
    return (GPT2Model if bare else GPT2LMHeadModel)(config)


def rotary(rng: Random, family: str):
    heads = rng.choice([1, 2, 3, 4, 6])
    # Dynamic scaling divides by head_dim - 2.
    head_dim = 2 * rng.randint(2 if family == "llama_dynamic" else 1, 4)
    common: dict[str, Any] = dict(
        vocab_size=rng.randint(11, 23),
        hidden_size=heads * rng.randint(3, 6),
        intermediate_size=rng.randint(5, 24),
        num_hidden_layers=rng.randint(1, 2),
        num_attention_heads=heads,
        num_key_value_heads=rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        max_position_embeddings=rng.randint(12, 40),
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-4]),
        tie_word_embeddings=rng.random() < 0.4,
        rope_parameters={"rope_type": "default", "rope_theta": rng.choice([100.0, 10000.0, 500000.0])},
        bos_token_id=0,
        eos_token_id=1,
    )
    match family:
        case "mistral":
            window = rng.choice([None, rng.randint(2, 6), 4096])
            return MistralForCausalLM(MistralConfig(**common, head_dim=head_dim, sliding_window=window))
        case "qwen2":
            # Qwen2's heads share the width; an odd number of columns cannot be rotated.
            common["hidden_size"] = heads * head_dim
            return Qwen2ForCausalLM(Qwen2Config(**common))
        case "qwen3":
            bias = rng.random() < 0.3
            return Qwen3ForCausalLM(Qwen3Config(**common, head_dim=head_dim, attention_bias=bias))
    common["rope_parameters"] |= scaling(rng, family.removeprefix("llama_"), common["max_position_embeddings"])
    biases = dict(attention_bias=rng.random() < 0.3, mlp_bias=rng.random() < 0.3)
    return LlamaForCausalLM(LlamaConfig(**common, **biases, head_dim=head_dim))


def scaling(rng: Random, kind: str, max_positions: int) -> dict[str, Any]:
    factor = rng.choice([2.0, 4.0, 8.0])
    match kind:
        case "linear" | "dynamic":
            return dict(rope_type=kind, factor=factor)
        case "llama3":
            # So short that frequencies lie in each of the three bands.
            bands = dict(low_freq_factor=1.0, high_freq_factor=4.0)
            original = rng.choice([8, 40, max_positions])
            return dict(rope_type=kind, factor=factor, original_max_position_embeddings=original) | bands
        case "yarn":
            original = rng.choice([max(max_positions // 4, 2), max_positions])
            scaling: dict[str, Any] = dict(rope_type=kind, factor=factor, original_max_position_embeddings=original)
            if rng.random() < 0.3:
                scaling |= dict(beta_fast=8.0, beta_slow=2.0)
            if rng.random() < 0.2:
                scaling |= dict(attention_factor=1.25)
            return scaling
    return {}


def as_before_version_5(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as the transformers of most published checkpoints wrote it."""
    config = dict(config)
    config["torch_dtype"] = config.pop("dtype", "float32")
    if rope := config.pop("rope_parameters", None):
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config
