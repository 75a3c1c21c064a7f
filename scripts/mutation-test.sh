#!/usr/bin/env bash
# Proves that the kernel tests would notice a fault: `scripts/mutation-test.sh [kernels/op.cu ..]`.
#
# Breaks the kernels in one place at a time and demands that a test of tests/kernels-on-cpu/ fails:
#
#   - a barrier or a wait goes: a statement __syncthreads(), __syncwarp(..) or cp_async_wait..(..);
#   - a tail predicate goes. Kernels mark those by `// tail` at the end of the line that holds one:
#       if (i < n) y[i] = ..;  // tail        becomes  if (true) ..
#       if (i >= n) return;    // tail        the line goes; likewise continue and break
#   - a tail predicate is off by one: the last comparison of a marked line gets `1 +` on its right;
#   - the meaning of a line is wrong: the edits that list_edits names.
#
# A mutant that passes every test is a survivor; the script lists them and fails. Then either a case is
# missing, or the line does not matter and can go. Only the tests of the affected ops run. A marker
# cannot stand in a macro, where a comment would swallow the next line; macros hold no logic anyway.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- kernels/*.cuh kernels/*.cu

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
tests="$(cargo test --release --test kernels-on-cpu --no-run 2>&1 | tee /dev/stderr |
  sed -n 's/^ *Executable .*(\(.*\))$/\1/p')"
"$tests" --list --format terse | sed -n 's/: test$//p' >"$work/tests"
export tests work

# One mutant a line: file, line number, kind, and the sed command that makes it.
list_mutants() {
  local wait='(__syncthreads|__syncwarp|cp_async_wait\w*(<[^>]*>)?)\([^;]*\);'
  { grep -nE "$wait" "$1" || true; } | cut -d: -f1 | while read -r line; do
    printf '%s\t%s\t%s\t%s\n' "$1" "$line" 'wait removed' "${line}s/$wait/;/"
  done
  { grep -nE '// tail$' "$1" || true; } | while IFS=: read -r line text; do
    case "$text" in
      *'if ('*return* | *'if ('*continue* | *'if ('*break*)
        printf '%s\t%s\t%s\t%s\n' "$1" "$line" 'tail removed' "${line}d" ;;
      *'if ('*)
        # From `if (` to the parenthesis that precedes the body or the brace.
        printf '%s\t%s\t%s\t%s\n' "$1" "$line" 'tail removed' "${line}s/if \((\([^()]*\)|[^()])*\)/if (true)/" ;;
    esac
    if grep -qE ' (<|<=|>|>=) ' <<<"$text"; then
      printf '%s\t%s\t%s\t%s\n' "$1" "$line" 'tail off by one' "${line}s/(.*) (<|<=|>|>=) /\1 \2 1 + /"
    fi
  done
}

