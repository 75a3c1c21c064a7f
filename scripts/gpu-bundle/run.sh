#!/usr/bin/env bash
# Checks and measures candle-dropout on this machine. No Rust, no root, no network.
#
#   ./run.sh [correctness] [sanitize] [bench] [peers] [memory] [train]      in this order; all by default
#
#   correctness  every op, forward and each gradient, against its formula and against the CPU
#   sanitize     compute-sanitizer (memcheck, racecheck, initcheck) on a small run of the above
#   bench        every op against a plain copy and candle's own chain of ops, sizes up to 1 GB
#   peers        ours and PyTorch's, same shapes, in one go, with their ratios
#   memory       peak memory of a training step
#   train        the main job: which dropout for pretraining, which for fine-tuning?
#
# Variables: OUT, the folder for results (./results); PYTHON, an interpreter with PyTorch (python3);
# SMALL=1, a run of seconds whose times mean nothing; and where time is short:
# ONLY, the parts of bench and peers to measure: ops, attention, kept or step, several with commas (all);
# DTYPES, f32, f16 or bf16, likewise (bench: all; peers: bf16, on the CPU f32); SIZES, bytes of x, likewise;
# LIMIT, seconds that a program may take (any).
#
# Results: <device>-<date>.json, .md, .svg and -peers-readme.md, train.json, .md, .svg, run.log. bench and peers
# save what they have after each measurement; choices have sections of their own, so one run adds to another.
#
# Exit codes: 0 all right, 1 something failed (the end of the output says what), 2 bad arguments,
# 3 no CUDA device here: the CPU half of each ran instead, and was right.
set -uo pipefail

invoked_from="$PWD"
outer_library_path="${LD_LIBRARY_PATH:-}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${OUT:-results}"
case "$out" in /*) ;; *) out="$invoked_from/$out" ;; esac
python="${PYTHON:-python3}"
small=()
[ "${SMALL:-0}" = 0 ] || small=(--small)
only=()
[ -z "${ONLY:-}" ] || only=(--only "$ONLY")
choice="${ONLY:+-$ONLY}${DTYPES:+-$DTYPES}${SIZES:+-$SIZES}"
choice="${choice//,/_}"
limited=()
[ -z "${LIMIT:-}" ] || limited=(timeout --foreground -k 10 "$LIMIT")
all=(correctness sanitize bench peers memory train)

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
case "${1:-}" in -h | --help | help) usage; exit 0 ;; esac
wanted=" $* "
for step in "$@"; do
  case " ${all[*]} " in
    *" $step "*) ;;
    *) echo "run.sh: expected one of ${all[*]}, got $step; ./run.sh --help" >&2; exit 2 ;;
  esac
done
[ $# -gt 0 ] || wanted=" ${all[*]} "

mkdir -p "$out" || exit 2
# Everything that is printed is also kept.
exec > >(tee -a "$out/run.log") 2>&1
log=$!
say() { printf '\n== %s\n' "$*"; }
problem() { printf '\nPROBLEM: %s\n' "$*"; }
cd "$here" || exit 2

# ---- what is here? ----

# Folders that may hold the driver's library or the CUDA runtime, in the order of the search.
library_folders() {
  local folder
  tr : '\n' <<<"${LD_LIBRARY_PATH:-}"
  for folder in /usr/lib/x86_64-linux-gnu /usr/lib64 /usr/lib /usr/lib/wsl/lib /run/opengl-driver/lib \
    /usr/local/nvidia/lib64 /usr/local/nvidia/lib "${CUDA_HOME:-/usr/local/cuda}"/lib64 \
    /usr/local/cuda*/lib64 /usr/local/cuda*/targets/x86_64-linux/lib /opt/cuda/lib64; do
    echo "$folder"
  done
  # pip's wheels, of the interpreter that was given and of python3.
  for interpreter in "$python" python3; do
    "$interpreter" -c 'import glob, os, sys
for path in sys.path:
    for folder in sorted(glob.glob(os.path.join(path, "nvidia", "*", "lib"))):
        print(folder)' 2>/dev/null
  done
}

# The folder that holds a library, or nothing.
find_library() {
  local name="$1" folder
  while read -r folder; do
    if [ -n "$folder" ] && [ -e "$folder/$name" ]; then echo "$folder"; return; fi
  done <<<"$folders"
  PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null | sed -n "s|.* => \(.*\)/$name\$|\1|p" | head -n 1
}

# Sets `no_device` to the reason why CUDA cannot be used, or leaves it empty and sets the library path.
look_for_device() {
  no_device=
  folders="$(library_folders)"
  local name folder missing=() path=() driver
  if [ -z "$(find_library libcuda.so.1)" ]; then
    no_device="libcuda.so.1 is not on this machine: it comes with NVIDIA's driver (580 or later), and in a \
container with --gpus all"
    return
  fi
  if command -v nvidia-smi >/dev/null; then
    if ! driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1 | head -n 1)"; then
      no_device="nvidia-smi fails: $driver"
      return
    fi
    case "$driver" in
      [0-9]*)
        if [ "${driver%%.*}" -lt 580 ]; then
          no_device="the driver is version $driver; CUDA 13 needs 580 or later"
          return
        fi ;;
      *) no_device="nvidia-smi says: $driver"; return ;;
    esac
  fi
  while read -r name; do
    folder="$(find_library "$name")"
    if [ -n "$folder" ]; then path+=("$folder"); else missing+=("$name"); fi
  done <bin/needed
  if [ ${#missing[@]} -gt 0 ]; then
    problem "the CUDA 13 runtime lacks ${missing[*]}. Install the CUDA toolkit 13, or: \
pip install 'nvidia-cuda-runtime==13.0.*' 'nvidia-cublas==13.0.*' 'nvidia-curand==10.4.0.*'; or add its \
folder to LD_LIBRARY_PATH. Looked in:"
    sed '/^$/d;s/^/  /' <<<"$folders"
    exit 1
  fi
  library_path="$(printf '%s\n' "${path[@]}" | awk '!seen[$0]++' | paste -sd :)"
  # The search of the loader comes first: a driver's libcuda must not hide behind a stub.
  library_path="$library_path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  LD_LIBRARY_PATH="$library_path" bin/gpu_bundle-cuda memory --small --device cuda --out "$probe" >"$probe/log" 2>&1
  case $? in
    0) ;;
    3) no_device="$(sed -n 's/^no CUDA device: //p' "$probe/log")" ;;
    *) problem "the CUDA program does not run:"; cat "$probe/log"; exit 1 ;;
  esac
}

