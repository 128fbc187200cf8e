#!/usr/bin/env bash
# Everything one GPU can tell in under 10 minutes: `bash benchmarks/gpu_suite.sh [--toy] [--from DIR] [OUT]`.
#
# Parts are independent: one that fails or runs out of its time does not stop the next, and what a part found is on disk
# as it goes. OUT (default benchmarks/results) gets a log a part, what the part wrote, suite.md with a line a part, and
# predicted.md with the prediction beside every number. A part that has passed there is not run again, so the suite goes
# on where it was cut off. Exit code: 0 if every part passed, else 1.
#
# --from DIR takes results.tar.gz and caches.tar.gz of an earlier run, the second of which holds what Inductor and Triton
# compiled. Both are packed into OUT after each part.
# --toy runs the same parts at toy sizes on a CPU in some minutes. SORA_PARTS="ceilings block" runs only some.
# PYTHON names the interpreter (default: .venv/bin/python if there, else python3). Wheels in .whl/ are installed into
# .site/ first, for a machine that has PyTorch and no network.
set -u
cd "$(dirname "$0")/.." || exit 1
toy=0 from="" out=benchmarks/results
while [ $# -gt 0 ]; do
  case $1 in
    --toy) toy=1 ;;
    --from) from=$2 && shift ;;
    -*) echo "gpu_suite.sh: $1 is no option; there are --toy and --from DIR" >&2 && exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
sora=("$PYTHON" -m sora_train)
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD
if [ -d .whl ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .site .whl/*.whl || exit 1
  export PYTHONPATH=$PWD/.site:$PYTHONPATH
fi
caches=${SORA_CACHES:-$work/caches}
export TORCHINDUCTOR_CACHE_DIR=$caches/inductor TRITON_CACHE_DIR=$caches/triton
mkdir -p "$TORCHINDUCTOR_CACHE_DIR" "$TRITON_CACHE_DIR"
for place in ${from:+"$from"} "$out"; do
  if [ -f "$place/caches.tar.gz" ]; then tar -xzf "$place/caches.tar.gz" -C "$caches"; fi
done
if [ -n "$from" ] && [ -f "$from/results.tar.gz" ]; then tar -xzf "$from/results.tar.gz" -C "$out"; fi
failed=0

# pack: what was found and what was compiled, whole at every moment.
pack() {
  tar -czf "$work/results.tar.gz" -C "$out" --exclude=./caches.tar.gz --exclude=./results.tar.gz . &&
    mv "$work/results.tar.gz" "$out/"
  tar -czf "$work/caches.tar.gz" -C "$caches" . && mv "$work/caches.tar.gz" "$out/"
}

# part NAME SECONDS COMMAND...: output in OUT/NAME.log, verdict in OUT/suite.md.
part() {
  local name=$1 seconds=$2 began code verdict
  shift 2
  case " ${SORA_PARTS:-$name} " in *" $name "*) ;; *) return ;; esac
  if grep -qs "^| $name | passed |" "$out/suite.md"; then
    echo "== $name: passed before"
    return
  fi
  # A CPU that others use too may be slow.
  if [ "$toy" = 1 ]; then seconds=$((10 * seconds)); fi
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
  if [ -f "$out/suite.md" ]; then
    grep -v "^| $name |" "$out/suite.md" >"$work/suite.md"
  else
    printf '%s\n' "| part | verdict | time | log |" "|---|---|--:|---|" >"$work/suite.md"
  fi
  echo "| $name | $verdict | $(($(date +%s) - began)) s | $name.log |" >>"$work/suite.md"
  mv "$work/suite.md" "$out/suite.md"
  "$PYTHON" -m benchmarks.gpu.predicted "$out" >"$out/predicted.log" 2>&1
  pack
  echo "== $name: $verdict"
}

# keep FROM TO FILE...: copy what a run left behind, as far as it came, to OUT/TO.
keep() {
  local from=$1 to=$out/$2 file
  shift 2
  for file in "$@"; do
    if [ -e "$from/$file" ]; then mkdir -p "$to" && cp "$from/$file" "$to/"; fi
  done
}

toys=()
model=(model=wan_1_3b vae=tiny_random text.d_model=4096 text.num_layers=1 text.max_length=512
  text.trainable=false text.padding=wan parallel.activation_memory_budget=0.7)
one=81 three=81,33,1 clips=(--size 480 832 --clips 16 --steps 8 run.device=cuda)
checkpoint=(--mib 8192 --repeats 2 --device cuda)
memory=(model=wan_1_3b --tokens 32760 --caption 512 --repeats 2 --device cuda --fits 524288
  --options "full, mlp in 4, offload;memory budget 0.5;selective;full;nothing")
quickstart=(train.steps=60 run.device=cuda sample.every=60 model.compile=off)
if [ "$toy" = 1 ]; then
  toys=(--toy)
  model=(model.num_layers=2 model.num_heads=2 model.head_dim=16 model.ffn_dim=64 model.text_dim=64 vae=tiny_random
    text.d_model=64 text.num_layers=1 text.num_heads=2 text.d_kv=16 text.d_ff=64 text.max_length=512
    text.trainable=false text.padding=wan)
  one=9 three=9,5,1 clips=(--size 48 64 --clips 4 --steps 2 run.device=cpu)
  checkpoint=(--mib 8 --repeats 1 --device cpu)
  memory=(--tokens 64 --caption 16 --repeats 1 --fits 128 --budget-mib 40 --dtype float32 --device cpu
    model.num_layers=2 --options "nothing;full")
  quickstart=(train.steps=2 run.device=cpu vae=tiny_random data.shapes_clips=24
    data.shapes_val_clips=2 data.micro_batch=4 objective.num_steps=1 sample.every=2
    sample.max_prompts=1 sample.oracle_prompts=2)
fi

# The order is that of worth: what the planner rests on comes first. The limits are twice what is expected.
part ceilings 30 "$PYTHON" -m benchmarks.gpu.ceilings --out "$out" ${toys[@]+"${toys[@]}"}
part block 75 "$PYTHON" -m benchmarks.gpu.block --out "$out" ${toys[@]+"${toys[@]}"}
stored=("$PYTHON" -m benchmarks.gpu.stored_training "${model[@]}" "${clips[@]}")
part train_480p 110 "${stored[@]}" --frames "$one" --out "$out/train_480p"
part train_three 90 "${stored[@]}" --frames "$three" --out "$out/train_three"
part checkpoint 45 "${sora[@]}" bench ckpt "${checkpoint[@]}" --folder "$work" --out "$out/checkpoint"
part memory 75 "${sora[@]}" bench memory "${memory[@]}" --out "$out/memory"
part sampling 45 "$PYTHON" -m benchmarks.gpu.sampling --out "$out" ${toys[@]+"${toys[@]}"}
# pytest's exit code 5 says that there are no tests.
# shellcheck disable=SC2016
part gpu_tests 60 bash -c '"$0" -m pytest -q -p no:cacheprovider tests/gpu; code=$?
  [ "$code" -eq 5 ] || exit "$code"' "$PYTHON"
part quickstart 60 "${sora[@]}" train experiment=quickstart "${quickstart[@]}" \
  run.dir="$work/quickstart"
keep "$work/quickstart" quickstart summary.json metrics.jsonl report.html config.yaml run.json

cat "$out/suite.md" "$out/predicted.md"
exit "$failed"
