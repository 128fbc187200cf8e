#!/usr/bin/env bash
# Training on several machines without a scheduler: run this on each of them, the same but for NODE_RANK.
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 launch/torchrun.sh experiment=quickstart run.dir=/shared/runs/two
#   NODES=2 NODE_RANK=1 HEAD=10.0.0.1 launch/torchrun.sh experiment=quickstart run.dir=/shared/runs/two
#
# run.dir and data.source must be the same storage on all of them. On a single machine say
# `sora launch local experiment=...`, or this file without any variable.
#
#   NODES      machines
#   NODE_RANK  this one's number, from 0; 0 is HEAD
#   HEAD       address of machine 0 that all others reach: a cluster's address, not 127.0.1.1
#   PORT       a port that is free there
#   RANKS      processes of each machine, one a GPU
#
# Exit codes: 0 done, 1 a fault, 2 a mistake of the configuration, 75 told to leave (SIGTERM, SIGUSR1) with
# everything saved. The same command goes on from the newest checkpoint.
set -euo pipefail

NODES=${NODES:-1}
RANKS=${RANKS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$RANKS" -gt 0 ] || RANKS=1

if [ "$NODES" -gt 1 ]; then
  : "${NODE_RANK:?is the number of this machine, from 0 to NODES-1}" "${HEAD:?is the address of machine 0}"
  MEETING=(--nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$HEAD" --master-port "${PORT:-29500}")
else
  MEETING=(--standalone)
fi

# For NCCL and gloo on a machine with several networks: the interface that HEAD's address belongs to.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# torchrun with exit codes a scheduler can act on, and time to save for ranks that are told to leave.
exec python -m sora_train.tools.launch.node "${MEETING[@]}" --nproc-per-node "$RANKS" -m sora_train.train "$@"
