#!/usr/bin/env bash
# Everything a GPU can tell in about 10 minutes: `bash benchmarks/gpu_suite.sh [OUT]`.
#
# Parts are independent: one that fails or runs out of its time does not stop the next, and what a
# part found is on disk the moment it ends. OUT (default benchmarks/results) gets a log a part, what
# the part wrote, and suite.md, a line a part. Exit code: 0 if every part passed, else 1.
#
# SORA_TOY=1 runs the same parts at toy sizes on a CPU in about a minute.
# PYTHON names the interpreter (default: .venv/bin/python if there, else python3).
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-benchmarks/results}
toy=${SORA_TOY:-0}
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
sora=("$PYTHON" -m sora_train)
mkdir -p "$out" || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
failed=0

# part NAME SECONDS COMMAND...: output in OUT/NAME.log, verdict in OUT/suite.md.
part() {
  local name=$1 seconds=$2 began code verdict
  shift 2
  began=$(date +%s)
  echo "== $name (at most $seconds s): $*"
  timeout --kill-after=10 "$seconds" "$@" >"$out/$name.log" 2>&1
  code=$?
  case $code in
    0) verdict=passed ;;
    124 | 137) verdict="stopped after $seconds s" ;;
    *) verdict="failed with exit code $code" ;;
  esac
  if [ "$code" -ne 0 ]; then
    failed=1
    tail -n 15 "$out/$name.log"
  fi
  echo "| $name | $verdict | $(($(date +%s) - began)) s | $name.log |" >>"$out/suite.md"
  echo "== $name: $verdict"
}

# keep FROM TO FILE...: copy what a run left behind, as far as it came, to OUT/TO.
keep() {
  local from=$1 to=$out/$2 file
  shift 2
  mkdir -p "$to"
  for file in "$@"; do
    if [ -e "$from/$file" ]; then cp "$from/$file" "$to/"; fi
  done
}

printf '%s\n' "| part | verdict | time | log |" "|---|---|--:|---|" >"$out/suite.md"

# 1. Training throughput: model b on stored latents, one length of 1280 tokens, about 32k a step.
train=(model=b text=bytes_small vae=tiny_random data=shapes data.cache=latents
  'buckets.classes=[{name: 256px, pixels: 65536, frames: [17], aspect_ratios: ["1:1"]}]'
  buckets.fps=8 buckets.max_upscale=16 data.max_drop_fraction=1 data.shapes_clips=700
  data.shapes_val_clips=1 data.micro_batch_tokens=32768 run.device=cuda)
steps=(--steps 30 --warmup 10)
if [ "$toy" = 1 ]; then
  train=(experiment=parity_tiny run.device=cpu)
  steps=(--steps 2 --warmup 1)
fi
part train_256px 140 "${sora[@]}" bench train "${train[@]}" "${steps[@]}" --out "$out/train_256px"

# 2. What each memory option saves and costs, and the longest clip that trains with it.
memory=(model=wan_1_3b --tokens 16384 --repeats 3 --longest --device cuda)
if [ "$toy" = 1 ]; then
  memory=(--tokens 64 --caption 16 --repeats 1 --longest --budget-mib 40 --dtype float32
    --device cpu model.num_layers=2)
fi
part memory 180 "${sora[@]}" bench memory "${memory[@]}" --out "$out/memory"

# 3. The tests that need a GPU; pytest's exit code 5 says that there are none yet.
# shellcheck disable=SC2016
part gpu_tests 140 bash -c '"$0" -m pytest -q -p no:cacheprovider tests/gpu; code=$?
  [ "$code" -eq 5 ] || exit "$code"' "$PYTHON"

# 4. The quickstart, a short form of it: the whole way from rendered files to scored samples.
quickstart=(train.steps=200 run.device=cuda sample.every=100)
if [ "$toy" = 1 ]; then
  quickstart=(train.steps=2 run.device=cpu vae=tiny_random data.shapes_clips=24
    data.shapes_val_clips=2 data.micro_batch=4 objective.num_steps=1 sample.every=2
    sample.max_prompts=1 sample.oracle_prompts=2)
fi
part quickstart 130 "${sora[@]}" train experiment=quickstart "${quickstart[@]}" \
  run.dir="$work/quickstart"
keep "$work/quickstart" quickstart summary.json metrics.jsonl report.html config.yaml run.json

cat "$out/suite.md"
exit "$failed"
