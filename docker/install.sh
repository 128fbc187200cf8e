#!/usr/bin/env bash
# What an installation takes, in one place: the images, `make` and bare machines call it.
#
#   docker/install.sh system                  packages of the distribution (Debian, Ubuntu; as root)
#   docker/install.sh slurm                   a SLURM to test with (Debian, Ubuntu; as root)
#   docker/install.sh postgres                a PostgreSQL to test with (Debian, Ubuntu; as root)
#   docker/install.sh browser                 a Chromium to test the playground with (Debian; as root)
#   docker/install.sh python VENV [EXTRA,..]  sora_train with the versions of constraints.txt into VENV
#   docker/install.sh flash VENV              flash-attn, compiled for this CUDA; needs nvcc and up to an hour
#   docker/install.sh check VENV              that it imports, finds its configs and takes a training step
#
# PYTHON     the interpreter of a new VENV (default: the newest of 3.11 and later that is found)
# PIP_FLAGS  for example --extra-index-url https://download.pytorch.org/whl/cpu for the small CPU build of torch
# EDITABLE   1 (default): the code stays where it is; 0: it is copied into VENV
# MAX_JOBS   compilers side by side for flash-attn (default 4; each takes up to 8 GB)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FLASH_ATTN=2.8.3.post2 # the newest release whose interface the attention backends call

stop() {
  echo "error: $*" >&2
  exit 2
}

apt() {
  command -v apt-get >/dev/null || stop "'$1' installs Debian packages, and there is no apt-get here; install $2 by hand"
  [[ $(id -u) == 0 ]] || stop "'$1' installs packages for the whole machine; run it as root"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # shellcheck disable=SC2086 # a list of words
  apt-get install -y -qq --no-install-recommends $2 >/dev/null
}

# The first interpreter that is new enough; empty where there is none.
interpreter() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

# pip of a VENV, quiet and pinned.
pip_install() {
  local venv=$1
  shift
  # shellcheck disable=SC2086 # flags are words
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile ${PIP_FLAGS:-} -c constraints.txt "$@"
}

step_python() {
  local venv=$1 extras=${2:-} found flag=()
  if [[ ! -x $venv/bin/python ]]; then
    found=$(interpreter)
    [[ -n $found ]] || stop "no Python 3.11 or later found (looked for: ${PYTHON:-python3, python3.13 to 3.11}); install one or name it: PYTHON=/path/to/python3"
    "$found" -m venv "$venv" || stop "$found cannot make $venv; on Debian and Ubuntu install python3-venv"
  fi
  if [[ ${EDITABLE:-1} == 1 ]]; then flag=(-e); fi
  pip_install "$venv" "${flag[@]}" ".${extras:+[$extras]}"
}

step_flash() {
  command -v nvcc >/dev/null || stop "flash-attn is compiled with nvcc, which is not here; take a CUDA image whose name has -devel-"
  pip_install "$1" packaging psutil ninja wheel setuptools
  MAX_JOBS=${MAX_JOBS:-4} pip_install "$1" --no-build-isolation "flash-attn==$FLASH_ATTN"
}

step_check() {
  local venv work
  venv=$(cd "$1" && pwd)
  "$venv/bin/python" -m pip check
  work=$(mktemp -d)
  # shellcheck disable=SC2064 # now: a function's own variable is gone at the exit
  trap "rm -rf '$work'" EXIT
  # From elsewhere: what is tested is what was installed.
  (cd "$work" && "$venv/bin/sora" train experiment=parity_tiny train.steps=1 run.dir="$work/run")
}

step=${1:-}
case $step in
  system) apt system "python3 python3-dev python3-venv gcc g++ git ca-certificates ffmpeg" ;;
  slurm) apt slurm "slurm-wlm munge" ;;
  browser) apt browser "chromium" ;;
  postgres) apt postgres "postgresql" ;; # the tests start servers of their own; that of the package may stay stopped
  python | flash | check)
    [[ -n ${2:-} ]] || stop "'$step' needs the folder of an environment: docker/install.sh $step .venv"
    if [[ $step != python && ! -x $2/bin/python ]]; then
      stop "$2 is not an environment; make it: docker/install.sh python $2"
    fi
    "step_$step" "${@:2}"
    ;;
  *)
    sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
    stop "'$step' is no step; give system, slurm, postgres, browser, python, flash or check"
    ;;
esac