probe="$(mktemp -d)"
# The log is whole before the script is gone.
trap 'rm -rf "$probe"; exec >&- 2>&-; wait "$log"' EXIT
say "candle-dropout, commit $(cat commit), $(date -u +%Y-%m-%dT%H:%MZ)"
uname -srm
look_for_device
if [ -z "$no_device" ]; then
  device=cuda
  export LD_LIBRARY_PATH="$library_path"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
else
  device=cpu
  echo "no CUDA device: $no_device."
  echo "Running the CPU half of each step; the exit code will be 3."
fi
bundle() { "${limited[@]}" "bin/gpu_bundle-$device" "$@"; }

# ---- the steps ----

failed=()
run_step() { # <step> <command..>
  local step="$1"
  shift
  "$@" || { problem "$step failed"; failed+=("$step"); }
}
is_wanted() { case "$wanted" in *" $1 "*) say "$1"; return 0 ;; *) return 1 ;; esac; }

sanitize() {
  local sanitizer tool status=0
  if [ "$device" = cpu ]; then
    echo "compute-sanitizer watches kernels on a GPU; there is none. The small run alone:"
    bundle correctness --small --out "$probe/sanitize"
    return
  fi
  sanitizer="$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" command -v compute-sanitizer)" || {
    echo "compute-sanitizer is not on PATH nor in ${CUDA_HOME:-/usr/local/cuda}/bin; it comes with the CUDA toolkit"
    return 1
  }
  # Races of cuBLAS are not ours to judge: racecheck looks at the kernels of this crate, whose names say of what
  # pass they are. (initcheck has to see who writes, whoever that is.)
  for tool in memcheck initcheck 'racecheck --kernel-regex kns=_fwd' 'racecheck --kernel-regex kns=_bwd' \
    'racecheck --kernel-regex kns=column_sums'; do
    echo "-- $tool"
    # shellcheck disable=SC2086 # a tool and its flags
    "${limited[@]}" "$sanitizer" --tool $tool --error-exitcode 9 bin/gpu_bundle-cuda correctness --small \
      --device cuda --out "$probe/sanitize" | tail -n 30 || status=1
  done
  return "$status"
}

# glibc hands large blocks back to the kernel as soon as they are free, and an op on the CPU then mostly waits
# for new pages. Kept instead, for PyTorch as for us.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"

peers() {
  local sizes=67108864 dtypes=f32 section="peers$choice"
  [ "$device" = cpu ] || { sizes=67108864,1073741824 && dtypes=bf16; }
  [ ${#small[@]} -eq 0 ] || sizes=16384
  # What fails is in the results, beside what does not.
  local status=0
  bundle bench --section "$section" --sizes "${SIZES:-$sizes}" --dtypes "${DTYPES:-$dtypes}" --device "$device" \
    --out "$out" "${only[@]}" "${small[@]}" || status=1
  LD_LIBRARY_PATH="$outer_library_path" "$python" -c 'import torch' 2>/dev/null || {
    echo "$python has no PyTorch; name an interpreter that has: PYTHON=/path/to/python ./run.sh peers"
    return 1
  }
  # Our library path is not PyTorch's, which brings its own libraries.
  LD_LIBRARY_PATH="$outer_library_path" "${limited[@]}" "$python" torch_peers.py --section "$section" \
    --device "$device" --out "$out" "${small[@]}" ${PEERS_FLAGS:-} || status=1
  return "$status"
}

train() {
  local preset=(--preset gpu)
  [ "$device" = cuda ] || preset=(--quick)
  [ ${#small[@]} -eq 0 ] || preset=(--quick)
  bundle train --device "$device" "${preset[@]}" --pretrain text/pretrain.txt --finetune text/finetune.txt \
    --out "$probe/train" || return
  local kind
  for kind in json md svg; do mv "$probe/train/report.$kind" "$out/train.$kind" || return; done
}

if is_wanted correctness; then
  run_step correctness bundle correctness --device "$device" --out "$out" "${small[@]}"
fi
if is_wanted sanitize; then run_step sanitize sanitize; fi
if is_wanted bench; then
  run_step bench bundle bench --section "bench$choice" --device "$device" --out "$out" "${only[@]}" \
    ${DTYPES:+--dtypes "$DTYPES"} ${SIZES:+--sizes "$SIZES"} "${small[@]}"
fi
if is_wanted peers; then run_step peers peers; fi
if is_wanted memory; then
  run_step memory bundle memory --device "$device" --out "$out" "${small[@]}"
fi
if is_wanted train; then run_step train train; fi

say "results in $out"
ls -l "$out"
if [ ${#failed[@]} -gt 0 ]; then
  problem "failed: ${failed[*]}"
  exit 1
fi
if [ -n "$no_device" ]; then
  printf '\nno CUDA device: %s.\nThe CPU half ran and was right; nothing ran on a GPU.\n' "$no_device"
  exit 3
fi
