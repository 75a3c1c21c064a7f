#!/usr/bin/env bash
# Proves that the kernel tests would notice a fault: `scripts/mutation-test.sh [kernels/op.cu ..]`.
#
# Breaks the kernels in one place at a time and demands that a test of tests/kernels-on-cpu/ fails:
#
#   - a barrier or a wait goes: a statement __syncthreads(), __syncwarp(..) or cp_async_wait..(..);
#   - a tail predicate goes. Kernels mark those by `// tail` at the end of the line that holds one:
#       if (i < n) y[i] = ..;  // tail        becomes  if (true) ..
#       if (i >= n) return;    // tail        the line goes; likewise continue and break
#   - a tail predicate is off by one: the last comparison of a marked line gets `1 +` on its right.
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

# The ops whose kernels hold a file: its own, or for a header those that include it, at any depth.
ops_of() {
  case "$1" in
    *.cu) basename "$1" .cu ;;
    *)
      grep -l "#include \"$(basename "$1")\"" kernels/* | while read -r includer; do ops_of "$includer"; done | sort -u ;;
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
  printf '%-12s %-16s %s:%s: %s\n' "$verdict" "$kind" "$file" "$line" "$(sed -n "${line}s/^ *//p" "$file")"
}
export -f try_mutant ops_of

for file in "$@"; do list_mutants "$file"; done >"$work/mutants"
echo "$(wc -l <"$work/mutants") mutants" >&2
xargs -d '\n' -P "$(nproc)" -I{} bash -c 'try_mutant "$1"' _ {} <"$work/mutants" | tee "$work/verdicts"

if grep -v '^caught' "$work/verdicts" >"$work/failures"; then
  printf '\nNot caught:\n' >&2
  cat "$work/failures" >&2
  exit 1
fi
