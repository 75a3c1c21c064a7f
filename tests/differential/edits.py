"""Random edits of a checkpoint: fields of its configuration, and its tensors.

An edit changes a `Change` and says what it did: its kind, a sentence, and the names of which an error has to say one.
One text, though long: a list of short functions that do not call one another, and the table of how often each is drawn.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from bases import scaling
from checkpoint import ONE_FILE, OTHER_FILE, Base, Change, Tensor, shard, tensors


@dataclass
class Edit:
    kind: str
    text: str
    names: list[str]
    # Whether it may show in any weight: one that is missing, or of another size.
    anywhere: bool = False
    # Whether what it does changes nothing that a model computes, whatever transformers says to it.
    inert: bool = False
    # Whether a checkpoint with it is an ordinary one, which has to load.
    ordinary: bool = False


# Other names of one size: GPT-2's and those that all models answer to.
GPT2_NAMES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
GPT2_SIZES = ["vocab_size", *GPT2_NAMES, *GPT2_NAMES.values(), "n_inner", "n_ctx"]
ROTARY_SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
]
# Kinds of edits of fields that say which weights there are, and of which sizes.
STRUCTURE = ("size", "flag", "model_type", "enormous")
FLAGS = ["tie_word_embeddings", "is_causal", "is_decoder", "use_bidirectional_attention", "add_cross_attention"]
GPT2_FLAGS = ["scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"]
ROTARY_FLAGS = ["attention_bias", "mlp_bias", "use_sliding_window", "qkv_bias", "use_qk_norm"]
ACTIVATIONS = [
    *("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("gelu_accurate", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6"),
    *("sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "prelu", "xielu", "SiLU", "swiglu", ""),
]
MODEL_TYPES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neo", "phi3", "mixtral", "LLAMA", ""]
# What changes no logits in evaluation, with a value of the wrong kind or out of range as last.
INERT: dict[str, list[Any]] = {
    "bos_token_id": [None, 3, "x"],
    "eos_token_id": [[1, 2], 5, "x"],
    "pad_token_id": [0, None, 10**6],
    "use_cache": [False, "yes"],
    "initializer_range": [0.5, 0.0, -1.0, "small"],
    "transformers_version": ["4.28.1", None, 7],
    "architectures": [None, ["LlamaModel"], ["GPT2ForSequenceClassification"], "Llama"],
    "dtype": ["float16", "bfloat16", None, "float99", 16],
    "torch_dtype": ["float16", "bfloat16", None, "float99"],
    "output_hidden_states": [True, 3],
    "output_attentions": [False, True],
    "return_dict": [False, "no"],
    "chunk_size_feed_forward": [2, -1, None],
    "id2label": [{"0": "a", "1": "b"}, {"x": "a"}],
    "task_specific_params": [{"text-generation": {"max_length": 50}}, 3],
    "is_encoder_decoder": [False, True, None],
    "pretraining_tp": [2, 0, "x"],
    "gradient_checkpointing": [True, None],
    "summary_type": ["first", 1],
    "_name_or_path": ["gpt2", 1],
    "an_unknown_field": [1, None, {"a": [1, 2]}, "x"],
}
RATES = {"gpt2": ["attn_pdrop", "embd_pdrop", "resid_pdrop"], "": ["attention_dropout"]}
HUGE = [2**31 - 1, 2**40, 2**62, 2**63, 2**64 - 1, 2**64, 10**30]


def is_gpt2(base: Base) -> bool:
    return base.family.startswith("gpt2")


def body_of(base: Base) -> str:
    """What the names of a whole model's body begin with."""
    return {"gpt2": "transformer.", "gpt2_bare": ""}.get(base.family, "model.")


def show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def put(base: Base, change: Change, kind: str, name: str, value: Any, raw: bool = False) -> Edit:
    """Sets a field."""
    text = value if raw else json.dumps(value)
    change.config[name] = text
    return Edit(kind, f"{name} = {show(text)}", names_of(name), anywhere=kind.partition(" ")[0] in STRUCTURE)


