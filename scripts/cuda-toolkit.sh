#!/usr/bin/env bash
# Sets up nvcc 13.0 and the CUDA libraries candle links, without root and without a GPU.
#
#   eval "$(scripts/cuda-toolkit.sh)"
#   CUDA_COMPUTE_CAP=80 cargo build --release --features cuda
#
# NVIDIA publishes the toolkit as wheels on the Python package index; unpacked side by side they
# form an ordinary CUDA_HOME. The first run downloads about 660 MB into the cache, later runs only
# print the exports. stdout carries nothing but the exports, so that `eval` is safe.
set -euo pipefail

wheels=(
  nvidia-cuda-nvcc==13.0.* nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.*
  nvidia-cuda-runtime==13.0.* nvidia-cuda-nvrtc==13.0.* nvidia-cuda-cccl==13.0.*
  nvidia-cublas==13.0.* nvidia-curand==10.4.0.*
  nvidia-cuda-nvdisasm==13.2.*          # the oldest published; reads the code of older assemblers
)
cache="${CANDLE_DROPOUT_CACHE:-$HOME/.cache/candle-dropout}/cuda"
cuda_home="$cache/nvidia/cu13"
stamp="$cache/installed"
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '%s\n' "cuda-toolkit: $*" >&2; }
die() { say "$*"; exit 1; }

# A pip to unpack wheels with: the system's, or that of a throw-away virtual environment
# (Debian's python3 comes without pip).
find_pip() {
  command -v python3 >/dev/null || die "python3 is needed to fetch the wheels; install python3 with pip or venv"
  if python3 -m pip --version >/dev/null 2>&1; then
    pip=(python3 -m pip)
  elif python3 -m venv "$1/venv" >&2; then
    pip=("$1/venv/bin/python" -m pip)
  else
    die "python3 has neither pip nor venv; install one of them (Debian: apt install python3-venv)"
  fi
}

# The linker asks for libfoo.so; wheels carry only libfoo.so.13.
add_linker_names() {
  local versioned
  ln -s lib "$1/lib64"
  for versioned in "$1"/lib/lib{cublas,cublasLt,cudart,curand,nvrtc}.so.*; do
    ln -s "${versioned##*/}" "${versioned%.so.*}.so"
  done
}

# libcuda belongs to the driver, so no wheel has it. Every `cu*` function that cudarc declares
# becomes a stub returning CUDA_ERROR_STUB_LIBRARY (34): enough to link anywhere, and enough for a
# `cuda` binary to start without a driver, get an error from `Device::new_cuda` and use the CPU.
#
# stubs/libcuda.so is for the linker, as in NVIDIA's own layout. The name that the loader looks for,
# libcuda.so.1, lives in a folder of its own: only a machine without a driver may search that.
build_driver_stub() {
  local sys names
  sys="$(cargo metadata --manifest-path "$repo/Cargo.toml" --features cuda --format-version 1 \
    | python3 -c 'import json, os, sys
for package in json.load(sys.stdin)["packages"]:
    if package["name"] == "cudarc":
        print(os.path.join(os.path.dirname(package["manifest_path"]), "src/driver/sys/mod.rs"))')"
  names="$(grep -oE 'fn cu[A-Z]\w*' "$sys" | sed 's/^fn //' | sort -u)"
  [ -n "$names" ] || die "found no driver functions in $sys"
  mkdir -p "$1/lib/stubs" "$1/lib/no-driver"
  sed 's/.*/int &(void) { return 34; }/' <<<"$names" \
    | "${CC:-cc}" -shared -fPIC -Wl,-soname,libcuda.so.1 -x c -o "$1/lib/stubs/libcuda.so" -
  ln -s ../stubs/libcuda.so "$1/lib/no-driver/libcuda.so.1"
  say "driver stub with $(wc -l <<<"$names") functions"
}

# Everything is made in a folder beside the final one and moved as a whole: an interrupted run
# leaves nothing that looks finished.
install() {
  local partial="$cache.partial.$$"
  trap 'rm -rf "$partial"' EXIT
  mkdir -p "$partial"
  find_pip "$partial"
  say "downloading the CUDA 13.0 wheels (about 660 MB, once) into $cache"
  "${pip[@]}" install --quiet --disable-pip-version-check --root-user-action=ignore \
    --no-deps --no-compile --target "$partial" "${wheels[@]}" >&2
  rm -rf "$partial/venv"
  add_linker_names "$partial/nvidia/cu13"
  build_driver_stub "$partial/nvidia/cu13"
  printf '%s\n' "${wheels[@]}" >"$partial/installed"
  rm -rf "$cache"
  mv "$partial" "$cache"
  trap - EXIT
  say "$("$cuda_home/bin/nvcc" --version | sed -n 4p)"
}

has_driver() {
  local ldconfig
  # No pipe into grep -q: it would leave early, and pipefail would take that for a failure.
  ldconfig="$(PATH="$PATH:/sbin:/usr/sbin" command -v ldconfig)" &&
    [[ "$("$ldconfig" -p)" == *libcuda.so.1* ]] && return
  ls /usr/lib/wsl/lib/libcuda.so.1 /run/opengl-driver/lib/libcuda.so.1 >/dev/null 2>&1
}

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || die "only x86-64 Linux is supported"
cmp -s "$stamp" <(printf '%s\n' "${wheels[@]}") || install

libraries="$cuda_home/lib"
has_driver || libraries="$libraries:$cuda_home/lib/no-driver"
cat <<EXPORTS
export CUDA_HOME='$cuda_home'
export PATH='$cuda_home/bin':"\$PATH"
export LD_LIBRARY_PATH='$libraries'"\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
EXPORTS
