"""Writes the golden data of tests/golden.rs: what Hugging Face's GPT-2, LLaMA and its kin compute.

    pip install torch transformers safetensors && python tests/golden/make.py

Each folder beside this file is a checkpoint as `save_pretrained` writes it, with random weights, and
`expected.safetensors`: token ids, logits, the loss (mean cross-entropy of the next token) and its gradient with
respect to every parameter. Computed in float64 where the model does not itself go to float32, stored in float32.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaForCausalLM
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2Model, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent


def randomise(model):
    """Weights large enough that every part of the model shows in the logits, biases and norms included."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.25)
            if name.split(".")[-2] in ("ln_1", "ln_2", "ln_f", "norm", "q_norm", "k_norm") or "layernorm" in name:
                parameter.add_(1.0 if name.endswith("weight") else 0.0)


def write(name, model, logits_of, buffers=None):
    folder = HERE / name
    model.eval().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if buffers:
        path = folder / "model.safetensors"
        save_file(load_file(path) | buffers, path, metadata={"format": "pt"})
    model.double()
    ids = torch.randint(0, model.config.vocab_size, (3, 10))
    logits = logits_of(model, ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    expected = {"ids": ids.to(torch.uint32), "logits": logits.detach().float(), "loss": loss.detach().float()}
    expected |= {f"gradient.{n}": p.grad.float() for n, p in model.named_parameters()}
    save_file({n: t.contiguous() for n, t in expected.items()}, folder / "expected.safetensors")
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, loss {loss.item():.4f}")


def main():
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    torch.manual_seed(0)
    causal = lambda model, ids: model(ids).logits
    gpt2 = dict(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=4)
    llama = dict(vocab_size=29, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2)

    model = GPT2LMHeadModel(GPT2Config(**gpt2))
    randomise(model)
    write("gpt2", model, causal)

    # As "openai-community/gpt2" was published: no prefix, and the causal mask of each block among the weights.
    model = GPT2Model(GPT2Config(**gpt2 | dict(n_layer=1, n_inner=24, activation_function="gelu")))
    randomise(model)
    buffers = {"h.0.attn.bias": torch.ones(12, 12).tril()[None, None], "h.0.attn.masked_bias": torch.tensor(-1e4)}
    tied = lambda model, ids: model(ids).last_hidden_state @ model.get_input_embeddings().weight.T
    write("gpt2_bare", model, tied, buffers)

    # Heads that do not share the width among them, grouped queries, a head of its own.
    model = LlamaForCausalLM(LlamaConfig(**llama, intermediate_size=40, head_dim=6, max_position_embeddings=16))
    randomise(model)
    write("llama", model, causal)

    # LLaMA 3.2: frequencies for long contexts, the head tied to the embedding; and biases everywhere. The short
    # original context puts a frequency into each of the three bands of the scaling.
    rope = dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **llama | dict(num_hidden_layers=1),
            intermediate_size=32,
            head_dim=8,
            max_position_embeddings=64,
            rope_parameters=rope | dict(original_max_position_embeddings=40),
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        )
    )
    randomise(model)
    write("llama3", model, causal)

    # A window shorter than the text, an exact GELU as the gate, and the scaling that begins beyond the longest text.
    small = dict(vocab_size=23, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
    model = MistralForCausalLM(
        MistralConfig(
            **small,
            num_hidden_layers=2,
            head_dim=6,
            max_position_embeddings=16,
            sliding_window=4,
            hidden_act="gelu",
            rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=2.0),
        )
    )
    randomise(model)
    write("mistral", model, causal)

    # Biases on queries, keys and values alone, a window in the last layer alone; saved as a body, without a prefix.
    model = Qwen2Model(
        Qwen2Config(
            **small,
            num_hidden_layers=2,
            max_position_embeddings=16,
            use_sliding_window=True,
            sliding_window=3,
            max_window_layers=1,
            tie_word_embeddings=True,
        )
    )
    randomise(model)
    write("qwen2_bare", model, tied)

    # Norms of queries and keys, a head of its own, and YaRN with a frequency on either side of its ramp and two on it.
    yarn = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, beta_fast=4.0, beta_slow=0.5)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **small,
            num_hidden_layers=1,
            head_dim=8,
            max_position_embeddings=160,
            rope_parameters=yarn | dict(original_max_position_embeddings=40),
        )
    )
    randomise(model)
    write("qwen3", model, causal)


if __name__ == "__main__":
    main()
