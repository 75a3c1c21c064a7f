#!/usr/bin/env bash
# The differential test of tests/differential/ on checkpoints that nobody has drawn before: 2,000 edited ones
# (COUNT), which take transformers some two minutes, of a seed that is printed (SEED draws the same again).
#
#     pip install torch transformers safetensors
#     scripts/differential-test.sh [FILE]
#
# FILE is where the data stay; without it they are kept only if the test fails. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"

if ! "$python" -c 'import torch, transformers, safetensors' 2>/dev/null; then
  echo "differential-test.sh: $python lacks torch, transformers or safetensors: install them with pip, or name" \
    "an interpreter that has them by PYTHON" >&2
  exit 2
fi
file="$(realpath -m "${1:-"$(mktemp --suffix .jsonl)"}")"
"$python" tests/differential/make.py --count "${COUNT:-2000}" --out "$file" ${SEED:+--seed "$SEED"}
if ! CANDLE_DROPOUT_DIFFERENTIAL="$file" cargo test --release --test differential -- --nocapture; then
  echo "differential-test.sh: the data are in $file" >&2
  exit 1
fi
[ -n "${1:-}" ] || rm "$file"
