#!/usr/bin/env python3
"""The ops and shapes of a run of `gpu_bundle bench --section peers`, in PyTorch, on the same device.

    gpu_bundle bench --section peers --out results && python3 torch_peers.py --out results

Reads the section `peers` of results/<device>-<date>.json, times the same ops on the same shapes (eager,
torch.compile and, on CUDA, a Triton kernel that stores no mask), scaled dot product attention with each
backend, and the same training step of a small GPT; adds its records to the section and prints the ratios.
Run it with another interpreter than the first python3 with PyTorch through run.sh's PYTHON=.

Timed as examples/gpu_bundle/src/timing.rs does: launches between two CUDA events (on the CPU: two readings of
the clock), up to 64 sets of arguments in turn so that the last cache holds few of them, the median of many
samples and its quartiles. No op is timed before it agrees, backward too, with the formula in f64 under the mask it
drew; of attention the output is compared.
"""

import argparse
import collections
import functools
import glob
import json
import math
import os
import sys
import time

import torch
import torch.nn.functional as F

SCALE = 0.7  # of the scores, as in the runner of tests/ops.rs
NORM_EPS = 0.1
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Relative error in norm that a result in the dtype may have.
TOLERANCE = {"f32": 2e-5, "f16": 3e-3, "bf16": 2e-2}


# ---- timing ----

Timing = collections.namedtuple("Timing", "ms ms_low ms_high samples launches")


