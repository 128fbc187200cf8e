#!/usr/bin/env bash
# The unit tests on another torch, without its device: what changed in PyTorch's interfaces shows. Not in make test.
#   tests/on_torch.sh VERSION FOLDER [arguments of pytest]
#   PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cu130" tests/on_torch.sh 2.11.0+cu130 /tmp/torch211
# FOLDER becomes a virtual environment; PYTHON is its interpreter (python3). Builds for CUDA take gigabytes.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "tests/on_torch.sh VERSION FOLDER [arguments of pytest]" >&2
  exit 2
fi
version=$1 venv=$2
shift 2
cd "$(dirname "$0")/.."
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
# All other versions are those of every day; torchao and torchcodec belong to one torch.
grep -vE '^(torch|torchao|torchcodec)==' constraints.txt >"$venv/constraints.txt"
echo "torch==$version" >>"$venv/constraints.txt"
# shellcheck disable=SC2086
"$venv/bin/pip" install -q ${PIP_FLAGS:-} -c "$venv/constraints.txt" -e . \
  pytest pytest-timeout pytest-xdist hypothesis accelerate deepspeed aiohttp s3fs optuna tensorboard nvidia-ml-py
"$venv/bin/python" -c "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda)"
CUDA_VISIBLE_DEVICES= exec "$venv/bin/python" -m pytest -m 'not slow and not gpu' -p no:cacheprovider "$@" tests/unit
