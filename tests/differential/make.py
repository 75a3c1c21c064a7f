"""Writes the data of tests/differential/main.rs: what transformers makes of edited checkpoints.

    pip install torch transformers safetensors && python tests/differential/make.py --seed 1 --count 400 --out FILE

A line of the file is a base, "{"family": .., "config": .., "tensors": .., "ids": .., "base": 0, ..}", or one edited
checkpoint of the base before it: what differs, and what transformers does with it. Either it loads, and "logits" are
those of a middle and of the last token, in float64; "roundoff" is how far its float32 is off, relative to the largest.
Or "refused" says why there are no logits to be equal to: an error, or weights that it draws at random because the file
has none.
"""

import argparse
import json
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from bases import FAMILIES, draw_base
from checkpoint import Base, Change, write
from edits import draw_edit

# Edited checkpoints of a base, beside the base itself.
PER_BASE = 10
# A result that is off by more in float32 is left out: the test tolerates four times as much.
ROUNDOFF = 1e-5


class IllConditioned(Exception):
    pass


def layers(text: str) -> int:
    """The largest number of layers that a config.json might ask for."""
    try:
        config = json.loads(text)
        return max(n for n in (config.get("num_hidden_layers"), config.get("n_layer"), 0) if isinstance(n, int))
    except (ValueError, AttributeError):
        return 0


def outcome(folder: Path, base: Base, change: Change) -> dict[str, Any]:
    """What transformers makes of a checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write(folder, base, change)
    if layers((folder / "config.json").read_text()) > 1000:
        return {"refused": "layers for which no weights are there, which take hours to make"}
    signal.alarm(60)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        for what in ("missing_keys", "mismatched_keys", "error_msgs"):
            if info[what]:
                return {"refused": f"{what}: {sorted(map(str, info[what]))[0]}"}
        ids = torch.tensor([base.ids])
        with torch.no_grad():
            model.eval()
            single = model(ids, use_cache=False, return_dict=True).logits[0]
            double = model.double()(ids, use_cache=False, return_dict=True).logits[0]
    except TimeoutError:
        raise
    except Exception as error:
        message = " ".join(str(error).replace(str(folder), "c").split())
        return {"refused": f"{type(error).__name__}: {message[:80]}"}
    finally:
        signal.alarm(0)
    rows = [len(base.ids) // 2, len(base.ids) - 1]
    single, double = single[rows].double(), double[rows].double()
    if not single.isfinite().all():
        return {"refused": "logits that are no numbers"}
    roundoff = ((single - double).abs().max() / double.abs().max()).item()
    if not roundoff <= ROUNDOFF:
        raise IllConditioned
    return {"logits": [float(f"{x:.7g}") for x in double.flatten().tolist()], "roundoff": float(f"{roundoff:.1e}")}


def differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results are logits, and not the same ones."""
    if "logits" not in one or "logits" not in other or len(one["logits"]) != len(other["logits"]):
        return True
    largest = max(map(abs, other["logits"]))
    return max(abs(a - b) for a, b in zip(one["logits"], other["logits"])) > 1e-4 * largest


def record(folder: Path, base: Base, rng: Random, plain: dict[str, Any]) -> dict[str, Any]:
    change = Change()
    edits = [draw_edit(rng, base, change) for _ in range(rng.choices([1, 2, 3], [6, 3, 1])[0])]
    out = outcome(folder, base, change)
    inert = {edit.names[0] for edit in edits if edit.inert}
    if "refused" in out and inert:
        # A field that changes no logits: to load it is as good as to refuse it.
        rest = {name: text for name, text in change.config.items() if name not in inert}
        without = outcome(folder, base, replace(change, config=rest))
        if "logits" in without:
            out = without | {"strict": out["refused"]}
    names: list[str] = []
    for edit in edits:
        names += [name for name in edit.names if name not in names]
    return (
        {
            "kinds": [edit.kind for edit in edits],
            "edits": [edit.text for edit in edits],
            "names": names,
            "anywhere": any(edit.anywhere for edit in edits),
            "ordinary": all(edit.ordinary for edit in edits),
            "differs": differ(out, plain),
        }
        | change.json()
        | out
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument("--count", type=int, default=2000, help="edited checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(f"seed {args.seed}, torch {torch.__version__}, transformers {transformers.__version__}")

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    # What asks for more than any tiny checkpoint needs fails at once.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))

    def too_slow(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_slow)
    rng, families, counts = Random(args.seed), list(FAMILIES), Counter[str]()
    torch.manual_seed(args.seed)
    begin = time.monotonic()
    # A name that says nothing: transformers guesses a model's type from its folder's.
    with tempfile.TemporaryDirectory(prefix="d-") as temporary, args.out.open("w") as out:
        folder, drawn, at = Path(temporary) / "c", 0, 0
        say = lambda value: print(json.dumps(value, separators=(",", ":")), file=out)
        while drawn < args.count:
            base = draw_base(rng, families[at % len(families)])
            plain = outcome(folder, base, Change())
            assert "logits" in plain, plain
            say(vars(base) | {"base": at} | plain)
            at += 1
            for _ in range(min(PER_BASE, args.count - drawn)):
                try:
                    edited = record(folder, base, rng, plain)
                except IllConditioned:
                    counts["ill-conditioned, left out"] += 1
                    continue
                drawn += 1
                counts["refused by transformers" if "refused" in edited else "logits of transformers"] += 1
                say(edited)
    print(f"{drawn} edited checkpoints of {at} bases in {time.monotonic() - begin:.0f} s: {dict(counts)}")


if __name__ == "__main__":
    main()
