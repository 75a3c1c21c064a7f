#!/usr/bin/env bash
# Proves that the kernel tests would notice a fault: `scripts/mutation-test.sh [kernels/op.cu ..]`.
#
# Breaks the kernels in one place at a time and demands that a test of them on the host fails:
#
#   - a barrier or a wait goes: a statement __syncthreads(), __syncwarp(..) or cp_async_wait..(..);
#   - a tail predicate goes. Kernels mark those by `// tail` at the end of the line that holds one:
#       if (i < n) y[i] = ..;  // tail        becomes  if (true) ..
#       if (i >= n) return;    // tail        the line goes; likewise continue and break
#   - a tail predicate is off by one: the last comparison of a marked line gets `1 +` on its right;
#   - the meaning of a line is wrong: the tests that catch such a fault name it; see gather_edits.
#
# A mutant that passes every test is a survivor; the script lists them and fails. Then either a case is
# missing, or the line does not matter and can go. Only the tests of the affected kernel files run. A marker
# cannot stand in a macro, where a comment would swallow the next line; macros are entry points alone.
#
# MUTANTS=40 tries that many only: another choice whenever a kernel, one of those tests or this script changes,
# and the same until then.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- kernels/*.cuh kernels/*.cu

# Where the tests of the kernels are, and what builds them.
cases=tests/cases
build=(cargo test --release --lib --no-run)

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
tests="$("${build[@]}" 2>&1 | tee >(cat >&2) |
  sed -n 's/^ *Executable .*(\(.*\/cases-[^/]*\))$/\1/p')"
# Without a compiler no test would run: what is skipped has caught nothing.
export CANDLE_DROPOUT_REQUIRE_CXX=1
if ! "$tests" host::selftest >"$work/selftest" 2>&1; then
  grep -m 1 'no C++ compiler' "$work/selftest" >&2 || cat "$work/selftest" >&2
  exit 2
fi
"$tests" --list --format terse | sed -n 's/: test$//p' >"$work/tests"
export tests work cases

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

# Every fault that no marker stands for, one a line: file|what goes wrong|a sed command that changes one line. The
# tests that catch them name them, in lines of their own:
#     // mutant: what goes wrong|s/../../                          of the first kernel file that the tests run
#     // mutant of kernels/rows.cuh: what goes wrong|s/../../      of another file, such as a header
# An edit that no longer fits its file changes nothing and counts as a failure.
gather_edits() {
  grep -rlE '^// mutant' "$cases" | while read -r test; do
    own="$(sed -nE 's/.*Program::new\("([^"]*)"\).*/\1/p' "$test" | head -n 1)"
    sed -nE "s,^// mutant: ,$own|,p; s,^// mutant of ([^:]*): ,\1|,p" "$test"
  done
}

# Those of one file, as list_mutants prints them.
list_edits() {
  local file fault edit line
  while IFS='|' read -r file fault edit; do
    [ "$file" = "$1" ] || continue
    line="$(sed -E "$edit" "$1" | cmp - "$1" 2>&1 | sed -n 's/.*line //p' || true)"
    printf '%s\t%s\t%s\t%s\n' "$1" "${line:-1}" "$fault" "$edit"
  done <"$work/edits"
}

# The kernel files that hold a file: itself, or for a header those that include it at any depth, the shortest first,
# since it builds and runs fastest.
holders_of() {
  case "$1" in
    *.cu) echo "$1" ;;
    *)
      grep -l "#include \"$(basename "$1")\"" kernels/* | while read -r includer; do holders_of "$includer"; done |
        sort -u | xargs wc -c | sort -n | sed -n 's/.* \(.*\.cu\)$/\1/p' ;;
  esac
}

# The names of the tests that run a kernel file.
tests_of() {
  grep -rlF "Program::new(\"$1\")" "$cases" | sed -E "s,^$cases/,,; s,(/mod)?\.rs$,,; s,/,::,g" |
    while read -r module; do grep "^$module::" "$work/tests"; done
}

# Tries one mutant; prints one line about it.
try_mutant() {
  local file line kind edit folder op test status verdict=SURVIVED
  IFS=$'\t' read -r file line kind edit <<<"$1"
  folder="$(mktemp -d "$work/mutant.XXXXXX")"
  cp kernels/* "$folder"
  sed -E -i "$edit" "$folder/$(basename "$file")"
  if cmp -s "$file" "$folder/$(basename "$file")"; then
    verdict='NOT CHANGED'
  else
    # One test after the other, since the first that fails is enough.
    for test in $(for holder in $(holders_of "$file"); do tests_of "$holder"; done); do
      status=0
      CANDLE_DROPOUT_KERNELS="$folder" timeout 300 "$tests" --exact "$test" >"$folder/log" 2>&1 || status=$?
      [ "$status" -eq 0 ] && continue
      verdict=caught
      # A test that takes so long found nothing: a kernel that does not end is stopped earlier.
      if [ "$status" -eq 124 ]; then verdict='TIMED OUT'; fi
      if grep -q 'could not compile' "$folder/log"; then verdict='NOT COMPILED'; fi
      if grep -q 'no C++ compiler' "$folder/log"; then verdict='NOT RUN'; fi
      break
    done
  fi
  rm -rf "$folder"
  printf '%-12s %-20s %s:%s: %s\n' "$verdict" "$kind" "$file" "$line" "$(sed -n "${line}s/^ *//p" "$file")"
}
export -f try_mutant holders_of tests_of

gather_edits >"$work/edits"
# An edit of a file that is gone would never be tried.
cut -d'|' -f1 "$work/edits" | sort -u | while read -r file; do
  [ -f "$file" ] || { echo "$cases names faults of '$file', which is not there" >&2; exit 1; }
done
for file in "$@"; do list_mutants "$file"; list_edits "$file"; done >"$work/mutants"
echo "$(wc -l <"$work/mutants") mutants" >&2
if [ -n "${MUTANTS:-}" ]; then
  texts="$(find kernels "$cases" scripts/mutation-test.sh -type f | LC_ALL=C sort | xargs cat | sha256sum)"
  shuf -n "$MUTANTS" --random-source=<(yes "$texts") "$work/mutants" >"$work/choice"
  mv "$work/choice" "$work/mutants"
  echo "of which $(wc -l <"$work/mutants") are tried" >&2
fi
xargs -d '\n' -P "$(nproc)" -I{} bash -c 'try_mutant "$1"' _ {} <"$work/mutants" | tee "$work/verdicts"

if grep -v '^caught' "$work/verdicts" >"$work/failures"; then
  printf '\nNot caught:\n' >&2
  cat "$work/failures" >&2
  exit 1
fi