class Timer:
    MAX_LAUNCHES, MAX_SAMPLES = 200, 51

    def __init__(self, device, small):
        self.device, self.cuda = device, device.type == "cuda"
        self.sample_ms, self.total_ms, self.min_samples = (
            (0.1, 1.0, 3) if small else (1.0, 60.0, 11) if self.cuda else (1.0, 150.0, 7)
        )

    def elapsed_ms(self, work):
        if not self.cuda:
            begin = time.perf_counter()
            work()
            return (time.perf_counter() - begin) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def time(self, sets, run):
        """Times run(set) with the sets in turn, the results of the last turn kept as timing.rs does."""
        alive, at = collections.deque(maxlen=sets if self.cuda else 1), 0

        def launches(count):
            nonlocal at
            for _ in range(count):
                if len(alive) == alive.maxlen:
                    alive.popleft()
                alive.append(run(at))
                at = (at + 1) % sets

        def sample(count):
            return self.elapsed_ms(lambda: launches(count)) / count

        sample(2)
        once = max(sample(1), 1e-4)
        count = int(min(max(math.ceil(self.sample_ms / once), 1), self.MAX_LAUNCHES))
        samples = int(min(max(self.total_ms / (once * count), self.min_samples), self.MAX_SAMPLES))
        times = sorted(sample(count) for _ in range(samples))
        quantile = lambda q: times[round((samples - 1) * q)]
        return Timing(quantile(0.5), quantile(0.25), quantile(0.75), samples, count)

    def sets(self, size):
        cache = torch.cuda.get_device_properties(0).L2_cache_size if self.cuda else 32 << 20
        return min(max(-(-4 * cache // size), 1), 64)


# ---- ops: op(drop, *arguments), where drop(x) drops ----


def dropout(drop, x):
    return drop(x)


def dropout_add(drop, x, residual):
    return residual + drop(x)


def dropout_add_bias(drop, x, residual, bias):
    return residual + drop(x + bias)


def dropout_add_norm(drop, x, residual, weight):
    """The norm and, beside it, the stream."""
    z = residual + drop(x)
    return F.rms_norm(z, weight.shape, weight, NORM_EPS), z


def activation_dropout(drop, x):
    return drop(F.gelu(x, approximate="tanh"))


def softmax_dropout(drop, scores):
    return drop(torch.softmax(scores * SCALE, -1))


def drop_path_add(drop, x, residual):
    return residual + x * drop(torch.ones(x.shape[0], 1, dtype=x.dtype, device=x.device))


OPS = {
    "dropout": (dropout, 1),
    "dropout_add": (dropout_add, 2),
    "dropout_add_bias": (dropout_add_bias, 3),
    "dropout_add_norm": (dropout_add_norm, 3),
    "activation_dropout": (activation_dropout, 1),
    "softmax_dropout": (softmax_dropout, 1),
    "drop_path_add": (drop_path_add, 2),
}

# ---- ops that draw nothing: op(constants, x), with what makes the constants of a shape ----


def rope(tables, x):
    """Half-split, with tables in the dtype of x, as models have them."""
    cos, sin = tables
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def rope_tables(shape, dtype, device):
    frequencies = 0.9 ** torch.arange(shape[-1] // 2, dtype=torch.float64)
    angles = torch.arange(shape[-2], dtype=torch.float64)[:, None] * torch.cat((frequencies, frequencies))
    return [table.to(device, dtype) for table in (angles.cos(), angles.sin())]


def cross_entropy(targets, logits):
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)


def targets(shape, _dtype, device):
    return (torch.arange(shape[0], device=device) * 7919 + 3) % shape[1]


UNDROPPED = {"rope": (rope, rope_tables), "cross_entropy": (cross_entropy, targets)}

# All scores, or those up to the query's own key; as tests/cases/attention/mod.rs names them.
ATTENTION = ("attention", "attention_causal")


def arguments(name, shape, dtype, device):
    shapes = [shape] * (OPS[name][1] if name in OPS else 1)
    if len(shapes) == 3:  # a bias or a weight
        shapes[2] = shape[-1:]
    return [torch.randn(s, dtype=torch.float32, device=device).to(dtype) for s in shapes]


def first(results):
    return results[0] if isinstance(results, tuple) else results


def relative_error(x, exact):
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def check_undropped(name, op, x, dtype):
    """Demands that an op that draws nothing agrees with itself in f64."""
    eager, constants = UNDROPPED[name]
    x, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y, exact = op(x), eager(constants(x.shape, torch.float64, x.device), wide)
    dy = torch.rand_like(y) + 0.5
    if y.dim() == 0:
        dy = dy * x.shape[0]  # the gradient of a mean would be subnormal in f16
    y.backward(dy)
    exact.backward(dy.double())
    for what, ours, expected in [("output", y, exact), ("gradient", x.grad, wide.grad)]:
        off = relative_error(ours.detach(), expected.detach())
        if not off <= TOLERANCE[dtype]:
            raise AssertionError(f"{name} in {dtype}: its {what} is off by {off:.1e}")


def check(name, op, args, drop_p, dtype):
    """Demands that an op agrees with its formula in f64 under the mask that its results show."""
    args = [a.clone().requires_grad_() for a in args]
    dy = torch.rand_like(args[0]) + 0.5
    y = first(op(*args))
    y.backward(dy)
    # Where a gradient arrives, x was kept; a probability is never 0 itself.
    keep = (y if name == "softmax_dropout" else args[0].grad) != 0
    rows = args[0].shape[0]
    some = sorted({r for s in (0, rows // 2, rows - 8) for r in range(max(s, 0), min(max(s, 0) + 8, rows))})
    if name == "drop_path_add":
        some = sorted({0, rows // 2, rows - 1})
    part = lambda x: x.detach()[some].cpu().double() if x.dim() == 2 else x.detach().cpu().double()
    kept = keep[some].cpu()
    wide = [part(a).requires_grad_() for a in args]
    def mask(x):
        return torch.where(kept[:, :1] if x.shape[1] == 1 else kept, x / (1 - drop_p), torch.zeros_like(x))
    exact = first(OPS[name][0](mask, *wide))
    exact.backward(part(dy))
    results = [(y, exact)] + [(a.grad, w.grad) for a, w in zip(args, wide) if a.dim() == 2]
    for i, (ours, expected) in enumerate(results):
        off = relative_error(part(ours), expected)
        if not off <= TOLERANCE[dtype]:
            raise AssertionError(f"{name} in {dtype}: result {i} is off by {off:.1e}")
    if name != "drop_path_add":
        n, q = keep.numel(), 1 - drop_p
        off = abs(keep.float().mean().item() - q)
        # Half precision can round a kept probability to 0.
        if off > 5 * math.sqrt(drop_p * q / n) + (1e-3 if dtype == "f16" else 1e-6):
            raise AssertionError(f"{name}: kept {keep.float().mean().item()}, expected {q}")


# ---- a dropout that stores no mask, in Triton ----


def triton_dropout():
    """Draws the mask from a seed in forward and again in backward: one Philox call an element."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, y, n, drop_p, seed, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        value = tl.load(x + at, mask=inside)
        kept = tl.rand(seed, at) >= drop_p
        tl.store(y + at, tl.where(kept, value / (1 - drop_p), 0.0), mask=inside)

    def launch(x, drop_p, seed):
        y, n = torch.empty_like(x), x.numel()
        kernel[(triton.cdiv(n, 1024),)](x, y, n, drop_p, seed, BLOCK=1024)
        return y

    class Seeded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, drop_p, seed):
            ctx.drop_p, ctx.seed = drop_p, seed
            return launch(x, drop_p, seed)

        @staticmethod
        def backward(ctx, dy):
            return launch(dy.contiguous(), ctx.drop_p, ctx.seed), None, None

    seeds = iter(range(1, 1 << 62))
    return lambda x, drop_p: Seeded.apply(x, drop_p, next(seeds))


# ---- the GPT ----


class Attention(torch.nn.Module):
    def __init__(self, c, heads, drop_p):
        super().__init__()
        self.heads, self.drop_p = heads, drop_p
        self.c_attn, self.c_proj = torch.nn.Linear(c, 3 * c), torch.nn.Linear(c, c)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.c_attn(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop_p, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, c))


class Block(torch.nn.Module):
    def __init__(self, c, heads, drop_p):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(c), torch.nn.LayerNorm(c)
        self.attn, self.drop_p = Attention(c, heads, drop_p), drop_p
        self.c_fc, self.c_proj = torch.nn.Linear(c, 4 * c), torch.nn.Linear(4 * c, c)

    def forward(self, x):
        x = x + F.dropout(self.attn(self.ln_1(x)), self.drop_p, self.training)
        h = self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return x + F.dropout(h, self.drop_p, self.training)


class Gpt(torch.nn.Module):
    """As candle_dropout::Transformer in GPT-2's style: pre-norm, learned positions, the head tied to the token embedding."""

    def __init__(self, v, t, c, layers, heads, drop_p):
        super().__init__()
        self.wte, self.wpe = torch.nn.Embedding(v, c), torch.nn.Embedding(t, c)
        self.h = torch.nn.ModuleList(Block(c, heads, drop_p) for _ in range(layers))
        self.ln_f, self.drop_p = torch.nn.LayerNorm(c), drop_p
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                std = 0.02 / math.sqrt(2 * layers) if "c_proj" in name else 0.02
                torch.nn.init.normal_(weight, std=std)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(weight)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        x = F.dropout(x, self.drop_p, self.training)
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.t()


def gpt_step(shape, vocab, heads, dtype, drop_p, device, compiled):
    batch, t, c, layers = shape
    model = Gpt(vocab, t, c, layers, heads, drop_p).to(device, dtype).train()
    expected = vocab * c + t * c + layers * (12 * c * c + 13 * c) + 2 * c
    count = sum(weight.numel() for weight in model.parameters())
    assert count == expected, f"{count} parameters, expected {expected}"
    forward = torch.compile(model) if compiled else model
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=device.type == "cuda")
    ids, targets = (torch.randint(vocab, (batch, t), device=device) for _ in range(2))

    def step():
        loss = F.cross_entropy(forward(ids).flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss

    first = step().item()
    assert abs(first - math.log(vocab)) < 0.5, f"the first loss is {first}"
    return step


def matrix_products(shape, vocab, heads, dtype, device):
    """The products of candle_gpt.rs: forward, and twice backward."""
    batch, t, c, layers = shape
    tokens, head = batch * t, c // heads
    forward = [(1, tokens, c, vocab, 1)]
    forward += [(1, tokens, k, j, layers) for k, j in ((c, 3 * c), (c, c), (c, 4 * c), (4 * c, c))]
    forward += [(batch * heads, t, head, t, layers), (batch * heads, t, t, head, layers)]
    random = lambda *s: torch.randn(s, device=device).to(dtype)
    products = [
        (random(n, rows, inner), random(n, inner, cols), count)
        for n, m, k, j, count in forward
        for rows, inner, cols in ((m, k, j), (m, j, k), (k, m, j))
    ]
    flop = sum(2 * a.numel() * b.shape[2] * count for a, b, count in products)
    return (lambda: [a @ b for a, b, count in products for _ in range(count)]), flop


# ---- the run ----


def is_peer_record(record):
    return record["library"] == "pytorch"


class Peers:
    def __init__(self, device, args):
        self.device, self.args = device, args
        self.records, self.missing, self.wrong = [], [], []
        self.timer = Timer(device, args.small)

    def add(self, variant, op, which, dtype, drop_p, shape, timing, **more):
        record = dict(library="pytorch", variant=variant, op=op, dtype=dtype, drop_p=drop_p,
                      shape=list(shape), **timing._asdict(), **more)
        record["pass"] = which
        self.records.append(record)

    def attempt(self, what, work, may_lack=False):
        """Runs work. What fails is noted and the rest goes on: as wrong, or where it may_lack, as not available."""
        try:
            work()
            print(f"peers: {what}", file=sys.stderr, flush=True)
        except Exception as error:  # noqa: BLE001, whatever a missing backend raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            # After an error of the device nothing else is right either.
            lacks = may_lack and not isinstance(error, AssertionError) and "CUDA error" not in reason
            (self.missing if lacks else self.wrong).append(f"{what}: {reason}")
            print(f"peers: {what} {'is not available' if lacks else 'FAILED'}: {reason}", file=sys.stderr, flush=True)

    def op(self, name, dtype, drop_p, shape):
        if name in OPS:
            drop = (lambda x: F.dropout(x, drop_p, True)) if drop_p > 0 else (lambda x: x)
            eager, count = functools.partial(OPS[name][0], drop), OPS[name][1]
        else:
            op, constants = UNDROPPED[name]
            eager, count = functools.partial(op, constants(shape, DTYPES[dtype], self.device)), 1
        variants = {"eager": eager}
        if self.args.compile:
            torch.compiler.reset()
            variants["compile"] = torch.compile(eager)
        if self.timer.cuda and name == "dropout":
            seeded = triton_dropout()
            variants["triton"] = lambda x: seeded(x, drop_p)
        size = DTYPES[dtype].itemsize * math.prod(shape)
        sets = self.timer.sets((count + 1) * size)
        args = [arguments(name, shape, DTYPES[dtype], self.device) for _ in range(sets)]
        tracked = [[a.clone().requires_grad_() for a in one] for one in args]
        dy = None if name == "cross_entropy" else torch.ones_like(args[0][0])

        def forward_backward(op, at):
            for a in tracked[at]:
                a.grad = None
            first(op(*tracked[at])).backward(dy)
            return [a.grad for a in tracked[at]]

        def measure(variant, op):
            if name in OPS:
                check(name, op, args[0], drop_p, dtype)
            else:
                check_undropped(name, op, args[0][0], dtype)
            with torch.no_grad():
                timing = self.timer.time(sets, lambda at: op(*args[at]))
            self.add(variant, name, "forward", dtype, drop_p, shape, timing)
            timing = self.timer.time(sets, lambda at: forward_backward(op, at))
            self.add(variant, name, "forward_backward", dtype, drop_p, shape, timing)

        for variant, op in variants.items():
            what = f"{name}, {variant}, {dtype}, drop p {drop_p}, {shape}"
            self.attempt(what, functools.partial(measure, variant, op), may_lack=variant != "eager")

    def copy(self, dtype, shape):
        sets = self.timer.sets(2 * DTYPES[dtype].itemsize * math.prod(shape))
        x = [arguments("dropout", shape, DTYPES[dtype], self.device)[0] for _ in range(sets)]
        self.add("eager", "copy", "forward", dtype, 0.0, shape, self.timer.time(sets, lambda at: x[at].clone()))

    def attention(self, op, dtype, shape, drop_p):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        b, h, t, d = shape
        causal, rows = op == "attention_causal", min(shape[2], 32)
        q, k, v = (torch.randn(shape, device=self.device).to(DTYPES[dtype]).requires_grad_() for _ in range(3))
        dy = torch.randn_like(q)
        # The last queries of the first head.
        part = lambda x: x[0, 0].detach().double()
        scores = (part(q)[-rows:] @ part(k).t()) / math.sqrt(d)
        future = torch.ones(rows, t, dtype=torch.bool, device=self.device).triu(t - rows + 1)
        exact = (scores.masked_fill(future, -math.inf) if causal else scores).softmax(-1) @ part(v)

        def peak(work):
            """Memory beyond the arguments; None on the CPU, where PyTorch does not count."""
            if not self.timer.cuda:
                return {}
            work()
            q.grad = k.grad = v.grad = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            work()
            torch.cuda.synchronize()
            return {"peak_bytes": torch.cuda.max_memory_allocated() - before}

        def measure(backend):
            with sdpa_kernel(backend):
                call = lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=drop_p, is_causal=causal)
                off = lambda y: ((y.double() - exact).norm() / exact.norm()).item()
                with torch.no_grad():
                    one = off(call()[0, 0, -rows:])
                    if drop_p == 0:
                        assert one <= TOLERANCE[dtype], f"{backend}: off by {one:.1e}"
                    else:
                        # The mask stays inside; the mean over draws must approach the undropped output.
                        mean = sum(call()[0, 0, -rows:].double() for _ in range(16)) / 16
                        assert TOLERANCE[dtype] < one and off(mean) < one / 2, f"{backend}: {one:.1e}, mean {off(mean):.1e}"
                    timing = self.timer.time(1, lambda _: call())
                    memory = peak(call)
                flop = 4 * b * h * t * t * d / (2 if causal else 1)
                name = backend.name.lower()
                self.add(name, op, "forward", dtype, drop_p, shape, timing, flop=flop, **memory)

                def forward_backward(_):
                    q.grad = k.grad = v.grad = None
                    call().backward(dy)
                    return q.grad

                timing = self.timer.time(1, forward_backward)
                memory = peak(lambda: forward_backward(0))
                self.add(name, op, "forward_backward", dtype, drop_p, shape, timing, flop=3.5 * flop, **memory)

        for backend in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION,
                        SDPBackend.CUDNN_ATTENTION):
            what = f"{op}, {backend.name}, {dtype}, drop p {drop_p}, {shape}"
            self.attempt(what, functools.partial(measure, backend), may_lack=True)

    def steps(self, shape, heads, dtype, drop_p):
        if drop_p == 0:
            run, flop = matrix_products(shape, 96, heads, DTYPES[dtype], self.device)
            self.add("matrix products alone", "gpt_step", "training_step", dtype, 0.0, shape,
                     self.timer.time(1, lambda _: run()), flop=flop)
        for variant in ["eager"] + (["compile"] if self.args.compile else []):
            def measure():
                torch.compiler.reset()
                step = gpt_step(shape, 96, heads, DTYPES[dtype], drop_p, self.device, variant == "compile")
                self.add(variant, "gpt_step", "training_step", dtype, drop_p, shape,
                         self.timer.time(1, lambda _: step()))
            what = f"GPT step, {variant}, {dtype}, drop p {drop_p}"
            self.attempt(what, measure, may_lack=variant != "eager")


def find_results(out, device, section):
    """The newest results of this device with that section."""
    name = torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu"
    found = []
    for path in glob.glob(os.path.join(out, "*.json")):
        with open(path, encoding="utf-8") as file:
            try:
                results = json.load(file)
            except ValueError:
                continue
        if isinstance(results, dict) and results.get("device") == name and section in results.get("sections", {}):
            found.append((os.path.getmtime(path), path, results))
    if not found:
        sys.exit(f"no results of {name} with a section `{section}` in {out}; first run: gpu_bundle bench "
                 f"--section {section} --device {device.type} --out {out}")
    return max(found, key=lambda entry: entry[:2])[1:]


COLUMNS = [("candle-dropout", "fused"), ("candle-dropout", "unfused"), ("candle", "chain"),
           ("pytorch", "eager"), ("pytorch", "compile"), ("pytorch", "triton")]


def tables(records, missing, wrong):
    """The ratios, and the part of them that a README wants."""
    by_case = collections.OrderedDict()
    for r in records:
        if r["pass"] != "backward" and r["op"] not in ATTENTION and "alone" not in r["variant"]:
            case = (r["op"], r["pass"], r["dtype"], round(r["drop_p"], 4), tuple(r["shape"]))
            by_case.setdefault(case, {})[(r["library"], r["variant"])] = r["ms"]
    columns = [c for c in COLUMNS if any(c in row for row in by_case.values())]
    head = "| op | pass | dtype | drop p | shape | " + " | ".join(f"{l}, {v}" for l, v in columns) + " |\n"
    head += "|---" * (5 + len(columns)) + "|\n"
    body, snippet = "", ""
    for (op, which, dtype, drop_p, shape), row in by_case.items():
        ours = row.get(columns[0])
        if not ours and op != "copy":
            continue  # forms that only ours are compared with
        cells = []
        for column in columns:
            ms = row.get(column)
            ratio = f" ({ms / ours:.2f}x)" if ms and ours and column != columns[0] else ""
            cells.append(f"{short(ms)} ms{ratio}" if ms else "-")
        line = f"| `{op}` | {which} | {dtype} | {drop_p} | {list(shape)} | " + " | ".join(cells) + " |\n"
        body += line
        if drop_p > 0 or op in UNDROPPED:
            snippet += line
    text = "Times a call; in brackets, over that of `candle-dropout, fused`.\n\n" + head + body if body else ""
    if not snippet:
        head = ""
    attention = [r for r in records if r["op"] in ATTENTION]
    if attention:
        snippet += attention_snippet(attention)
        case = lambda r: (r["op"], r["pass"], r["dtype"], r["shape"])
        form = lambda r: (r["library"], r["variant"])
        text += "\nAttention, shape [batch, heads, tokens, columns of a head]; \"dropout\" is the time over that "
        text += "without, \"ours\" the time over that of candle-dropout, fused:\n\n"
        text += "| op | pass | dtype | shape | drop p | form | ms | TFLOP/s | ours | dropout | peak |\n"
        text += "|---" * 11 + "|\n"
        attention.sort(key=lambda r: (*map(str, case(r)), r["drop_p"], form(r)))
        for r in attention:
            like = [o for o in attention if case(o) == case(r)]
            ours = [o["ms"] for o in like if form(o) == ("candle-dropout", "fused")
                    and round(o["drop_p"], 4) == round(r["drop_p"], 4)]
            undropped = [o["ms"] for o in like if form(o) == form(r) and o["drop_p"] == 0 < r["drop_p"]]
            cost = f"{r['ms'] / undropped[0] - 1:+.0%}" if undropped else "-"
            peak = f"{r['peak_bytes'] / 1e6:.1f} MB" if r.get("peak_bytes") else "-"
            text += (f"| `{r['op']}` | {r['pass']} | {r['dtype']} | {list(r['shape'])} | {round(r['drop_p'], 4)} | "
                     f"{r['library']}, {r['variant']} | {r['ms']:.3f} | {r['flop'] / r['ms'] / 1e9:.3f} | "
                     f"{r['ms'] / ours[0]:.2f}x | {cost} | {peak} |\n" if ours else "")
    alone = [r for r in records if "alone" in r["variant"]]
    for r in alone:
        text += (f"\nThe matrix products of the step alone, {r['library']}, {r['dtype']}: {r['ms']:.1f} ms, "
                 f"{r['flop'] / r['ms'] / 1e6:.0f} GFLOP/s.\n")
    for title, cases in [("Failed or wrong, so not timed", wrong), ("Not available here", missing)]:
        if cases:
            text += f"\n{title}:\n\n" + "".join(f"- {what}\n" for what in cases)
    return text, head + snippet


def short(number):
    return f"{float(f'{number:.3g}'):g}"


def attention_snippet(records):
    """A line for each shape: ours without dropout and with it, forward and with backward, and of each the time of the
    fastest of PyTorch's backends over it."""
    cases, rates = collections.OrderedDict(), sorted({round(r["drop_p"], 4) for r in records})
    for r in records:
        case = cases.setdefault((r["dtype"], tuple(r["shape"]), r["op"]), {})
        form = "pytorch" if is_peer_record(r) else r["variant"]
        case.setdefault((form, r["pass"], round(r["drop_p"], 4)), []).append(r)
    best = lambda case, form, which, p: min(case.get((form, which, p), []), key=lambda r: r["ms"], default=None)
    text = "\n| dtype | [B, H, S, D] | |"
    for p in rates:
        text += f" p = {p:.2g} | PyTorch |"
    text += " GFLOP/s | materialised | peak memory, ours and materialised |\n" + "|---" * (6 + 2 * len(rates)) + "|\n"
    for (dtype, shape, op), case in cases.items():
        def both(show, form, p):
            pairs = [(best(case, form, which, p), best(case, "fused", which, p)) for which in ("forward", "forward_backward")]
            return ", ".join(show(*pair) if all(pair) else "-" for pair in pairs)

        over = lambda r, ours: f"{r['ms'] / ours['ms']:.2f}x"
        text += f"| {dtype} | {list(shape)} | {'causal' if op == 'attention_causal' else 'full'} |"
        for p in rates:
            fastest = (best(case, "pytorch", which, p) for which in ("forward", "forward_backward"))
            name = "".join(f" {variant}" for variant in sorted({r["variant"] for r in fastest if r}))
            text += f" {both(lambda r, _: short(r['ms']), 'fused', p)} | {both(over, 'pytorch', p)}{name} |"
        ours, theirs = (best(case, form, "forward_backward", rates[-1]) for form in ("fused", "materialised"))
        peak = lambda r: f"{r['peak_bytes'] / 1e6:.0f}" if r and r.get("peak_bytes") else "-"
        rate = f"{ours['flop'] / ours['ms'] / 1e6:.0f}" if ours else "-"
        text += f" {rate} | {both(over, 'materialised', rates[-1])} | {peak(ours)}, {peak(theirs)} MB |\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results", help="folder with the results of gpu_bundle")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--section", default="peers", help="of those results, to read and to add to")
    parser.add_argument("--small", action="store_true", help="does it run? its times mean nothing")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: PyTorch sees none", file=sys.stderr)
        sys.exit(3)
    torch.manual_seed(0)
    path, results = find_results(args.out, device, args.section)
    section = results["sections"][args.section]
    records = [r for r in section["data"]["records"] if not is_peer_record(r)]
    peers = Peers(device, args)
    save = functools.partial(save_results, path, results, dict(section), records, peers, time.perf_counter())
    seen = set()
    for r in records:
        case = (r["op"], r["dtype"], round(r["drop_p"], 4), tuple(r["shape"]))
        if r["library"] == "candle" and r["op"] != "copy" and r["op"] != "gpt_step" or case in seen:
            continue
        seen.add(case)
        op, dtype, drop_p, shape = case
        heads = max(4, shape[2] // 64) if op == "gpt_step" else None
        if op in OPS or op in UNDROPPED:
            measure = lambda: peers.op(op, dtype, drop_p, shape)
        elif op in ATTENTION:
            measure = lambda: peers.attention(op, dtype, shape, drop_p)
        elif op == "copy":
            measure = lambda: peers.copy(dtype, shape)
        elif op == "gpt_step":
            measure = lambda: peers.steps(shape, heads, dtype, drop_p)
        else:
            continue
        peers.attempt(f"{op}, {dtype}, drop p {drop_p}, {shape}", measure)
        save()
    print(save())
    sys.exit(1 if peers.wrong else 0)


def save_results(path, results, section, records, peers, begin):
    """Writes what is known so far beside what `gpu_bundle` measured: JSON, the tables, and the README's part."""
    versions = f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    wrong = section["data"].get("failures", []) + peers.wrong
    text, snippet = tables(records + peers.records, peers.missing, wrong)
    text = f"{versions}. {text}"
    if not section["data"].get("complete", True):
        text = f"The run of gpu_bundle was stopped before its end. {text}"
    data = dict(section["data"], records=records + peers.records)
    data["pytorch"] = {"version": torch.__version__, "threads": torch.get_num_threads(),
                       "not_available": peers.missing, "wrong": peers.wrong}
    results["sections"][peers.args.section] = dict(
        section,
        markdown=text,
        seconds=section["seconds"] + time.perf_counter() - begin,
        command=section["command"] + "; " + " ".join([os.path.basename(sys.argv[0])] + sys.argv[1:]),
        load_average=section["load_average"] + "; " + " ".join(f"{load:.2f}" for load in os.getloadavg()),
        data=data,
    )
    section = results["sections"][peers.args.section]
    stem = path[: -len(".json")]
    readme = f"{stem}-{peers.args.section}-readme.md"
    place = results["device"] if results["device"] != "cpu" else results["cpu"]
    replace(path, json.dumps(results, indent=2) + "\n")
    replace(stem + ".md", markdown(results))
    replace(readme, f"Measured on {place} ({results['threads']} threads) on {results['date']}, commit "
                    f"{section['commit']}, {versions}, load average {section['load_average']}, all in one run: "
                    f"`run.sh peers`. In brackets, the time over that of the fused op.\n\n{snippet}")
    return f"{text}\nwritten to {path}, {stem}.md and {readme}"


def replace(path, text):
    """Writes a file as a whole: who is stopped on the way leaves the one before."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)


def markdown(results):
    """As results.rs writes it."""
    text = f"# {results['device']} on {results['date']}\n\nCPU: {results['cpu']}, {results['threads']} threads.\n"
    for name, section in sorted(results["sections"].items()):
        text += (f"\n## {name}\n\n`{section['command']}`, commit {section['commit']}, "
                 f"{section['seconds']:.0f} s, load average {section['load_average']}.\n\n"
                 f"{section['markdown']}\n")
    return text.rstrip() + "\n"


if __name__ == "__main__":
    main()
