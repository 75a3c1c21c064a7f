#!/usr/bin/env bash
# Proves that the kernel tests would notice a fault: `scripts/mutation-test.sh [kernels/op.cu ..]`.
#
# Breaks the kernels in one place at a time and demands that a test of the kernels on the host fails:
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
#
# MUTANTS=40 tries that many only: another choice whenever a kernel, one of those tests or this script changes,
# and the same until then.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- kernels/*.cuh kernels/*.cu

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# Those of a kernel file are `<op>::kernel::..`, or `..::kernel::<file>::..` where an op has several.
tests="$(cargo test --release --lib --no-run 2>&1 | tee >(cat >&2) |
  sed -n 's/^ *Executable .*(\(.*\/cases-[^/]*\))$/\1/p')"
"$tests" --list --format terse | sed -n '/::kernel::/s/: test$//p' >"$work/tests"
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
kernels/cross_entropy.cu|smoothing lost|s/if \(args\.uniform != 0\. && of_target != -INFINITY\)/if (false)/
kernels/cross_entropy.cu|smoothing of logits as they are|s/above_target \+= x\[j\] - of_target/above_target += x[j]/
kernels/cross_entropy.cu|masked target not told apart|s/ && of_target != -INFINITY\) loss/) loss/
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
kernels/attention.cuh|window begins late|s/queries - left;/queries - left + 1;/
kernels/attention.cuh|window ends early|s/queries \+ right \+ 1;/queries + right;/
kernels/attention.cuh|first query lost|s/queries - keys - right;/queries - keys - right + 1;/
kernels/attention.cuh|last query lost|s/keys \+ left \+ 1;/keys + left;/
kernels/attention.cuh|length past the keys|s/min\(key_lengths\[batch\], keys\)/key_lengths[batch]/
kernels/attention.cuh|scale above the softcap|s/args\.scale \/ args\.softcap/args.scale/
kernels/attention.cuh|slope of the softcap|s/1\.f - tanh \* tanh/1.f/
kernels/attention.cuh|one slope for all heads|s/alibi_slopes\[head\]/alibi_slopes[0]/
kernels/attention.cuh|distance with a sign|s/fabsf\(float\(int\(own_key - key\)\)\)/float(int(own_key - key))/
kernels/attention.cuh|vectors anywhere|s/ && is_aligned\(tensor\)//
kernels/attention.cuh|strides unchecked|s/\(strides\.batch \| strides\.head \| strides\.row\)/strides.batch/
kernels/attention_delta.cu|heads of all samples|s/h = head % args\.heads/h = head/
kernels/attention_delta.cu|past the last row|s/min\(first \+ threadIdx\.y, rows - 1\)/first + threadIdx.y/
kernels/attention_f32.cu|keys not transposed|s/key % 8 \* 8 \+ key \/ 8/key/
kernels/attention_f32.cu|rows before the first|s/first \+ r >= rows\.begin && //
kernels/attention_f32.cu|mask of one head|s/map\(uint64_t\(head\) \*/map(0 */
kernels/attention_f32.cu|hidden keys seen|s/query\.sees\(key \+ j\) \? logit : -INFINITY/logit/
kernels/attention_f32.cu|nothing visible yet|s/new_max == -INFINITY \? 0\.f : new_max/new_max/
kernels/attention_f32.cu|sum keeps its maximum|s/shrink = exp2f\(max\[r\] - base\)/shrink = 1.f/
kernels/attention_f32.cu|nothing dropped|s/= !DROPS \|\| keeps\(drop, draws\[j\]\) \? e : 0\.f/= e/
kernels/attention_f32.cu|denominator drops|s/sum\[r\] \+= e;/sum[r] += !DROPS || keeps(drop, draws[j]) ? e : 0.f;/
kernels/attention_f32.cu|rows that see nothing|s/total == 0\.f \? 0\.f : acc/acc/
kernels/attention_f32.cu|lse of such rows|s/total == 0\.f \? INFINITY : \(max/(max/
kernels/attention_f32.cu|y of hidden keys|s/query\.sees\(key \+ j\) && keep \? p/keep ? p/
kernels/attention_f32.cu|ds of hidden keys|s/query\.sees\(key \+ j\) \? p \* /true ? p * /
kernels/attention_f32.cu|dP not dropped|s/keep \? \(DROPS \? drop\.scale \* dp\[j\] : dp\[j\]\) : 0\.f/drop.scale * dp[j]/
kernels/attention_f32.cu|delta lost|s/p \* \(dy - delta\)/p * dy/
kernels/attention_f32.cu|dq, lse past its end|s/min\(i, last_query\)/i/
kernels/attention_f32.cu|dk, lse past its end|s/min\(i, args\.queries - 1\)/i/
kernels/attention_f32.cu|first head of a group|s/h < \(kv_head \+ 1\) \* group/h < kv_head * group + 1/
kernels/attention_f32.cu|dv without its scale|s/dv_scale = DROPS \? drop\.scale : 1\.f/dv_scale = 1.f/
kernels/dropout_add_norm.cu|drops by product|s/rounded<T>\(keeps\(mask, draws\[j\]\) \? kept : s\[j\]\)/rounded<T>(s[j] + v[j] * (keeps(mask, draws[j]) ? mask.scale : 0.f))/
kernels/dropout_add_norm.cu|statistics unrounded|s/v\[j\] = rounded<T>\(/v[j] = (/
kernels/activation_dropout.cu|drops by product|s/keeps\(mask, draws\[j\]\) \? a \* mask\.scale : 0\.f/a * (keeps(mask, draws[j]) ? mask.scale : 0.f)/
kernels/activation_dropout.cu|slope of what drops|s/da == 0\.f \? 0\.f : da \* slope/da * slope/
kernels/activation_dropout.cu|dy drops by product|s/keeps\(mask, draws\[j\]\) \? da\[j\] \* mask\.scale : 0\.f/da[j] * (keeps(mask, draws[j]) ? mask.scale : 0.f)/
kernels/attention_tiles.cuh|threshold kept|s/draws << 16 : draws\) < /draws << 16 : draws) <= /
kernels/attention_tiles.cuh|halves borrow|s/\(draws \| HIGHEST\) - /draws - /
kernels/attention_tiles.cuh|highest bits ignored|s/\(~draws & threshold\) \| //
kernels/attention_tiles.cuh|shift lost|s/uint32_t\(key \+ shift\)/uint32_t(key)/
kernels/attention_tiles.cuh|mask row of head lost|s/first_row \+ query/query/
kernels/attention_tiles.cuh|rows that see nothing|s/if \(statistics\.lse != INFINITY\) //
kernels/attention_tiles.cuh|drops by product|s/\(keep \? kept_dp : -statistics\.delta\)/((keep ? 1.f : 0.f) * kept_dp - statistics.delta)/
kernels/attention_tiles.cuh|negative scale is plain|s/ && factor > 0\.f//
kernels/attention.cu|sums not scaled down|s/sums\[m\]\[h\] \*= shrink;//
kernels/attention.cu|no stand-in for -inf|s/reference\[m\]\[h\] == -INFINITY \? 0\.f : reference/reference/
kernels/attention.cu|heads of keys|s/head \/ \(args\.heads \/ args\.kv_heads\)/head % args.kv_heads/
kernels/attention.cu|queries that see nothing|s/const int seeing_begin = args\.seeing_begin\(0\)/const int seeing_begin = 0/
kernels/attention.cu|keys that none sees|s/const int seen_begin = args\.visible_begin\(0\)/const int seen_begin = 0/
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
  local file line kind edit folder op test status verdict=SURVIVED
  IFS=$'\t' read -r file line kind edit <<<"$1"
  folder="$(mktemp -d "$work/mutant.XXXXXX")"
  cp kernels/* "$folder"
  sed -E -i "$edit" "$folder/$(basename "$file")"
  if cmp -s "$file" "$folder/$(basename "$file")"; then
    verdict='NOT CHANGED'
  else
    # One test after the other, since the first that fails is enough.
    for test in $(for op in $(ops_of "$file"); do grep -E "(^|::)$op::" "$work/tests"; done); do
      status=0
      CANDLE_DROPOUT_KERNELS="$folder" timeout 300 "$tests" --exact "$test" >"$folder/log" 2>&1 || status=$?
      [ "$status" -eq 0 ] && continue
      verdict=caught
      # A test that takes so long found nothing: a kernel that does not end is stopped earlier.
      if [ "$status" -eq 124 ]; then verdict='TIMED OUT'; fi
      if grep -q 'could not compile' "$folder/log"; then verdict='NOT COMPILED'; fi
      break
    done
  fi
  rm -rf "$folder"
  printf '%-12s %-20s %s:%s: %s\n' "$verdict" "$kind" "$file" "$line" "$(sed -n "${line}s/^ *//p" "$file")"
}
export -f try_mutant ops_of

for file in "$@"; do list_mutants "$file"; list_edits "$file"; done >"$work/mutants"
echo "$(wc -l <"$work/mutants") mutants" >&2
if [ -n "${MUTANTS:-}" ]; then
  texts="$(find kernels tests/cases scripts/mutation-test.sh -type f | LC_ALL=C sort | xargs cat | sha256sum)"
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