# Faults that no marker stands for: file, what goes wrong, and a sed command that changes one line. An edit
# that no longer fits its kernel changes nothing and counts as a failure.
list_edits() {
  local edits='
kernels/rows.cuh|first digit alone|s/mapped \+= row % size\[group\] \* stride\[group\];/return mapped + row * stride[group];/
kernels/rows.cuh|last digit lost|s/return mapped \+ row \* stride\[3\];/return mapped;/
kernels/rows.cuh|base lost|s/mapped = base;/mapped = 0;/
kernels/philox.cuh|row of 32 bits|s/c1 = uint32_t\(row >> 32\)/c1 = 0/
kernels/philox.cuh|column of 32 bits|s/uint32_t\(\(mask\.col_0 \+ col\) \/ 8\)/uint32_t(mask.col_0 + col) \/ 8/
kernels/philox.cuh|window column lost|s/int\(\(mask\.col_0 \+ col\) % 8\)/int(col % 8)/
kernels/philox.cuh|threshold kept|s/return draw < mask/return draw <= mask/
kernels/philox.cuh|six rounds|s/round < 7/round < 6/
kernels/dropout.cu|drops by product|s/keeps\(mask, draws\[j\]\) \? __fmul_rn\(v\[j\], mask\.scale\) : 0\.f/__fmul_rn(v[j], keeps(mask, draws[j]) ? mask.scale : 0.f)/
kernels/dropout.cu|aligned draws|s/VECTOR \? draw\(mask/true ? draw(mask/
kernels/dropout_add.cu|drops by product|s/r\[j\] = keeps\(mask, draws\[j\]\) \? kept : r\[j\];/r[j] = __fadd_rn(r[j], __fmul_rn(branch, keeps(mask, draws[j]) ? mask.scale : 0.f));/
kernels/dropout_add.cu|sums drop by product|s/keeps\(mask, draws\[j\]\) \? g\[j\] \* mask\.scale : 0\.f/g[j] * (keeps(mask, draws[j]) ? mask.scale : 0.f)/
kernels/dropout_add.cu|sums, aligned draws|/g\[WIDTH\];/,/float v/s/VECTOR \? draw\(mask/true ? draw(mask/
kernels/drop_path_add.cu|window row lost|s/mask\.rows\.map\(0\)/0/
kernels/drop_path_add.cu|adds what is dropped|s/\} else if \(keep\) \{/} else {/
kernels/drop_path_kept.cu|adds what is dropped|s/\} else if \(keep\) \{/} else {/
kernels/drop_path_kept.cu|place unused|s/keep \? place \* size : 0/keep ? sample * size : 0/
kernels/drop_path_kept.cu|scale lost|s/__fmul_rn\(v\[j\], scale\)/v[j]/
kernels/rope.cu|rotates forwards|s/s\[j\] \*= args\.sin_sign/s[j] *= 1.f/
kernels/rope.cu|first element overwritten|s/x2 = __fadd_rn\(__fmul_rn\(x1, sin\)/x2 = __fadd_rn(__fmul_rn(y1, sin)/
kernels/rope.cu|tables of one batch|s/batch \* args\.table_stride \+ position/position/
kernels/rope.cu|strides unused|s/position \* args\.x_strides\[2\]/position * head_size/
kernels/rope.cu|aligned strides|s/\(args\.half \| strides\) % WIDTH/args.half % WIDTH/
kernels/rope.cu|second half of the angles lost|s/high\[2 \* \(j - HALF\) \+ 1\], cos\[j\]/high[2 * (j - HALF) + 1], cos[j - HALF]/
kernels/cross_entropy.cu|first maximum stays|s/if \(grown > max\) \{/if (grown > max \&\& max == -INFINITY) {/
kernels/cross_entropy.cu|sum not rescaled|s/exponentials \*= exponential<T>\(max - grown\);.*/exponentials *= 1.f;/
kernels/cross_entropy.cu|threads not rescaled|s/exponential<T>\(thread_max - sums\.shift\(\)\);.*/1.f;/
kernels/cross_entropy.cu|ignored rows count|s/args\.ignored\(targets\[r\]\) \? 0\. : 1\./1./
kernels/cross_entropy.cu|smoothing lost|s/if \(args\.uniform != 0\.\) \{/if (false) {/
kernels/cross_entropy.cu|target read unchecked|s/const bool is_class = args\.is_class\(target\);/const bool is_class = true;/
kernels/cross_entropy.cu|head of a row lost|s/body\(i < head \? i : i \+ middle\)/body(i + middle)/
kernels/cross_entropy.cu|rows all aligned|s/head = min\(uint64_t\(-reinterpret.*/head = 0;/
kernels/cross_entropy.cu|target of the vector|s/target - int64_t\(parts\.head \+ col\)/target - int64_t(col)/
kernels/cross_entropy.cu|other alignment of the gradient|s/\) % 16 == 0;/) % 16 >= 0;/
kernels/softmax_dropout.cu|queries of all heads|s/row % queries/row/
kernels/softmax_dropout.cu|gradient scale|s/float\(args\.grad_scale\)/float(args.scale)/
kernels/softmax_dropout.cu|drops by product|s/keeps\(drop, draws\[j\]\) \? e\[j\] \* scale : 0\.f/e[j] * (keeps(drop, draws[j]) ? scale : 0.f)/
kernels/softmax_dropout.cu|dP drops by product|s/keeps\(drop, draws\[j\]\) \? dp\[i\]\[j\] \* drop\.scale : 0\.f/dp[i][j] * (keeps(drop, draws[j]) ? drop.scale : 0.f)/
kernels/softmax_dropout.cu|masked keys pass on|s/e\[j\] == 0\.f \? 0\.f : e\[j\] \* dp/e[j] * dp/
kernels/dropout_add_norm.cu|drops by product|s/rounded<T>\(keeps\(mask, draws\[j\]\) \? kept : s\[j\]\)/rounded<T>(s[j] + v[j] * (keeps(mask, draws[j]) ? mask.scale : 0.f))/
kernels/dropout_add_norm.cu|statistics unrounded|s/v\[j\] = rounded<T>\(/v[j] = (/
kernels/activation_dropout.cu|drops by product|s/keeps\(mask, draws\[j\]\) \? a \* mask\.scale : 0\.f/a * (keeps(mask, draws[j]) ? mask.scale : 0.f)/
kernels/activation_dropout.cu|slope of what drops|s/da == 0\.f \? 0\.f : da \* slope/da * slope/
kernels/activation_dropout.cu|dy drops by product|s/keeps\(mask, draws\[j\]\) \? da\[j\] \* mask\.scale : 0\.f/da[j] * (keeps(mask, draws[j]) ? mask.scale : 0.f)/
'
  local file fault edit line
  while IFS='|' read -r file fault edit; do
    [ "$file" = "$1" ] || continue
    line="$(sed -E "$edit" "$1" | cmp - "$1" 2>&1 | sed -n 's/.*line //p' || true)"
    printf '%s\t%s\t%s\t%s\n' "$1" "${line:-1}" "$fault" "$edit"
  done <<<"$edits"
}

# The ops whose kernels hold a file: its own, or for a header those that include it, at any depth.
ops_of() {
  case "$1" in
    *.cu) basename "$1" .cu ;;
    *)
      # `dropout` first: it is the fastest to build and run.
      grep -l "#include \"$(basename "$1")\"" kernels/* | while read -r includer; do ops_of "$includer"; done |
        sort -u | sed -n '/^dropout$/!H;/^dropout$/p;${x;s/^\n//p}' ;;
  esac
}

# Tries one mutant; prints one line about it.
try_mutant() {
  local file line kind edit where folder op verdict=SURVIVED
  IFS=$'\t' read -r file line kind edit <<<"$1"
  folder="$(mktemp -d "$work/mutant.XXXXXX")"
  cp kernels/* "$folder"
  sed -E -i "$edit" "$folder/$(basename "$file")"
  if cmp -s "$file" "$folder/$(basename "$file")"; then
    verdict='NOT CHANGED'
  else
    for op in $(ops_of "$file"); do
      # shellcheck disable=SC2046 # one argument a test
      if ! CANDLE_DROPOUT_KERNELS="$folder" timeout 300 "$tests" --exact $(grep "^$op::" "$work/tests") >"$folder/log" 2>&1; then
        verdict=caught
        if grep -q 'could not compile' "$folder/log"; then verdict='NOT COMPILED'; fi
        break
      fi
    done
  fi
  rm -rf "$folder"
  printf '%-12s %-20s %s:%s: %s\n' "$verdict" "$kind" "$file" "$line" "$(sed -n "${line}s/^ *//p" "$file")"
}
export -f try_mutant ops_of

for file in "$@"; do list_mutants "$file"; list_edits "$file"; done >"$work/mutants"
echo "$(wc -l <"$work/mutants") mutants" >&2
xargs -d '\n' -P "$(nproc)" -I{} bash -c 'try_mutant "$1"' _ {} <"$work/mutants" | tee "$work/verdicts"

if grep -v '^caught' "$work/verdicts" >"$work/failures"; then
  printf '\nNot caught:\n' >&2
  cat "$work/failures" >&2
  exit 1
fi