def names_of(name: str) -> list[str]:
    """The names of a field: GPT-2's, and those that all models answer to."""
    pairs = [pair for pair in GPT2_NAMES.items() if name in pair]
    return list(pairs[0]) if pairs else [name]


def value_of(base: Base, change: Change, name: str) -> Any:
    """A field as the file has it now; None if it is absent or no JSON."""
    text = change.config.get(name)
    try:
        return json.loads(text) if text is not None else base.config.get(name)
    except ValueError:
        return None


def malformed(rng: Random, value: Any) -> tuple[str, Any]:
    """A value of another kind, of none, or out of range."""
    number = value if isinstance(value, (int, float)) else 3
    return rng.choice(
        [
            ("null", None),
            ("wrong type", str(value)),
            ("wrong type", [value]),
            ("wrong type", {}),
            ("wrong type", not bool(value)),
            ("wrong type", float(number)),
            ("wrong type", int(number)),
            ("fraction", number + 0.5),
            ("zero", 0),
            ("negative", -1),
            ("huge", rng.choice(HUGE)),
            ("huge", 1e39),
        ]
    )


def size(rng: Random, base: Base, change: Change) -> Edit | None:
    name = rng.choice(GPT2_SIZES if is_gpt2(base) else ROTARY_SIZES)
    value = value_of(base, change, name)
    if rng.random() < 0.25:
        return missing(base, change, "size missing", name)
    if rng.random() < 0.5:
        kind, other = malformed(rng, value)
        return put(base, change, f"size {kind}", name, other)
    value = value if isinstance(value, int) else rng.randint(1, 24)
    other = rng.choice([value + 1, value - 1, 2 * value, value // 2, 1, 2, 3, value])
    return put(base, change, "size", name, other)


def missing(base: Base, change: Change, kind: str, name: str) -> Edit | None:
    if name not in base.config or change.config.get(name, "") is None:
        return None
    edit = put(base, change, kind, name, None)
    change.config[name] = None
    edit.text = f"{name} is absent"
    return edit


def epsilon(rng: Random, base: Base, change: Change) -> Edit | None:
    name = "layer_norm_epsilon" if is_gpt2(base) else "rms_norm_eps"
    # The name of another family says nothing to this one.
    name = rng.choice([name] * 8 + ["layer_norm_epsilon", "rms_norm_eps", "norm_eps", "layer_norm_eps"])
    if rng.random() < 0.2:
        return missing(base, change, "epsilon missing", name)
    if rng.random() < 0.3:
        value = rng.choice(["NaN", "Infinity", "1e999", "-0.0", "1e-400"])
        edit = put(base, change, "epsilon raw", name, value, raw=True)
        # Which is no JSON.
        edit.names.append("config.json")
        return edit
    if rng.random() < 0.3:
        kind, other = malformed(rng, value_of(base, change, name))
        # As numbers of JSON, 2^64 and 2.0^64 are one; Python tells them apart.
        other = 2**40 if isinstance(other, int) and other >= 2**63 else other
        return put(base, change, f"epsilon {kind}", name, other)
    return put(base, change, "epsilon", name, rng.choice([0.1, 1e-3, 1.0, 1e-12, 0.0, -1e-3, 1]))


def activation(rng: Random, base: Base, change: Change) -> Edit | None:
    name = "activation_function" if is_gpt2(base) else "hidden_act"
    name = rng.choice([name] * 9 + ["activation_function", "hidden_act", "hidden_activation"])
    if rng.random() < 0.1:
        return missing(base, change, "activation missing", name)
    if rng.random() < 0.1:
        kind, other = malformed(rng, value_of(base, change, name))
        return put(base, change, f"activation {kind}", name, other)
    return put(base, change, "activation", name, rng.choice(ACTIVATIONS))


def flag(rng: Random, base: Base, change: Change) -> Edit | None:
    name = rng.choice(FLAGS + (GPT2_FLAGS if is_gpt2(base) else ROTARY_FLAGS))
    if rng.random() < 0.15:
        return missing(base, change, "flag missing", name)
    if rng.random() < 0.2:
        kind, other = malformed(rng, value_of(base, change, name))
        return put(base, change, f"flag {kind}", name, other)
    return put(
        base, change, "flag", name, rng.random() < 0.5 if rng.random() < 0.2 else not value_of(base, change, name)
    )


def window(rng: Random, base: Base, change: Change) -> Edit | None:
    layers = value_of(base, change, "num_hidden_layers")
    layers = layers if isinstance(layers, int) and 0 <= layers < 100 else 1
    kinds = ["full_attention", "sliding_attention", "chunked_attention", "linear_attention", "attention"]
    name, value = rng.choice(
        [
            ("sliding_window", rng.choice([1, 2, 3, 5, 4096, 0, -1, None, "3", 2.0, 2**40])),
            ("sliding_window", rng.randint(1, 6)),
            ("use_sliding_window", True),
            ("max_window_layers", rng.choice([0, 1, 2, -1, None, "1"])),
            ("layer_types", [rng.choice(kinds[:2]) for _ in range(layers)]),
            ("layer_types", rng.choice([None, [], kinds[1], [rng.choice(kinds) for _ in range(rng.randint(1, 3))]])),
            ("attention_chunk_size", rng.choice([2, 4])),
        ]
    )
    edit = put(base, change, "window", name, value)
    # The others are told by `sliding_window` alone.
    edit.inert = name == "layer_types" and base.family not in ("qwen2", "qwen3")
    if name == "sliding_window" and base.family in ("qwen2", "qwen3") and rng.random() < 0.7:
        change.config["use_sliding_window"] = "true"
        change.config["max_window_layers"] = str(rng.choice([0, 0, 1]))
        edit.text += ", used from layer " + change.config["max_window_layers"]
        edit.names += ["use_sliding_window", "max_window_layers", "layer_types"]
        if rng.random() < 0.7:
            change.config["layer_types"] = None
            edit.text += ", without layer_types"
    return edit


def rope_field(rng: Random, base: Base, change: Change) -> Edit | None:
    """A field beside the rope's parameters."""
    name, values = rng.choice(
        [
            ("rope_theta", [50.0, 1e4, 1e6, 100, 0.0, -5.0, None, "1e4", 1e39, 1.0, 0.5]),
            ("partial_rotary_factor", [0.5, 1.0, 0.0, None, 2.0, "1"]),
            ("original_max_position_embeddings", [8, 16, 40, None, 0, "8"]),
            ("rope_type", ["linear", "yarn"]),
            ("rotary_pct", [0.25]),
            ("default_theta", [50.0]),
        ]
    )
    if name in base.config and rng.random() < 0.2:
        return missing(base, change, "rope missing", name)
    edit = put(base, change, "rope field", name, rng.choice(values))
    edit.inert = is_gpt2(base)
    edit.names += ["theta", "rope_parameters", "rope_scaling"]
    return edit


def rope_parameters(rng: Random, base: Base, change: Change) -> Edit | None:
    """A field inside the rope's parameters, or all of them."""
    name = rng.choice(["rope_parameters", "rope_scaling"])
    now = value_of(base, change, name)
    if rng.random() < 0.6:
        name = "rope_parameters" if "rope_parameters" in base.config else "rope_scaling"
        now = value_of(base, change, name)
    rope = dict(now) if isinstance(now, dict) else {}
    what = "whole"
    if rng.random() < 0.15:
        rope = rng.choice([None, {}, [], "linear", 2.0, {"rope_type": None}, {"rope_type": "default"}])
    elif rope and rng.random() < 0.5:
        what = rng.choice(list(rope))
        _, other = malformed(rng, rope[what])
        if what in ("rope_type", "type"):
            other = rng.choice(
                ["linear", "dynamic", "yarn", "llama3", "longrope", "default", "proportional", "mrope", 1]
            )
        elif rng.random() < 0.5:
            other = rng.choice([0.5, 1.0, 1, 2, 3.0, 6, 16.0, 100.0])
        if rng.random() < 0.25:
            del rope[what]
        else:
            rope[what] = other
    else:
        if rng.random() < 0.4:
            rope = {"rope_type": "default"} if rng.random() < 0.3 else {}
        for what, values in rng.sample(ROPE, rng.randint(1, 5)):
            rope[what] = rng.choice(values)
    edit = put(base, change, "rope parameters", name, rope)
    edit.inert = is_gpt2(base)
    edit.names += ["theta", "original_max_position_embeddings", "rope_parameters", "rope_scaling"]
    edit.names += [what, *(rope if isinstance(rope, dict) else [])]
    return edit


def rope_scaled(rng: Random, base: Base, change: Change) -> Edit | None:
    """Another scaling, with all that it needs."""
    kind = rng.choice(["linear", "dynamic", "yarn", "llama3"])
    max_positions = value_of(base, change, "max_position_embeddings")
    rope = scaling(rng, kind, max_positions if isinstance(max_positions, int) else 16)
    rope["factor"] = rng.choice([1.0, 1.5, 2.0, 3.0, 10.0])
    rope["rope_theta"] = rng.choice([20.0, 1e3, 1e5])
    optional = [pair for pair in ROPE if pair[0] in YARN] if kind == "yarn" else []
    for name, values in rng.sample(optional, min(len(optional), rng.randint(0, 3))):
        rope[name] = rng.choice([value for value in values if value is not None])
    edit = put(base, change, "rope scaled", rng.choice(["rope_parameters", "rope_scaling"]), rope)
    edit.inert = is_gpt2(base)
    edit.names += ["theta", "rope_parameters", "rope_scaling", *rope]
    return edit


YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
ROPE: list[tuple[str, list[Any]]] = [
    ("rope_type", ["linear", "dynamic", "yarn", "llama3", "longrope", "default", "proportional", "axial"]),
    ("rope_type", ["linear", "dynamic", "yarn", "llama3"]),
    ("type", ["linear", "dynamic", "yarn", "llama3", "default"]),
    ("rope_theta", [50.0, 1e4, 300]),
    ("factor", [2.0, 4.0, 3, 1.0, 0.5, None]),
    ("factor", [2.0, 4.0]),
    ("original_max_position_embeddings", [4, 8, 16, 64, None]),
    ("low_freq_factor", [1.0, 2, 4.0]),
    ("high_freq_factor", [4.0, 8, 1.0]),
    ("attention_factor", [1.25, 0.5, None]),
    ("beta_fast", [32.0, 4, 1.0]),
    ("beta_slow", [1.0, 2, 8.0]),
    ("mscale", [1.0, 0.7, 0.0]),
    ("mscale_all_dim", [1.0, 0.5, 0.0]),
    ("truncate", [False, True]),
    ("partial_rotary_factor", [1.0, 0.5]),
    ("short_factor", [[1.0, 1.5]]),
    ("long_factor", [[2.0, 4.0]]),
    ("mrope_section", [[1, 1, 2]]),
    ("full_attention", [{"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}]),
]


def model_type(rng: Random, base: Base, change: Change) -> Edit | None:
    if rng.random() < 0.1:
        return missing(base, change, "model_type missing", "model_type")
    edit = put(base, change, "model_type", "model_type", rng.choice([*MODEL_TYPES, None, 3]))
    # Any field may be one that the other model does not have.
    edit.names.append("config.json")
    return edit


def quantization(rng: Random, base: Base, change: Change) -> Edit | None:
    value = rng.choice(
        [
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"quant_method": "gptq", "bits": 4},
            {"quant_method": "awq", "bits": 4},
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            {"quant_method": "none such"},
            {},
            None,
            "fp8",
        ]
    )
    name = rng.choice(["quantization_config"] * 5 + ["compression_config"])
    return put(base, change, "quantization", name, value)


def layer_config(rng: Random, base: Base, change: Change) -> Edit | None:
    value = rng.choice([{"0": {"num_key_value_heads": 1}}, {"0": {"sliding_window": 2}}, {"0": {}}, {}, None])
    return put(base, change, "per_layer_config", "per_layer_config", value)


def inert(rng: Random, base: Base, change: Change) -> Edit | None:
    rates = RATES["gpt2" if is_gpt2(base) else ""]
    if rng.random() < 0.2:
        value = rng.choice([0.3, 0.0, 1, 1.5, -0.1, "0.1", None])
        edit = put(base, change, "rate", rng.choice(rates), value)
        edit.inert = True
        return edit
    name = rng.choice(list(INERT))
    if name in base.config and rng.random() < 0.2:
        edit = missing(base, change, "inert missing", name)
    else:
        edit = put(base, change, "inert", name, rng.choice(INERT[name]))
    if edit:
        edit.inert = True
    return edit


def text(rng: Random, base: Base, change: Change) -> Edit | None:
    whole = {name: json.dumps(value) for name, value in base.config.items()} | change.config
    good = "{" + ", ".join(f"{json.dumps(k)}: {v}" for k, v in whole.items() if v is not None) + "}"
    change.config_text = rng.choice(
        [good[:-1], good[: len(good) // 2], "", "null", "[]", good + "}", good[:-1] + ", }", good.replace('"', "'", 1)]
    )
    return Edit("text", f"config.json = {show(change.config_text)}", ["config.json"])


# Tensors.


def pick(
    rng: Random, base: Base, change: Change, only: Callable[[str, list[int]], bool]
) -> tuple[str, list[int]] | None:
    """A tensor that no edit has touched."""
    free = [(n, s) for n, s in base.tensors if n not in change.tensors and only(n, s)]
    return rng.choice(free) if free else None


def of_base(rng: Random, base: Base, change: Change) -> tuple[str, list[int]] | None:
    return pick(rng, base, change, lambda name, shape: True)


def drop(rng: Random, base: Base, change: Change) -> Edit | None:
    if not (found := of_base(rng, base, change)):
        return None
    change.tensors[found[0]] = None
    return Edit("drop", f"{found[0]} is gone", [found[0]])


def rename(rng: Random, base: Base, change: Change) -> Edit | None:
    if not (found := of_base(rng, base, change)):
        return None
    old = found[0]
    module, _, last = old.rpartition(".")
    new = rng.choice(
        [
            f"{old}_",
            f"{module}_2.{last}",
            f"model.{old}",
            f"transformer.{old}",
            f"module.{old}",
            f"{module}.base_layer.{last}",
            f"{module}.gamma" if last == "weight" else f"{module}.beta",
            f"{module}.weight_g",
            old.upper(),
            old.removeprefix("transformer.").removeprefix("model."),
            old.replace(".0.", ".1.").replace("layers.1", "layers.0") if ".0." in old else old.replace(".1.", ".2."),
        ]
    )
    if new == old or any(name == new for name, _ in base.tensors):
        return None
    change.tensors[old] = {"name": new}
    return Edit("rename", f"{old} is called {new}", [old, new])


def add(rng: Random, base: Base, change: Change) -> Edit | None:
    """A tensor beside those of the base."""
    if not (found := pick(rng, base, change, lambda name, shape: len(shape) == 2)):
        return None
    name, (rows, columns) = found
    module = name.rpartition(".")[0]
    outputs = columns if is_gpt2(base) else rows
    body, layers = body_of(base), "h" if is_gpt2(base) else "layers"
    kind, new, dtype, shape = rng.choice(
        [
            ("add bias", f"{module}.bias", "F32", [outputs]),
            ("add scale", f"{module}.{rng.choice(['weight_scale', 'weight_scale_inv', 'input_scale'])}", "F32", [1]),
            ("add scale", f"{module}.scales", "F16", [outputs]),
            ("add zeros", f"{module}.{rng.choice(['qzeros', 'zero_point', 'g_idx'])}", "I32", [outputs]),
            ("add adapter", f"{module}.lora_A.weight", "F32", [2, columns]),
            (
                "add norm",
                f"{body}{layers}.0.{rng.choice(['q_norm', 'self_attn.q_norm', 'ln_3', 'norm'])}.weight",
                "F32",
                [outputs],
            ),
            ("add norm", f"{body}{rng.choice(['norm', 'layers.0.input_layernorm', 'ln_f'])}.bias", "F32", [columns]),
            (
                "add layer",
                f"{body}{layers}.{rng.choice([2, 7])}.{rng.choice(['mlp.up_proj', 'ln_1', 'mlp.c_fc'])}.weight",
                "F32",
                [columns],
            ),
            ("add position_ids", f"{body}{rng.choice(['', 'embeddings.'])}position_ids", "I64", [1, 16]),
            ("add inv_freq", f"{body}{layers}.0.self_attn.rotary_emb.inv_freq", "F32", [4]),
            ("add inv_freq", f"{body}rotary_emb.inv_freq", "F32", [4]),
            (
                "add mask",
                f"{body}h.0.attn.{rng.choice(['bias', 'masked_bias'])}",
                rng.choice(["F32", "U8", "BOOL"]),
                [1, 1, 4, 4],
            ),
            ("add head", "score.weight", "F32", [2, columns]),
            ("add unknown", rng.choice(["foo", "model.foo.weight", "optimizer.step"]), rng.choice(["F32", "I64"]), [3]),
            (
                "add head bias",
                "lm_head.bias",
                "F32",
                [dict(base.tensors).get("lm_head.weight", [value_of(base, change, "vocab_size")])[0]],
            ),
        ]
    )
    if any(tensor.name == new for tensor in tensors(base, change)) or not all(isinstance(n, int) for n in shape):
        return None
    change.also.append(Tensor(new, dtype, shape, new, shard(0, change.shards)))
    ordinary = kind in ("add position_ids", "add inv_freq", "add mask") and module_of_family(base, new)
    return Edit(kind, f"{new}: {dtype} {shape} is there", [new], ordinary=ordinary)


def module_of_family(base: Base, name: str) -> bool:
    """Whether older versions of transformers saved such a buffer in checkpoints of this family."""
    return (".attn." in name) == is_gpt2(base) and "embeddings." not in name


def dtype(rng: Random, base: Base, change: Change) -> Edit | None:
    whole = ["F16", "BF16", "F64"]
    part = [*whole, "F8_E4M3", "F8_E5M2", "U8", "I8", "I64", "I32", "BOOL"]
    if change.dtype == "F32" and rng.random() < 0.4:
        change.dtype = rng.choice(whole if rng.random() < 0.8 else part)
        return Edit(
            "dtype of all",
            f"all weights are {change.dtype}",
            [change.dtype],
            anywhere=True,
            ordinary=change.dtype in whole,
        )
    if not (found := of_base(rng, base, change)):
        return None
    new = rng.choice(part)
    change.tensors[found[0]] = {"dtype": new}
    return Edit("dtype", f"{found[0]} is {new}", [found[0]], ordinary=new in whole)


def shape(rng: Random, base: Base, change: Change) -> Edit | None:
    if not (found := of_base(rng, base, change)):
        return None
    name, old = found
    kind, new = rng.choice(
        [
            ("transpose", old[::-1]),
            ("shape", [old[0] + 1, *old[1:]]),
            ("shape", [*old[:-1], max(old[-1] - 1, 1)]),
            ("shape", [1, *old]),
            ("shape", [*old, 1]),
            ("shape", [old[0] * old[-1]] if len(old) > 1 else [1]),
            ("shape", [0, *old[1:]]),
            ("shape", []),
        ]
    )
    if new == old:
        return None
    change.tensors[name] = {"shape": new}
    return Edit(kind, f"{name}: {old} is {new}", [name, "vocab_size", "n_positions"])


def prefix(rng: Random, base: Base, change: Change) -> Edit | None:
    if change.prefix != ("", ""):
        return None
    body = body_of(base)
    change.prefix = rng.choice(
        [(body, ""), (body, ""), ("", "module."), ("", body), (body, "encoder."), (body, "base_model.model.")]
    )
    if change.prefix == ("", ""):
        return None
    names = [change.prefix[1] or body]
    kind = "prefix gone" if change.prefix == (body, "") else "prefix"
    return Edit(
        kind, f"the names begin with {change.prefix[1]!r} instead of {change.prefix[0]!r}", names, anywhere=True
    )


def shards(rng: Random, base: Base, change: Change) -> Edit | None:
    if change.shards or any(tensor.file == ONE_FILE for tensor in change.also):
        return None
    change.shards = rng.randint(2, 3)
    return Edit("shards", f"in {change.shards} files", ["model-"], ordinary=True)


def index(rng: Random, base: Base, change: Change) -> Edit | None:
    """Several files with a fault, or one file beside them."""
    if not change.shards and not shards(rng, base, change):
        return None
    name, old = rng.choice(base.tensors)
    last = shard(change.shards - 1, change.shards)
    names = [name, last, "model.safetensors.index.json", "weight_map"]
    begin = f"in {change.shards} files, "
    match rng.randrange(7):
        case 0 | 1:
            # The index says which of the two it is.
            twin = Tensor(name, "F32", old, f"{name} again", shard(change.shards, change.shards))
            at = (
                next(tensor.file for tensor in tensors(base, change) if tensor.key == name)
                if name not in change.tensors
                else last
            )
            change.also.append(twin)
            change.weight_map[name] = rng.choice([at, twin.file])
            spare = change.weight_map.get("a spare") is None
            if spare:
                # Some other name keeps both files in the index.
                change.also.append(Tensor("spare", "I64", [1], "spare", twin.file))
            return Edit("name in two files", f"{begin}{name} stands in two", [*names, twin.file, "spare"])
        case 2:
            change.weight_map[name] = last
            return Edit("wrong weight_map", f"{begin}the index has {name} in {last}", names)
        case 3:
            change.weight_map[name] = None
            return Edit("not in weight_map", f"{begin}the index lacks {name}", names)
        case 4:
            change.weight_map["spare"] = last
            return Edit("not in the files", f"{begin}the index has a name that no file has", ["spare", *names])
        case 5:
            change.lost = [last]
            return Edit("lost file", f"{begin}{last} is not there", names)
        case _:
            change.index_text = rng.choice(
                ["{}", "", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
            )
            return Edit("index text", f"{begin}the index is {change.index_text}", names, anywhere=True)


def one_beside(rng: Random, base: Base, change: Change) -> Edit | None:
    """`model.safetensors` with other weights beside several files."""
    if not change.shards and not shards(rng, base, change):
        return None
    for name, old in base.tensors:
        change.also.append(Tensor(name, "F32", old, f"{name} tuned", ONE_FILE))
    return Edit("one file beside several", f"{ONE_FILE} beside {change.shards} files", [ONE_FILE], anywhere=True)


def weights_file(rng: Random, base: Base, change: Change) -> Edit | None:
    """A field that names a file of weights, which transformers then loads instead of the usual one."""
    name = "transformers_weights"
    if name in change.config:
        return None
    file = rng.choice([OTHER_FILE] * 4 + [ONE_FILE, f"../{ONE_FILE}", "model.bin", "", None, 3])
    edit = put(base, change, name, name, file)
    if file == OTHER_FILE and rng.random() < 0.7:
        change.also += [Tensor(n, "F32", old, f"{n} tuned", OTHER_FILE) for n, old in base.tensors]
        edit.text += ", which is there"
    return edit


def head(rng: Random, base: Base, change: Change) -> Edit | None:
    """Whether the head is tied, and whose weights it has."""
    body = {name: s for name, s in base.tensors if name.endswith(("wte.weight", "embed_tokens.weight"))}
    (tokens, shape_), name = next(iter(body.items())), "lm_head.weight"
    if name in change.tensors or tokens in change.tensors or any(tensor.name == name for tensor in change.also):
        return None
    has_head = any(n == name for n, _ in base.tensors)
    names = [name, tokens, "tie_word_embeddings"]
    tied = rng.choice(["true", "true", "false", None])
    change.config["tie_word_embeddings"] = tied
    kind = rng.choice(["another head", "equal head", "head alone", "no head"])
    key = tokens if kind == "equal head" else name
    if kind == "no head" and has_head:
        change.tensors[name] = None
    elif has_head:
        change.tensors[name] = {"key": key}
    elif kind != "no head":
        change.also.append(Tensor(name, "F32", shape_, key, shard(0, change.shards)))
    if kind == "head alone":
        change.tensors[tokens] = None
    return Edit(kind, f"tie_word_embeddings = {tied}, {kind}", names)


def quantised(rng: Random, base: Base, change: Change) -> Edit | None:
    """Matrices in 8 bits with scales, as quantised checkpoints have them."""
    kind = rng.choice(["F8_E4M3", "F8_E4M3", "U8", "I8"])
    begin = change.prefix[1] if change.prefix[0] == "" else ""
    names = ["quantization_config"]
    for name, old in base.tensors:
        if len(old) == 2 and ".h." in f".{name}" or ".layers." in name and len(old) == 2:
            if name not in change.tensors:
                change.tensors[name] = {"dtype": kind}
                names.append(name)
                if kind != "U8" or rng.random() < 0.5:
                    scale = begin + name + rng.choice(["_scale"] * 3 + ["_scale_inv"])
                    change.also.append(Tensor(scale, "F32", [old[0], 1], scale, shard(0, change.shards)))
                    names.append(scale)
    text = f"matrices are {kind}"
    if rng.random() < 0.7:
        method = rng.choice(["compressed-tensors", "fp8", "fbgemm_fp8"])
        put(base, change, "", "quantization_config", {"quant_method": method})
        text += f" with scales of {method}"
    return Edit("quantised", text, names)


def enormous(rng: Random, base: Base, change: Change) -> Edit | None:
    """A size that no machine holds."""
    name = rng.choice(["n_positions", "n_inner"] if is_gpt2(base) else ["max_position_embeddings"] * 2 + ["head_dim"])
    edit = put(base, change, "enormous", name, rng.choice([10**9, 2**40, 2**62]))
    return edit


# Edits and how often each is drawn.
EDITS: list[tuple[Callable[[Random, Base, Change], Edit | None], int]] = [
    (size, 13),
    (epsilon, 7),
    (activation, 8),
    (flag, 10),
    (window, 8),
    (rope_field, 6),
    (rope_parameters, 10),
    (rope_scaled, 7),
    (model_type, 3),
    (quantization, 3),
    (layer_config, 2),
    (inert, 6),
    (text, 1),
    (drop, 4),
    (rename, 5),
    (add, 10),
    (dtype, 7),
    (shape, 6),
    (prefix, 4),
    (shards, 3),
    (index, 6),
    (one_beside, 1),
    (weights_file, 2),
    (head, 7),
    (quantised, 4),
    (enormous, 4),
]
ROTARY_ONLY = (rope_field, rope_parameters, rope_scaled)


def draw_edit(rng: Random, base: Base, change: Change) -> Edit:
    """An edit of a kind drawn at random."""
    kinds, weights = zip(*EDITS)
    while True:
        kind = rng.choices(kinds, weights)[0]
        if kind in ROTARY_ONLY and is_gpt2(base) and rng.random() < 0.8:
            continue
        if edit := kind(rng, base, change):
            return edit
