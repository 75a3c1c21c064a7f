#!/usr/bin/env bash
# What the machine compiler makes of every kernel: `scripts/ptxas-check.sh [kernels/op.cu ..]`.
#
# nvcc does not look inside inline PTX, and a kernel that runs well on one architecture may spill on
# the next. So every kernel is compiled to PTX as the crate ships it (compute_80) and assembled for
# sm_80, sm_90, sm_100 and sm_120. An error, a spill or a stack frame fails the script,
# but for one that is named below.
#
# Prints a Markdown table: for each architecture registers a thread, and for sm_90 the loads and
# stores of 16 bytes that global memory is read and written with, out of all of them.
# Needs nvcc: eval "$(scripts/cuda-toolkit.sh)".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

architectures=(80 90 100 120)
command -v nvcc >/dev/null || { echo 'no nvcc on PATH; run: eval "$(scripts/cuda-toolkit.sh)"' >&2; exit 1; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
[ $# -gt 0 ] || set -- kernels/*.cu

# ptxas -v reports a kernel in two parts: "Function properties for <kernel>", then a line of stack and
# spills, then one of registers and shared memory. Turned into: kernel registers shared stack spills.
read_report='
  /Function properties for/ { kernel = $NF }
  /bytes stack frame/       { stack = $1; spills = $5 + $9 }
  /Used [0-9]+ registers/   {
    registers = shared = 0
    for (i = 2; i <= NF; ++i) {
      if ($i ~ /^registers/) registers = $(i - 1)
      if ($i == "bytes" && $(i + 1) ~ /^smem/) shared = $(i - 1)
    }
    print kernel, registers, shared, stack, spills
  }'

# Global accesses of each function in a disassembly: kernel wide_loads loads wide_stores stores.
count_accesses='
  /^\.text\./               { sub(/^\.text\./, ""); sub(/:.*/, ""); kernel = $0 }
  /LDG\.E/ && kernel        { ++loads[kernel];  if (/\.128/) ++wide_loads[kernel] }
  /STG\.E/ && kernel        { ++stores[kernel]; if (/\.128/) ++wide_stores[kernel] }
  { if (kernel) seen[kernel] }
  END { for (k in seen) print k, wide_loads[k] + 0, loads[k] + 0, wide_stores[k] + 0, stores[k] + 0 }'

failed=0
printf '| kernel |'; printf ' sm_%s |' "${architectures[@]}"; printf ' shared | 16-byte loads | 16-byte stores |\n'
printf '|---|'; printf -- '---|%.0s' "${architectures[@]}" _ _ _; printf '\n'
for source in "$@"; do
  op="$(basename "$source" .cu)"
  # The flags of build.rs.
  nvcc -ptx -std=c++17 -O3 -arch=compute_80 -o "$work/$op.ptx" "$source"
  for arch in "${architectures[@]}"; do
    if ! ptxas -v -arch="sm_$arch" -o "$work/$op.$arch.cubin" "$work/$op.ptx" 2>"$work/report"; then
      cat "$work/report" >&2
      exit 1
    fi
    awk "$read_report" "$work/report" | sort >"$work/$op.$arch"
    while read -r kernel _ _ stack spills; do
      # Known: ptxas's routine of 64-bit division keeps two words there; loops call it from 2^32 tiles on alone.
      [ "$kernel sm_$arch $stack $spills" = "activation_dropout_fwd_f32 sm_120 8 0" ] && continue
      if [ "$stack" -ne 0 ] || [ "$spills" -ne 0 ]; then
        echo "$kernel, sm_$arch: $stack bytes of stack, $spills bytes spilled" >&2
        failed=1
      fi
    done <"$work/$op.$arch"
  done
  nvdisasm -c "$work/$op.90.cubin" | awk "$count_accesses" | sort >"$work/$op.accesses"
  while read -r kernel _ shared _; do
    printf '| `%s` |' "$kernel"
    for arch in "${architectures[@]}"; do
      printf ' %s |' "$(awk -v k="$kernel" '$1 == k { print $2 }' "$work/$op.$arch")"
    done
    awk -v k="$kernel" -v s="$shared" '$1 == k { printf " %d | %d of %d | %d of %d |\n", s, $2, $3, $4, $5 }' "$work/$op.accesses"
  done <"$work/$op.90"
done
exit "$failed"
