#!/usr/bin/env bash
# Every benchmark that a GPU changes, the tests that need one, and a run from end to end, in under nine minutes on one
# H100. No network is used. Without a GPU, or with --toy, the same lines run at toy sizes, so that a wrong one shows.
#
#   benchmarks/gpu.sh [--toy]
#
# OUT     folder of results.jsonl (a line for each part), table.txt and log.txt (default: runs/gpu)
# PYTHON  an interpreter with PyTorch (default: .venv/bin/python where there is one, else python3)
#
# Packages that are missing on a machine without network can lie in .whl/ as wheels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=$(realpath -m "${OUT:-runs/gpu}")
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT"
: >"$OUT/results.jsonl"
: >"$OUT/log.txt"
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 BILECT_CACHE="$work/cache"
export HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR="$work/inductor"
if [ -d .whl ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" .whl/*.whl
  export PYTHONPATH="$PYTHONPATH:$work/site"
fi

case "${1:-}" in
  --toy) toy=yes ;;
  "") toy=$("$PYTHON" -c 'import torch; print("" if torch.cuda.is_available() else "yes")') ;;
  *) echo "usage: benchmarks/gpu.sh [--toy]" >&2; exit 2 ;;
esac

# A busy machine is slow, and toys measure nothing: there the limits are only for what hangs.
patience=$([ "$toy" ] && echo 5 || echo 1)

# part NAME SECONDS COMMAND...: what the command prints goes to the log, its last line, one JSON object, to the results.
# A command that fails, takes too long or ends without figures is a failed part; the others still run.
part() {
  if [ "$toy" ]; then  # two at a time: nothing is measured
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n || true; done
    carry_out "$@" &
  else
    carry_out "$@"
  fi
}

carry_out() {
  local name=$1 limit=$(($2 * patience)) start=$SECONDS rc=0 output
  shift 2
  output=$(mktemp -p "$work")
  [ "$toy" ] || limit=$((limit < 525 - SECONDS ? limit : 525 - SECONDS))
  if [ "$limit" -gt 0 ]; then
    timeout --kill-after=10 "$limit" "$@" >"$output" 2>&1 || rc=$?
  else
    echo "no time was left" >"$output"
    rc=124
  fi
  { printf '\n== %s\n' "$name"; cat "$output"; } >>"$OUT/log.txt"
  "$PYTHON" - "$name" "$rc" "$((SECONDS - start))" "$output" >>"$OUT/results.jsonl" <<'PY'
import json
import sys

name, rc, seconds, file = sys.argv[1:]
lines = open(file, encoding="utf-8", errors="replace").read().strip().splitlines() or [""]
try:
    figures = json.loads(lines[-1])
    assert isinstance(figures, dict)
except (ValueError, AssertionError):
    figures, rc = {"last_line": lines[-1][:300]}, rc if int(rc) else "1"
print(json.dumps({"part": name, "rc": int(rc), "seconds": int(seconds), "figures": figures}))
PY
  { printf '\n== %s\n' "$name"; tail -n 25 "$output" | cut -c 1-200; }
}

# The tests marked for a GPU; a line of figures, as the benchmarks have it.
tests() {
  "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu $(grep -rl --include='test_*.py' 'mark\.gpu' tests) >"$work/tests" 2>&1 ||
    { cat "$work/tests"; return 1; }
  "$PYTHON" - "$work/tests" <<'PY'
import json
import re
import sys

text = open(sys.argv[1], encoding="utf-8").read()
print(text)
print(json.dumps({word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped|deselected)", text)}))
PY
}
export -f tests
export PYTHON work

if [ "$toy" ]; then
  fit=(--proxy tiny-100k --target tiny-300k --documents 2 --tokens 64 --vocab 512 --seconds 0.5)
  blade=(--rows 2 --tokens 64 --vocab 512 --seconds 0.5)
  blade_models=(tiny-100k)
  score_models=(tiny-100k)
  scoring=(--megabytes 0.02 --context 64 --batch-tokens 1024 --no-memory)
  hot=tiny-100k
  end=()
  compile=aot_eager
else
  fit=(--documents 16 --tokens 1024 --seconds 15)
  blade=(--seconds 8)
  blade_models=(pythia-160m pythia-410m)
  score_models=(pythia-31m pythia-160m)
  scoring=(--megabytes 2 --no-memory)  # influence is in float32
  hot=pythia-31m
  compile=inductor
  end=(--proxy pythia-31m --target pythia-160m --rows 20000 --steps 50)
fi

part "tests" 60 bash -c tests
part "waits and launches" 60 "$PYTHON" benchmarks/hot_path.py --model "$hot"
part "fit step" 150 "$PYTHON" benchmarks/bilevel_step.py "${fit[@]}"
for model in "${blade_models[@]}"; do
  part "BLADE step, $model" 75 "$PYTHON" benchmarks/token_selection.py --model "$model" "${blade[@]}"
done
for model in "${score_models[@]}"; do
  part "scores, $model" 110 "$PYTHON" benchmarks/scoring.py --model "$model" "${scoring[@]}"
done
part "end to end" 60 "$PYTHON" benchmarks/end_to_end.py "${end[@]}"
# last: a compiler takes what time is left
part "BLADE step, ${blade_models[0]}, compiled" 180 "$PYTHON" benchmarks/token_selection.py \
  --model "${blade_models[0]}" "${blade[@]}" --compile "$compile"
wait

"$PYTHON" - "$OUT/results.jsonl" <<'PY' | tee "$OUT/table.txt"
import json
import sys

import torch

parts = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"\n{name}, PyTorch {torch.__version__}; MFU is of the bf16 peak where one is named")


def number(x):
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def flat(figures, prefix=""):
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


KEYS = ("ratio", "mfu", "tflops_per_second", "tokens_per_second", "peak_gb", "passed", "skipped", "waits", "launches",
        "kernels", "floor", "d_correlation", "target_source_kept")
for part in parts:
    print(f"{part['part']:<32} {'ok' if part['rc'] == 0 else 'FAILED (' + str(part['rc']) + ')':<12} {part['seconds']:>4} s")
    if part["rc"]:
        print(f"    {part['figures'].get('last_line', '')}")
    for key, value in flat(part["figures"]):
        if any(word in key for word in KEYS):
            print(f"    {key:<60} {number(value)}")
failed = [part["part"] for part in parts if part["rc"]]
print(f"\n{len(parts) - len(failed)} of {len(parts)} parts are well" + (f"; failed: {', '.join(failed)}" if failed else ""))
sys.exit(bool(failed))
PY
