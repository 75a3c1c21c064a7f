#!/usr/bin/env bash
# Packs what an NVIDIA machine without Rust needs to check and measure this crate:
#
#   scripts/gpu-bundle.sh                          # here; no GPU needed
#   tar xf gpu-bundle.tar.gz && ./run.sh           # there
#
# The tar holds examples/gpu_bundle built twice, with CUDA and without (a binary with CUDA does not even
# load where there is no driver), PyTorch's side of the comparison, text to train on, and run.sh.
# Needs nvcc: without one on PATH the script sets it up with scripts/cuda-toolkit.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=target/gpu-bundle
limit_mb=45
say() { printf '%s\n' "gpu-bundle: $*" >&2; }

if ! command -v nvcc >/dev/null; then
  exports="$(scripts/cuda-toolkit.sh)"
  eval "$exports"
fi
CANDLE_DROPOUT_COMMIT="$(git describe --always --dirty 2>/dev/null || echo unknown)"
# PTX of sm_80 runs on that and everything newer.
export CANDLE_DROPOUT_COMMIT CUDA_COMPUTE_CAP=80

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/bin" "$work/text" "$out"

# The paths of the executables, as cargo tells them: target directories move. The example is built, too, as for
# examples the features of dependencies are those that tests and lints have: candle is then compiled once.
build() { # <cpu or cuda> <flags of cargo>
  local flavour="$1" executable
  shift
  say "building for $flavour"
  executable="$(cargo build --locked --release --bins --examples "$@" --message-format json-render-diagnostics |
    python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "gpu_bundle":
        print(message["executable"])')"
  strip -o "$work/bin/gpu_bundle-$flavour" "$executable"
}
build cpu
build cuda --features cuda

# What the loader will look for on the other machine, but for what every Linux has.
readelf -d "$work/bin/gpu_bundle-cuda" | sed -n 's/.*(NEEDED).*\[\(libcu.*\)\]/\1/p' >"$work/bin/needed"

# The main job's GPU preset reads each of 16.5 million bytes once: source code of this crate's
# dependencies to pretrain on, their prose to fine-tune on, documents between form feeds. All of it is
# published under MIT or Apache-2.0; the first line of each document names its crate.
say "collecting text"
cargo metadata --locked --offline --features cuda --format-version 1 \
  --filter-platform x86_64-unknown-linux-gnu | python3 -c '
import json, os, sys
# Mostly tables and declarations.
SKIPPED = {"cudarc", "libc", "linux-raw-sys", "spm_precompiled", "typenum", "unicode-width"}
TOTAL, LARGEST = 24_000_000, 100_000
parts = {".rs": [], ".md": []}
for package in json.load(sys.stdin)["packages"]:
    license = package["license"] or ""
    if not package["source"] or package["name"] in SKIPPED or not ("MIT" in license or "Apache-2.0" in license):
        continue
    root, title = os.path.dirname(package["manifest_path"]), package["name"] + " " + package["version"]
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            path, kind = os.path.join(folder, file), os.path.splitext(file)[1]
            if kind in parts and 500 < os.path.getsize(path) < LARGEST:
                with open(path, encoding="utf-8", errors="ignore") as opened:
                    text = opened.read().replace("\f", "").replace("\0", "")
                parts[kind].append(f"// {title}, {license}: {os.path.relpath(path, root)}\n{text}")
for kind, name in ((".rs", "pretrain"), (".md", "finetune")):
    size, kept = 0, []
    # Spread over all crates: every so many-th document first.
    stride = 7
    for part in (part for start in range(stride) for part in parts[kind][start::stride]):
        if size < TOTAL:
            kept.append(part)
            size += len(part)
    with open(os.path.join(sys.argv[1], name + ".txt"), "w", encoding="utf-8") as out:
        out.write("\f".join(kept))
' "$work/text"

cp scripts/gpu-bundle/run.sh benches/peers/torch_peers.py LICENSE-MIT LICENSE-APACHE "$work"
echo "$CANDLE_DROPOUT_COMMIT" >"$work/commit"

tar -C "$work" --owner=0 --group=0 -c run.sh torch_peers.py LICENSE-MIT LICENSE-APACHE commit bin text |
  gzip -9 >"$out/gpu-bundle.tar.gz"
size_mb=$(($(stat -c %s "$out/gpu-bundle.tar.gz") / 1000000))
[ "$size_mb" -le "$limit_mb" ] || { say "the tar has $size_mb MB, more than $limit_mb"; exit 1; }
say "$out/gpu-bundle.tar.gz, $size_mb MB, from commit $CANDLE_DROPOUT_COMMIT; there:"
say "  tar xf gpu-bundle.tar.gz && ./run.sh"
