"""A tiny checkpoint of Hugging Face's, as a short description of it and as files.

The weights follow from their names, so that a description holds none. `tests/differential/checkpoint.rs` writes the
same files from the same descriptions; what is said here about their JSON binds both.
"""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ONE_FILE = "model.safetensors"
# Another file of weights.
OTHER_FILE = "tuned.safetensors"
INDEX = "model.safetensors.index.json"


def shard(at: int, shards: int) -> str:
    """The name of file `at` of a checkpoint in `shards` files; 0: in one."""
    return f"model-{at + 1:05}-of-{shards:05}.safetensors" if shards else ONE_FILE


@dataclass
class Tensor:
    """A tensor of a file. Equal keys give equal values."""

    name: str
    dtype: str
    shape: list[int]
    key: str
    file: str


@dataclass
class Base:
    """A checkpoint as `save_pretrained` writes it: its configuration, names and shapes of its tensors, in order."""

    family: str
    config: dict[str, Any]
    tensors: list[tuple[str, list[int]]]
    ids: list[int]


@dataclass
class Change:
    """What makes an edited checkpoint of a base."""

    # Fields of config.json as JSON text, which JSON need not be able to say: "NaN". None: the field is absent.
    config: dict[str, str | None] = field(default_factory=dict)
    # The whole text of config.json.
    config_text: str | None = None
    # The dtype of every tensor that is not named below.
    dtype: str = "F32"
    # What every name begins with, and what it begins with instead.
    prefix: tuple[str, str] = ("", "")
    # Files to which the tensors go in turn.
    shards: int = 0
    # By the name in the base: what differs ("name", "dtype", "shape", "key"), or None: it is not there.
    tensors: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    # Tensors beside them.
    also: list[Tensor] = field(default_factory=list)
    # Files that the index names for a tensor instead of the one that holds it; None: it names no file.
    weight_map: dict[str, str | None] = field(default_factory=dict)
    # The whole text of the index.
    index_text: str | None = None
    # Files that are not there.
    lost: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """What is not as in the base."""
        short = {name: value for name, value in vars(self).items() if value != getattr(Change(), name)}
        if self.also:
            short["also"] = [vars(tensor) for tensor in self.also]
        return short


def tensors(base: Base, change: Change) -> list[Tensor]:
    """The tensors of all files, in the order in which they are written."""
    out = []
    begin, instead = change.prefix
    for at, (name, shape) in enumerate(base.tensors):
        other = change.tensors.get(name, {})
        if other is None:
            continue
        new = instead + name[len(begin) :] if name.startswith(begin) else name
        file = shard(at % max(change.shards, 1), change.shards)
        tensor = dict(name=new, dtype=change.dtype, shape=shape, key=name) | other
        out.append(Tensor(file=file, **tensor))
    return out + change.also


def config_text(base: Base, change: Change) -> str:
    if change.config_text is not None:
        return change.config_text
    fields = {name: json.dumps(value) for name, value in base.config.items()} | change.config
    lines = [f"{json.dumps(name)}: {text}" for name, text in fields.items() if text is not None]
    return "{" + ", ".join(lines) + "}"


def write(folder: Path, base: Base, change: Change) -> None:
    """Writes the files into an empty folder."""
    (folder / "config.json").write_text(config_text(base, change))
    all_tensors = tensors(base, change)
    files: dict[str, list[Tensor]] = {}
    for tensor in all_tensors:
        files.setdefault(tensor.file, []).append(tensor)
    for name, inside in files.items():
        if name not in change.lost:
            write_safetensors(folder / name, inside)
    if change.shards:
        weight_map = {tensor.name: tensor.file for tensor in all_tensors} | change.weight_map
        weight_map = {name: file for name, file in weight_map.items() if file is not None}
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / INDEX).write_text(text if change.index_text is None else change.index_text)


def write_safetensors(path: Path, inside: list[Tensor]) -> None:
    # A name twice in one file: JSON keeps the last, and the data of both are written.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for tensor in inside:
        if tensor.name in header:
            continue
        bytes_ = encode(tensor)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [len(data), len(data) + len(bytes_)],
        }
        data += bytes_
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def draws(key: str, count: int) -> np.ndarray:
    """64 random bits for every element: SplitMix64, begun at the FNV-1a hash of the key."""
    begin = 0xCBF29CE484222325
    for byte in key.encode():
        begin = (begin ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(begin) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def encode(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    bits = draws(tensor.key, int(np.prod(tensor.shape, dtype=np.int64)))
    # Odd multiples of 1/256 between -1/2 and 1/2, which no float of 16 bits rounds. Embeddings are smaller, so that
    # the epsilon of the first norm shows.
    x = (2 * (bits >> np.uint64(57)).astype(np.int64) - 127) / 256
    if any(part in tensor.key for part in ("wte", "wpe", "embed_tokens")):
        x /= 32
    small = bits >> np.uint64(61)
    match tensor.dtype:
        case "F64":
            return x.astype("<f8").tobytes()
        case "F32":
            return x.astype("<f4").tobytes()
        case "F16":
            return x.astype("<f2").tobytes()
        case "BF16":
            return (x.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        case "F8_E4M3" | "F8_E5M2":
            # Of no exponent that could be a NaN: 1/8 to 15/8 as E4M3.
            return ((bits >> np.uint64(56)) & np.uint64(0x9F) | np.uint64(0x20)).astype(np.uint8).tobytes()
        case "U8" | "I8" | "BOOL":
            return (small & np.uint64(1)).astype(np.uint8).tobytes()
        case "I64" | "I32" | "I16":
            return small.astype(f"<i{int(tensor.dtype[1:]) // 8}").tobytes()
        case other:
            raise ValueError(other)
